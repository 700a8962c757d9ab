"""The command line's names and defaults, and what is read from the launchers' environments."""

from pathlib import Path

import launcher
import pytest
from config import parse_args

from tests.swap.test_ranks import LAUNCHERS


def test_the_ranks_of_a_launcher_that_tells_only_their_number_are_taken_to_be_here():
    assert launcher.local_size({"PMI_RANK": "3", "PMI_SIZE": "8"}) == 8
    assert launcher.local_size({"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALNRANKS": "4"}) == 4
    assert launcher.local_size({}) == 1


@pytest.mark.parametrize("environ", LAUNCHERS)
def test_a_child_without_mpi_is_no_rank(environ):
    environ = launcher.without_mpi(environ)
    assert (launcher.rank(environ), launcher.world_size(environ)) == (0, 1)
    assert launcher.local_size(environ) == 1


def test_the_number_of_threads_is_set_before_numpy_is_loaded(run_python):
    code = "import sys, launcher; launcher.limit_threads(); print('numpy' in sys.modules)"
    path = Path(launcher.__file__).parent
    assert run_python("-c", code, env={"PYTHONPATH": str(path)}).stdout == "False\n"


def test_threads_are_the_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(launcher, "usable_cores", lambda: 8)
    environ = {"PMI_SIZE": "4", "MPI_LOCALNRANKS": "3"}
    launcher.limit_threads(environ)
    assert environ["OMP_NUM_THREADS"] == "2"
    environ = {"PMI_SIZE": "16", "MPI_LOCALNRANKS": "16"}
    launcher.limit_threads(environ)
    assert environ["OMP_NUM_THREADS"] == "1"
    environ = {"OPENBLAS_NUM_THREADS": "5"}
    launcher.limit_threads(environ)
    assert environ == {"OPENBLAS_NUM_THREADS": "5"}


def test_defaults_for_lists():
    config = parse_args(["t.txt", "v.txt"])
    assert (config.arch, config.insize, config.batchsize, config.epoch, config.iteration) == (
        "nin",
        224,
        32,
        10,
        0,
    )
    assert (config.val_batchsize, str(config.mean), str(config.out)) == (250, "mean.npy", "result")
    assert config.n_classes == 1000
    assert not config.digits


def test_every_flag_in_its_short_and_long_form():
    short = """t.txt v.txt -a googlenet -is 448 -B 3 -E 4 -i 5 --initmodel m -j 2 -m x.npy -r s
        -o o -R r -b 7 --ooc --ooc-limit 8GiB --test -d -g 2 1 --communicator flat --seed 9"""
    long = """t.txt v.txt --arch googlenet --insize 448 --batchsize 3 --epoch 4 --iteration 5
        --initmodel m --loaderjob 2 --mean x.npy --resume s --out o --root r --val_batchsize 7
        --ooc --ooc-limit 8GiB --test --debug --gpu 2 1 --communicator flat --seed 9"""
    config = parse_args(short.split())
    assert config == parse_args(long.split())
    assert (config.insize, config.iteration, config.gpu) == (448, 5, (2, 1))


def test_asking_for_epochs_overrides_the_digits_iterations():
    assert parse_args([]).iteration > 0
    assert parse_args(["-E", "2"]).iteration == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["t.txt"], "give both list files"),
        (["-a", "resnet5"], "'resnet5' is not allowed; did you mean resnet50?; allowed are alex,"),
        (["-B", "0"], "'0' is not an integer of at least 1"),
        (["--insize", "big"], "'big' is not an integer of at least 1"),
        (["--ooc-limit", "1GiB"], "only with --ooc"),
        (["-g", "0", "0"], "--gpu 0 0: give different GPU ids"),
        (["-g", "-1", "0"], "--gpu -1 0: give different GPU ids"),
        (["-g", "x"], "--gpu: 'x' is not an integer of at least -1"),
        (["--batchsiz", "3"], "unrecognized arguments: --batchsiz; did you mean --batchsize?"),
        (["t.txt", "v.txt", "w.txt"], "w.txt: more than two list files"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(argv, message, capsys, monkeypatch):
    monkeypatch.delenv("PMI_RANK", raising=False)
    with pytest.raises(SystemExit) as info:
        parse_args(argv)
    assert info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    monkeypatch.setenv("PMI_RANK", "1")  # the other ranks are silent
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert capsys.readouterr().err == ""
