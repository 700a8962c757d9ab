"""Job scripts as real schedulers read them: Slurm and Grid Engine, run on this machine."""

import json
import re
import subprocess
import time

import pytest
import yaml
from cluster_daemons import grid_engine, slurm
from imagenet_cli import IMAGENET

pytest.importorskip("jinja2")

from cluster import preprocess

pytestmark = pytest.mark.slow


@pytest.fixture
def job(tmp_path, monkeypatch, capsys):
    """Returns a function that makes a job script in a folder with a space in its name."""
    folder = tmp_path / "a site"
    (folder / ".config").mkdir(parents=True)
    monkeypatch.chdir(folder)

    def make(**settings):
        (folder / ".config" / "config.yaml").write_text(yaml.safe_dump(settings))
        assert preprocess.main([]) == 0
        return capsys.readouterr().out.rstrip("\n")

    return make


SMALL = {"arch": "nin", "insize": 39, "iteration": 1, "batchsize": 4, "val_batchsize": 200}


def test_slurm_takes_the_scripts_and_runs_one(job, tmp_path, monkeypatch):
    with slurm(tmp_path / "slurm") as env:
        env["PYTHONPATH"] = str(IMAGENET.parents[1])

        def sbatch(*args):
            return subprocess.run(
                ["sbatch", *args], env=env, capture_output=True, text=True, timeout=120
            )

        # Eight nodes of four GPUs, which are there on paper.
        script = job(scheduler="slurm", nnodes=8, ranks_per_node=4, gpus_per_node=4,
                     cpus_per_rank=8, memory="200G", **SMALL)  # fmt: skip
        done = sbatch("--test-only", script)
        assert done.returncode == 0, done.stderr
        assert re.search(r"to start at \S+ using 256 processors on nodes gpu\[1-8\]", done.stderr)
        # The controller does check: there are 32 nodes, and four GPUs on each.
        script = job(scheduler="slurm", nnodes=40, ranks_per_node=4, gpus_per_node=4, **SMALL)
        assert sbatch("--test-only", script).returncode != 0
        script = job(scheduler="slurm", ranks_per_node=8, gpus_per_node=8, **SMALL)
        assert sbatch("--test-only", script).returncode != 0

        script = job(scheduler="slurm", ranks_per_node=2, gpu=-1, srun_mpi="pmi2", out="the results",
                     stdout="log of $JOB_ID", environment={"OMP_NUM_THREADS": 1}, **SMALL)  # fmt: skip
        done = sbatch("--wait", script)
        number = re.search(r"Submitted batch job (\d+)", done.stdout)[1]
        folder = tmp_path / "a site"
        log = (folder / f"log of {number}").read_text()
        assert done.returncode == 0, log + (folder / f"{number}.e.log").read_text()
        assert f"start: {time.strftime('%Y')}" in log
        assert f"job {number} on" in log
        assert "exit status 0" in log
        assert "2 ranks" in log
        results = list((folder / "the results").glob("*/summary.json"))
        assert [json.loads(path.read_text())["ranks"] for path in results] == [2]


def test_grid_engine_reads_the_directives(job, tmp_path):
    with grid_engine(tmp_path / "sge") as env:

        def verify(script):
            done = subprocess.run(
                ["qsub", "-verify", script], env=env, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, done.stdout + done.stderr
            lines = (line.partition(":") for line in done.stdout.splitlines())
            return {name: value.strip() for name, _, value in lines}

        said = verify(job(scheduler="tsubame", nodetype="f_node", nnodes=4, walltime="12:00:00",
                          jobname="big-job", stdout="log of $JOB_ID", modules=None,
                          others={"j": "y", "p": -5}, **SMALL))  # fmt: skip
        assert said["hard resource_list"] == "f_node=4,h_rt=12:00:00"
        assert said["job_name"] == "big-job"
        assert said["stdout_path_list"] == "NONE:NONE:log of $JOB_ID"
        assert said["merge"] == "y"
        assert said["priority"] == "-5"
        assert said["cwd"] == str(tmp_path / "a site")
        said = verify(job(scheduler="age", nnodes=2, ranks_per_node=4, **SMALL))
        assert said["parallel environment"].split()[:1] == ["mpi"]
        assert "8" in said["parallel environment"]
