"""One schema for flags, YAML and JSON: S1's file as it is, what overrides what, and every error."""

import json
import os
import re
from pathlib import Path

import config as config_module
import devices
import launcher
import models
import provenance
import pytest
import world
import yaml
from config import Config, parse_args, read_file, resolve
from errors import InputError

S1 = """
nnodetype: f_node
nnodes: 2
walltime: 12:30:00
jobname: imagenet
stdout: $JOB_ID.o.log
stderr: $JOB_ID.e.log
others:
  j: y
modules: ./modules.sh
nclasses: 16
mean.npy: means/mean.npy
arch: resnet50
epoch: 10
batchsize: 128
loaderjob: 8
out: results
resume: null
initmodel: null
test: null
communicator: hierarchical
loadtype: custom
iterator: process
optimizer: rmsprop_warmup
"""
"""A configuration file with every key of S1's table."""


@pytest.mark.parametrize("form", ["yaml", "other spelling", "json"])
def test_a_file_with_every_key_of_s1(tmp_path, form):
    text = S1
    if form == "other spelling":
        text = S1.replace("nnodetype", "nodetype").replace("mean.npy: ", "mean: ")
    path = tmp_path / ("config.json" if form == "json" else "config.yaml")
    values = yaml.safe_load(text)
    values["walltime"] = "12:30:00"
    path.write_text(json.dumps(values) if form == "json" else text)
    config, job = read_file(path)
    assert (job.nodetype, job.nnodes, job.walltime, job.others) == (
        "f_node",
        2,
        "12:30:00",
        {"j": "y"},
    )
    assert (config.arch, config.epoch, config.batchsize, config.loaderjob) == (
        "resnet50",
        10,
        128,
        8,
    )
    assert (config.loadtype, config.iterator, config.optimizer) == (
        "custom", "process", "rmsprop_warmup")  # fmt: skip
    assert (config.resume, config.initmodel, config.test) == (None, None, False)
    assert (config.mean, config.out) == (Path("means/mean.npy"), Path("results"))
    assert config.lists == (Path("train016.txt"), Path("val016.txt"))
    assert config.n_classes == 16


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("epoch: 012", "epoch", 12),
        ("epoch: 09", "epoch", 9),
        ("epoch: 1_000", "epoch", 1000),
        ("epoch: +7", "epoch", 7),
        ("seed: 0x10", "seed", 16),
        ("gpu: 01", "gpu", (1,)),
        ("restarts: [010, 020]\noptimizer: srsgd", "restarts", (10, 20)),
        ("lr: 1e-3", "lr", 0.001),
        ("lr: 1.e-3", "lr", 0.001),
        ("lr_drops: [1e1, 020]", "lr_drops", (10, 20)),
        ("regime: [[01, 1e-2, 5e-4]]", "regime", ((1, 0.01, 0.0005),)),
        ("test: yes", "test", True),
        ("test: on", "test", True),
        ("test: off", "test", False),
        ("average_bn: no", "average_bn", False),
        ("out: 2020-01-01", "out", Path("2020-01-01")),
        ("out: on", "out", Path("on")),
        ("out: 012", "out", Path("012")),
        ("out: 1e-3", "out", Path("1e-3")),
        ("ooc: true\nooc_limit: 1e9", "ooc_limit", "1e9"),
        ("walltime: 1:30:00", "walltime", "1:30:00"),
        ("walltime: 12:30:00", "walltime", "12:30:00"),
        ("others: {j: yes, q: no, n: 010, t: 1:30}", "others", {"j": "yes", "q": "no", "n": "010", "t": "1:30"}),
        ("environment: {A: on, B: 007}", "environment", {"A": "on", "B": "007"}),
        ("jobname: off", "jobname", "off"),
    ],
)  # fmt: skip
def test_yaml_means_what_one_would_expect(tmp_path, text, key, value):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    config, job = read_file(path)
    assert {**config.model_dump(), **job.model_dump()}[key] == value
    provenance.save(config, {}, tmp_path)
    again, _ = read_file(tmp_path / provenance.CONFIG_FILE)
    assert again == config


def test_lists_of_a_number_of_classes():
    assert parse_args(["--nclasses", "8", "-R", "r"]).lists == (
        Path("r/train008.txt"),
        Path("r/val008.txt"),
    )
    assert parse_args(["--nclasses", "1000"]).lists == (Path("train.txt"), Path("val.txt"))
    config = parse_args(["a", "b", "--nclasses", "8"])
    assert (config.lists, config.n_classes) == ((Path("a"), Path("b")), 8)


def test_flags_override_the_file_and_none_takes_back(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(S1)
    config = parse_args(["-c", str(path), "-B", "7", "--communicator", "none", "--optimizer=adam"])
    assert (config.batchsize, config.communicator, config.optimizer) == (7, None, "adam")
    assert config.epoch == 10
    path.write_text("epoch: 3\niteration: 5\ntest: true\naverage-bn: false")
    assert (parse_args(["-c", str(path)]).iteration, parse_args(["-c", str(path)]).test) == (
        5,
        True,
    )
    config = parse_args(["-c", str(path), "-E", "2", "--no-test", "--average-bn"])
    assert (config.epoch, config.iteration, config.test, config.average_bn) == (2, 0, False, True)


def test_s0s_command_line_with_its_lists_last():
    line = (
        "--arch googlenet --insize 2240 --batchsize 4 --iteration 100 --gpu 0 1 2 3 --mean m.npy "
        "--loaderjob 4 --val_batchsize 8 --out o --ooc --root r train.txt val.txt"
    )
    config = parse_args(line.split())
    assert (config.train, config.val) == (Path("train.txt"), Path("val.txt"))
    assert (config.gpu, config.ooc, config.root) == ((0, 1, 2, 3), True, Path("r"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimiser: adam", "there is no key optimiser; did you mean optimizer?; allowed are "),
        ("optimizer: adm", "optimizer: 'adm' is not allowed; did you mean adam?; allowed are "),
        ("communicator: heirarchical", "did you mean hierarchical?"),
        ("nnodetype: f_nod", "nodetype: 'f_nod' is not allowed; did you mean f_node?"),
        ("walltime: 1h", "walltime: '1h' is not a time; allowed is hh:mm:ss"),
        ("batchsize: many", "batchsize: 'many' is not an integer of at least 1"),
        ("batchsize: 1.5", "batchsize: 1.5 is not an integer of at least 1"),
        ("batchsize: true", "batchsize: True is not an integer of at least 1"),
        ("lr: 0", "lr: 0 is not a number of more than 0"),
        ("test: perhaps", "test: 'perhaps' is not allowed; allowed are true and false"),
        ("enlarge: 25x", "enlarge: '25x' is not a size; allowed is WIDTHxHEIGHT"),
        ("arch: nin\narch: alex", "the key arch occurs twice"),
        ("mean: a\nmean.npy: b", "mean and mean.npy are the same key"),
        ("- 1", "must consist of lines `key: value`"),
        ("a: [", "not valid YAML"),
        ("regime: [[1, 0.1]]", "is not a list of rows of a first epoch"),
        ("lr: .inf", "lr: inf is not a finite number"),
        ("lr_drops: [.nan]", "lr_drops: nan is not a finite number"),
        ("seed: 4294967296", "is not an integer of at least 0 and less than 4294967296"),
        ("mean: 3", "mean: 3 is not a path"),
        ("initmodel: true", "initmodel: True is not a path"),
        ("ooc: true\nooc_limit: true", "ooc_limit: True is not text"),
        ('out: ""', "out: is empty; give a value or leave it out"),
        ("walltime: 30", "walltime: 30 is not a time; allowed is hh:mm:ss"),
        ("walltime: 20:00", "walltime: '20:00' is not a time; allowed is hh:mm:ss"),
        ("walltime: 45000", "walltime: 45000 is not a time; allowed is hh:mm:ss"),
        ("epoch: 1:30", "epoch: '1:30' is not an integer of at least 1"),
        ("epoch: 0o17", "epoch: '0o17' is not an integer of at least 1"),
        ("epoch: 0b11", "epoch: '0b11' is not an integer of at least 1"),
        ("epoch: 2020-01-01", "epoch: '2020-01-01' is not an integer of at least 1"),
        ("epoch: yes", "epoch: 'yes' is not an integer of at least 1"),
        ("epoch: !!int 010", "not valid YAML"),
        ("epoch: !!int [1]", "not valid YAML"),
        ("job:\n  yes: 1\n  yes: 2", "the key yes occurs twice"),
        ("others: {a: 1, b: 2, a: 3}", "the key a occurs twice"),
        ("others: {on: 1, 'on': 2}", "the key on occurs twice"),
        ("no: 1", "there is no key no"),
        ("jobname: a b", "jobname: 'a b' is not a name of at most 63 letters, digits and _.+-"),
        ("others: j", "others: 'j' is not a mapping; allowed are lines `key: value`"),
        ("others: {j: true}", 'others: True is not text; put it in quotes, such as "y"'),
        ("others: {m: [1]}", "others: [1] is not one line of printable characters"),
        ("memory: 5", "memory: 5 is not a size such as 200G"),
        pytest.param("{a: " * 5000, "nested too deeply", id="deep"),
    ],
)
def test_errors_of_files_name_the_value_and_what_is_allowed(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as info:
        read_file(path)
    assert message in str(info.value)
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--momentum 0.5 --optimizer adam", "--momentum 0.5: adam has none"),
        ("--beta1 0.5 --optimizer srsgd", "--beta1 0.5: srsgd has none; only adam, radam, adamw"),
        ("--beta2 0.5 --optimizer radam", "--beta2 0.5: radam needs 2/3 or more"),
        ("--lars --optimizer adam", "--lars: only with --optimizer momentum_sgd"),
        ("--lars-coefficient 0.1", "--lars-coefficient 0.1: only with --lars"),
        ("--rmsprop-slope printed", "only with --optimizer rmsprop_warmup"),
        ("--lr-drops 20 10", "--lr-drops 20 10: must increase"),
        ("--lr-drops 20 --lr-schedule cosine", "only with --lr-schedule step"),
        ("--lr-schedule step", "needs --lr-drops"),
        ("--lr-schedule regime", "needs the table `regime`"),
        ("--double-buffering --communicator naive", "only pure_nccl can do it"),
        ("--double-buffering --gpu -1", "needs GPUs"),
        ("--allreduce-dtype float16 --communicator flat", "only pure_nccl can do it"),
        ("--iterator thread", "--iterator thread: needs --loaderjob/-j 1 or more"),
        ("--ooc-host-limit 1GiB", "only with --ooc"),
    ],
)
def test_errors_of_settings_that_exclude_each_other(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags.split())
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_resolved_settings_start_the_same_run(tmp_path):
    for flags in ("", "t v -B 3 --gpu -1 -1 --lr-drops 3 5 --enlarge 64x32 --ooc --ooc-limit 1GiB",
                  "t v --optimizer adam", "--optimizer rmsprop_warmup --rmsprop-slope printed"):  # fmt: skip
        config = parse_args(flags.split())
        provenance.save(config, {}, tmp_path)
        again = parse_args(["--config", str(tmp_path / provenance.CONFIG_FILE)])
        assert again == config


def test_every_network_is_a_choice():
    choices = config_module.messages.choices(Config.model_fields["arch"])
    assert set(choices) == set(models.ARCHS)


def test_removed_communicators_stand_for_what_there_is():
    for name in ("hierarchical", "two_dimensional", "single_node"):
        replacement, line = world.communicator_name(name, use_gpu=False)
        assert replacement == "naive"
        assert line == f"--communicator {name}: ChainerMN 7 has it no more; using naive"
    assert world.communicator_name(None, use_gpu=False) == (None, None)
    with pytest.raises(InputError, match="--communicator flat: works only with GPUs"):
        world.communicator_name("flat", use_gpu=False)


def test_several_ids_start_as_many_ranks_which_share_the_cores(monkeypatch):
    import train

    started = []
    monkeypatch.setattr(os, "execve", lambda *args: started.append(args))
    for name in (*launcher.THREAD_VARIABLES, "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    launcher.limit_threads(os.environ)
    monkeypatch.setattr(launcher, "mpiexec_command", lambda n, argv: ["mpiexec", "-n", str(n)])
    train.start_ranks(resolve({"gpu": [-1, -1, -1]}, None)[0])
    assert started[0][1] == ["mpiexec", "-n", "3"]
    assert "OMP_NUM_THREADS" not in started[0][2]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("IMAGENET_CHOSE_THREADS")
    train.start_ranks(resolve({"gpu": [-1, -1]}, None)[0])
    assert started[1][2]["OMP_NUM_THREADS"] == "5"  # the user's own word
    train.start_ranks(resolve({"gpu": [-1]}, None)[0])
    train.start_ranks(resolve({}, None)[0])
    monkeypatch.setenv("PMI_SIZE", "2")
    train.start_ranks(resolve({"gpu": [-1, -1]}, None)[0])
    assert len(started) == 2
    monkeypatch.delenv("PMI_SIZE")
    monkeypatch.setattr(devices, "n_gpus", lambda: 2)
    train.start_ranks(resolve({"gpu": [0, 1]}, None)[0])
    assert started[2][1] == ["mpiexec", "-n", "2"]
    with pytest.raises(InputError, match="allowed are 0 to 1"):
        train.start_ranks(resolve({"gpu": [1, 2]}, None)[0])
    monkeypatch.setenv(launcher.STARTED, started[2][2][launcher.STARTED])
    with pytest.raises(InputError, match="does not say in its environment"):
        train.start_ranks(resolve({"gpu": [0, 1]}, None)[0])
    monkeypatch.delenv(launcher.STARTED)
    monkeypatch.setattr(launcher, "mpiexec_command", lambda n, argv: None)
    with pytest.raises(InputError, match="needs mpiexec"):
        train.start_ranks(resolve({"gpu": [0, 1]}, None)[0])


def test_half_precision_sums_need_several_ranks():
    with pytest.raises(InputError, match="--allreduce-dtype float16: only with several ranks"):
        world.create_world(None, use_gpu=False, allreduce_dtype="float16")


def test_documentation_has_every_setting_and_no_other():
    docs = Path(__file__).parents[2] / "docs"
    pages = {name: (docs / name).read_text() for name in ("imagenet.md", "recipes.md")}
    options = {
        o for a in config_module.command_line.build_parser()._actions for o in a.option_strings
    }
    for name, field in Config.model_fields.items():
        if not field.json_schema_extra["flag"]:
            continue
        flag = config_module.flag_name(name)
        off = f"--no-{name.replace('_', '-')}"
        assert any(f"`{f}" in page for f in (flag, off) for page in pages.values()), flag
    settings = pages["imagenet.md"].split("## Settings")[1].split("## Results")[0]
    for flag in re.findall(r"`(--[a-z][a-z0-9_-]+)", settings):
        assert flag in options, flag
