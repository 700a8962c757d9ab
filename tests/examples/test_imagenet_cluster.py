"""From a configuration to a job script: what it says, and that it runs whatever the paths are."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from imagenet_cli import IMAGENET, find_mpiexec

pytest.importorskip("jinja2")

from cluster import folder, preprocess

CLUSTER = IMAGENET / "cluster"
SCHEDULERS = ("tsubame", "age", "slurm", "pbs", "local")
NASTY = 'it\'s $(touch pwned) `id` "a" b'

S1 = {
    "nodetype": "q_node",
    "nnodes": 3,
    "walltime": "01:20:00",
    "jobname": "job-1",
    "stdout": "$JOB_ID.o.log",
    "stderr": "$JOB_ID.e.log",
    "others": {"j": "y", "m": "abe"},
    "modules": "./modules.sh",
    "nclasses": 16,
    "mean": "mean.npy",
    "arch": "resnet50",
    "epoch": 10,
    "batchsize": 128,
    "loaderjob": 8,
    "out": "results",
    "resume": None,
    "initmodel": None,
    "test": None,
    "communicator": "hierarchical",
    "loadtype": "original",
    "iterator": "process",
    "optimizer": "adam",
}
"""Every key of a TSUBAME job's configuration."""

HERE = {"scheduler": "local", "arch": "nin", "insize": 39, "out": "results"}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder from which jobs are submitted, with a name that a shell must not read."""
    folder = tmp_path / NASTY
    (folder / ".config").mkdir(parents=True)
    for name in ("train.txt", "val.txt", "train016.txt", "val016.txt", "mean.npy"):
        (folder / name).touch()
    (folder / "modules.sh").write_text("MODULES=loaded\n")
    monkeypatch.chdir(folder)
    return folder


def configure(folder: Path, settings: dict, name: str = "config.yaml") -> None:
    text = json.dumps(settings) if name.endswith("json") else yaml.safe_dump(settings)
    (folder / ".config" / name).write_text(text)


def settings_of(scheduler: str, **more: object) -> dict:
    if scheduler == "tsubame":
        return {**S1, **more}
    return {"scheduler": scheduler, "nclasses": 16, "out": "results", **more}


def make(capsys, *args: str) -> str:
    assert preprocess.main(list(args)) == 0
    return capsys.readouterr().out


def directives(script: str, mark: str) -> list[str]:
    head = script.split("\nset -", 1)[0]
    return [line[len(mark) + 1 :] for line in head.splitlines() if line.startswith(mark)]


def test_default_flow_prints_the_path_of_a_script_beside_its_code(site, capsys):
    configure(site, S1)
    printed = make(capsys)
    script = Path(printed.rstrip("\n"))
    assert printed == f"{script}\n"
    assert script.name == "main.sh"
    assert script.parent.parent == site / "results"
    assert re.fullmatch(r"\d{8}-\d{6}", script.parent.name)
    assert os.access(script, os.X_OK)
    assert (script.parent / "config.yaml").read_bytes() == Path(
        site / ".config/config.yaml"
    ).read_bytes()
    code = script.parent / "code"
    for name in ("imagenet/train.py", "imagenet/models/resnet.py", "chainer_ooc/__init__.py",
                 "imagenet/cluster/submit", "imagenet/cluster/templates/base.sh.j2"):  # fmt: skip
        assert (code / name).is_file(), name
    assert not list(code.rglob("__pycache__"))
    assert not (code / "imagenet" / "result").exists()


def test_results_and_data_beside_the_code_are_not_copied(tmp_path):
    trainer, package = tmp_path / "imagenet", tmp_path / "package"
    for name in ("train.py", "cluster/submit", "cluster/runs/1/code/imagenet/train.py", "a.jpg",
                 "data/x.py", ".cache/y.py", "cluster/.config/config.yaml"):  # fmt: skip
        (trainer / name).parent.mkdir(parents=True, exist_ok=True)
        (trainer / name).touch()
    package.mkdir()
    (trainer / "link").symlink_to(tmp_path)
    job = trainer / "cluster" / "runs" / "2"
    job.mkdir()
    folder.copy_code(trainer, package, job)
    copied = sorted(str(p.relative_to(job)) for p in job.rglob("*") if p.is_file())
    assert copied == [
        "code/imagenet/cluster/.config/config.yaml",
        "code/imagenet/cluster/submit",
        "code/imagenet/train.py",
    ]


def test_tsubame_script_says_what_the_configuration_says(site, capsys):
    configure(site, S1)
    script = make(capsys, "--dry-run")
    assert directives(script, "#$") == [
        "-S /bin/bash",
        "-cwd",
        "-l q_node=3",
        "-l h_rt=01:20:00",
        "-N job-1",
        "-o $JOB_ID.o.log",
        "-e $JOB_ID.e.log",
        "-j y",
        "-m abe",
    ]
    assert "mpirun -np 3 --map-by ppr:1:node -x PATH -x LD_LIBRARY_PATH" in script


@pytest.mark.parametrize(
    ("nodetype", "per_node"),
    [("f_node", 4), ("h_node", 2), ("q_node", 1), ("s_gpu", 1), ("node_f", 4), ("node_h", 2),
     ("node_q", 1), ("node_o", 1), ("gpu_1", 1), ("gpu_h", 1)],
)  # fmt: skip
def test_a_rank_for_each_gpu_of_a_node_type(site, capsys, nodetype, per_node):
    configure(site, {**S1, "nodetype": nodetype, "nnodes": 5})
    script = make(capsys, "--dry-run")
    assert f"#$ -l {nodetype}=5\n" in script
    assert f"mpirun -np {5 * per_node} --map-by ppr:{per_node}:node " in script
    # The same file at another site.
    script = make(capsys, "--dry-run", "--scheduler", "slurm")
    assert {f"--ntasks-per-node={per_node}", f"--gpus-per-node={per_node}", "--nodes=5"} <= set(
        directives(script, "#SBATCH")
    )


def test_json_and_other_spellings_give_the_same_script(site, capsys):
    configure(site, S1)
    other = {"nnodetype": "q_node", "mean.npy": "mean.npy", **S1}
    del other["nodetype"], other["mean"]
    configure(site, other, "config.json")
    expected = make(capsys, "--dry-run")
    got = make(capsys, "--dry-run", "--conf", "config.json")
    assert got.replace("config.json", "config.yaml") == expected


def test_slurm_script(site, capsys):
    (site / "log").mkdir()
    configure(
        site,
        settings_of("slurm", nnodes=2, ranks_per_node=4, gpus_per_node=4, cpus_per_rank=8,
                    memory="200G", queue="gpu", group="ab12", walltime="12:00:00",
                    others={"exclusive": None, "mail-type": "END"}, stdout="log/$JOB_ID.txt"),
    )  # fmt: skip
    script = make(capsys, "--dry-run")
    assert directives(script, "#SBATCH") == [
        "--job-name=imagenet", "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=8",
        "--gpus-per-node=4", "--mem=200G", "--time=12:00:00", "--output=log/%j.txt",
        "--error=%j.e.log", "--account=ab12", "--partition=gpu", "--signal=TERM@120",
        "--exclusive", "--mail-type=END",
    ]  # fmt: skip
    assert "srun --mpi=pmix --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 " in script


def test_pbs_script(site, capsys):
    configure(
        site,
        settings_of("pbs", nnodes=2, ranks_per_node=4, gpus_per_node=4, cpus_per_rank=8,
                    memory="200G", queue="gpu", group="ab12", launcher="mpich"),
    )  # fmt: skip
    script = make(capsys, "--dry-run")
    assert directives(script, "#PBS") == [
        "-S /bin/bash", "-N imagenet",
        "-l select=2:ncpus=32:mpiprocs=4:ngpus=4:mem=200GB", "-l place=scatter",
        "-l walltime=02:30:00", "-A ab12", "-q gpu",
    ]  # fmt: skip
    assert "mpiexec -n 8 -ppn 4 " in script


def test_grid_engine_script(site, capsys):
    configure(site, settings_of("age", nnodes=2, ranks_per_node=4, group="p", queue="all.q",
                                parallel_environment="ompi", cpus_per_rank=2))  # fmt: skip
    lines = directives(make(capsys, "--dry-run"), "#$")
    assert {"-pe ompi 16", "-P p", "-q all.q", "-j y"} <= set(lines)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_shells_find_nothing_wrong_with_scripts(site, capsys, scheduler):
    configure(site, settings_of(scheduler, stdout=f"{NASTY}.$JOB_ID"))
    script = Path(make(capsys).rstrip("\n"))
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "--severity=warning", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_script_starts_the_copied_code_with_its_paths_whole(site, capsys, monkeypatch, scheduler):
    """Runs each script, with programs that show what they get in place of Python and MPI."""
    programs = site / "bin"
    programs.mkdir()
    executable(
        programs / "python",
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ['PYTHONPATH'], os.environ.get('GREETING'),"
        "os.getcwd()]))\n",
    )
    for name in ("mpirun", "mpiexec", "srun"):
        executable(
            programs / name, '#!/bin/bash\nwhile [[ $1 != */bin/python ]]; do shift; done\n"$@"\n'
        )
    more = {"python": str(programs / "python"), "environment": {"GREETING": NASTY}}
    if scheduler == "pbs":
        more["stdout"] = f"{NASTY}$JOB_ID.out"
    if scheduler == "local":  # its mpiexec is the one beside the interpreter
        more = {"environment": more["environment"], "ranks_per_node": 2}
        monkeypatch.setattr(sys, "executable", str(programs / "python"))
    configure(site, settings_of(scheduler, **more))
    script = Path(make(capsys).rstrip("\n"))
    done = subprocess.run(
        ["bash", script],
        cwd="/",
        env={"PATH": f"{programs}:{os.environ['PATH']}", "PBS_JOBID": "17.server"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    output = done.stdout
    if scheduler == "pbs":
        assert output == ""
        output = (site / f"{NASTY}17.out").read_text()
    lines = [line for line in output.splitlines() if "train.py" in line]
    arguments, python_path, greeting, cwd = json.loads(lines[0])
    job = script.parent
    assert arguments == [
        f"{job}/code/imagenet/train.py", "--config", f"{job}/config.yaml", "--out", str(job),
    ]  # fmt: skip
    assert python_path == f"{job}/code"
    assert greeting == NASTY
    assert cwd == str(site)
    assert "start: " in output
    assert "exit status 0" in output
    assert not list(site.rglob("pwned"))


def test_dry_run_writes_nothing_and_shows_what_would_be_written(site, capsys):
    configure(site, S1)
    before = sorted(site.rglob("*"))
    shown = make(capsys, "--dry-run")
    assert sorted(site.rglob("*")) == before
    script = Path(make(capsys).rstrip("\n"))
    assert shown.replace("/results/TIME", f"/results/{script.parent.name}") == script.read_text()


def test_null_is_no_file_of_modules(site, capsys):
    configure(site, S1)
    assert f"source {shlex.quote(str(site / 'modules.sh'))}" in make(capsys, "--dry-run")
    configure(site, {**S1, "modules": None})
    assert "source" not in make(capsys, "--dry-run")


def test_nothing_is_overwritten(site, capsys, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "20300101-000000")
    monkeypatch.setattr(preprocess, "copy_code", lambda *folders: None)
    configure(site, S1)
    scripts = [Path(make(capsys).rstrip("\n")) for _ in range(3)]
    assert [s.parent.name[15:] for s in scripts] == ["", "-2", "-3"]
    (site / "job.sh").write_text("mine")
    assert preprocess.main(["--out", "./job.sh"]) == 2
    assert "job.sh: exists already" in capsys.readouterr().err
    assert (site / "job.sh").read_text() == "mine"
    assert make(capsys, "--out", "job.sh") == f"{site}/results/20300101-000000-4/job.sh\n"
    assert make(capsys, "--out", str(site / "other.sh")) == f"{site}/other.sh\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodetype": "g_node"}, "nodetype: 'g_node' is not allowed"),
        ({"nnodes": 0}, "nnodes: 0 is not an integer of at least 1"),
        ({"walltime": "2 hours"}, "walltime: '2 hours' is not a time; allowed is hh:mm:ss"),
        ({"walltime": "00:00:00"}, "walltime: 00:00:00 is no time"),
        ({"stderr": "log/$JOB_ID.e"}, "stderr: log/$JOB_ID.e: there is no folder log; create it"),
        ({"jobname": "a b"}, "jobname: 'a b'"),
        ({"stdout": "a\nrm -rf x"}, "stdout: 'a\\nrm -rf x' is not one line"),
        ({"others": {"l": "x\n#$ -t 1-9"}}, "others"),
        ({"others": {"N": "name"}}, "others: N is not allowed with tsubame; use the key jobname"),
        ({"optimiser": "adam"}, "there is no key optimiser; did you mean optimizer?"),
        ({"optimizer": "sgd"}, "optimizer: 'sgd' is not allowed"),
        ({"modules": "none.sh"}, "modules none.sh: no such file"),
        ({"mean": "none.npy"}, "mean: none.npy: no such file"),
        ({"nclasses": 8}, "train: list file train008.txt: no such file"),
        ({"resume": "gone"}, "resume: gone: no such folder"),
        ({"arch": "googlenet", "insize": 300}, "googlenet takes multiples of 224"),
        ({"ranks_per_node": 2}, "ranks_per_node: not with scheduler tsubame: nodetype says"),
        ({"scheduler": "slurm", "gpus_per_node": 2, "ranks_per_node": 4, "others": {}},
         "ranks_per_node: 4 is more than the 2 GPU(s)"),
        ({"scheduler": "slurm", "launcher": "srun", "others": {"mem": "4G"}}, "use the key memory"),
        ({"scheduler": "pbs", "launcher": "srun", "others": {}},
         "launcher: 'srun' is not allowed with scheduler pbs; allowed are openmpi, mpich"),
        ({"scheduler": "local", "others": {}}, "nnodes: 3 is not allowed with scheduler local"),
        ({"gpu": [0, 1]}, "gpu: GPU ids are the scheduler's matter in a job"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_line_and_nothing_is_written(site, capsys, change, message):
    configure(site, {**S1, **change})
    before = sorted(site.rglob("*"))
    assert preprocess.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("preprocess.py: error: ")
    assert sorted(site.rglob("*")) == before


def test_missing_configuration_says_where_it_was_looked_for(site, capsys):
    assert preprocess.main(["--conf", "none.yaml"]) == 2
    assert ".config/none.yaml" in capsys.readouterr().err


def submit(site: Path, *args: str, **env: str) -> "subprocess.CompletedProcess[str]":
    root = str(IMAGENET.parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [str(CLUSTER / "submit"), *args],
        cwd=site,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
             **env},
        capture_output=True,
        text=True,
        timeout=200,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("scheduler", "command"),
    [
        ("tsubame", ["qsub", "-g", "tga-x"]),
        ("age", ["qsub"]),
        ("slurm", ["sbatch"]),
        ("pbs", ["qsub"]),
    ],
)
def test_submit_hands_the_script_to_the_scheduler(site, scheduler, command):
    programs = site / "bin"
    programs.mkdir()
    executable(programs / command[0], '#!/bin/bash\nprintf "got %q " "${0##*/}" "$@"\n')
    configure(site, settings_of(scheduler, group="tga-x"))
    done = submit(site, PATH=f"{programs}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    path, got = done.stdout.splitlines()
    assert shlex.split(got.replace("got ", "")) == [*command, path]
    assert Path(path).is_file()


def test_submit_without_the_scheduler_is_an_error_and_writes_nothing(site):
    configure(site, S1)
    programs = site / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "readlink"):
        (programs / name).symlink_to(shutil.which(name))
    done = submit(site, PATH=str(programs))
    assert done.returncode == 2
    assert "there is no qsub on this machine" in done.stderr
    assert not (site / "results").exists()


@pytest.mark.slow
@pytest.mark.mpi
def test_job_that_runs_here_trains_and_leaves_its_results(site):
    configure(site, {**HERE, "ranks_per_node": 2, "gpu": -1, "iteration": 1, "batchsize": 4,
                     "val_batchsize": 200})  # fmt: skip
    assert find_mpiexec() is not None
    done = submit(site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks" in done.stdout
    assert "exit status 0" in done.stdout
    (job,) = (site / "results").iterdir()
    assert json.loads((job / "summary.json").read_text())["ranks"] == 2
    assert not list(site.rglob("pwned"))
