"""Real schedulers on this machine, for as long as a test needs them."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

GRID_ENGINE_TOOLS = Path("/usr/lib/gridengine")
GRID_ENGINE_DEFAULTS = Path("/usr/share/gridengine")


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _need(*programs: str) -> None:
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [p for p in programs if shutil.which(p, path=path) is None]
    if missing:
        pytest.skip(f"not installed: {' '.join(missing)}")


@contextlib.contextmanager
def _daemon(command: list[str], log: Path, env: dict[str, str]) -> Iterator[None]:
    path = env["PATH"] + ":/usr/sbin:/sbin"
    program = shutil.which(command[0], path=path)
    with open(log, "wb") as f:
        process = subprocess.Popen(
            [program, *command[1:]], stdout=f, stderr=f, env={**env, "PATH": path}
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(command: list[str], text: str, env: dict[str, str], logs: Path) -> None:
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
        if done.returncode == 0 and text in done.stdout:
            return
        time.sleep(0.2)
    output = "\n".join(f.read_text(errors="replace")[-2000:] for f in logs.glob("*.log"))
    pytest.skip(f"{command[0]}: the scheduler does not start on this machine\n{output}")


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Runs Slurm's controller and one node: this machine, and 32 with four GPUs on paper.

    Returns:
        The environment in which its commands find it.
    """
    _need("slurmctld", "slurmd", "sbatch", "srun", "sinfo")
    (controller, node), host = _free_ports(2), socket.gethostname().split(".")[0]
    user, cores = getpass.getuser(), os.cpu_count()
    folder.mkdir()
    (folder / "slurm.conf").write_text(
        f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=1000 State=UNKNOWN
NodeName=gpu[1-32] NodeAddr=127.0.0.1 CPUs=64 RealMemory=512000 Gres=gpu:4 State=CLOUD
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with (
        _daemon(["slurmctld", "-D"], folder / "slurmctld.log", env),
        _daemon(["slurmd", "-D", "-N", host], folder / "slurmd.log", env),
    ):
        _wait(["sinfo", "-h", "-t", "idle", "-o", "%n"], host, env, folder)
        yield env


@contextlib.contextmanager
def grid_engine(folder: Path) -> Iterator[dict[str, str]]:
    """Runs Grid Engine's master, which ``qsub -verify`` asks.

    Returns:
        The environment in which its commands find it.
    """
    _need("sge_qmaster", "qsub", "qconf")
    common = folder / "default" / "common"
    common.mkdir(parents=True)
    (folder / "default" / "spool" / "qmaster").mkdir(parents=True)
    (folder / "spooldb").mkdir()
    (common / "bootstrap").write_text(
        f"""Version: 6.2
admin_user none
default_domain none
ignore_fqdn false
spooling_method berkeleydb
spooling_lib libspoolb
spooling_params {folder}/spooldb
binary_path /usr/sbin
qmaster_spool_dir {folder}/default/spool/qmaster
security_mode none
listener_threads 2
worker_threads 2
scheduler_threads 1
"""
    )
    host = socket.gethostname()
    (common / "act_qmaster").write_text(host + "\n")
    (common / "host_aliases").write_text(f"localhost {host}\n")
    master, execution = _free_ports(2)
    env = {
        **os.environ,
        "SGE_ROOT": str(folder),
        "SGE_CELL": "default",
        "SGE_QMASTER_PORT": str(master),
        "SGE_EXECD_PORT": str(execution),
        "SGE_ND": "1",
    }
    spool, resources = GRID_ENGINE_TOOLS / "spooldefaults", GRID_ENGINE_DEFAULTS / "util/resources"
    for command in (
        [GRID_ENGINE_TOOLS / "spoolinit", "berkeleydb", "libspoolb", folder / "spooldb", "init"],
        [spool, "configuration", GRID_ENGINE_DEFAULTS / "default-configuration"],
        [spool, "complexes", resources / "centry"],
        [spool, "usersets", resources / "usersets"],
        [spool, "managers", getpass.getuser()],
    ):
        done = subprocess.run([*map(str, command)], env=env, capture_output=True, timeout=30)
        if done.returncode:
            pytest.skip(f"Grid Engine cannot be set up here: {done.stderr.decode()[-500:]}")
    with _daemon(["sge_qmaster"], folder / "qmaster.log", env):
        _wait(["qconf", "-sm"], getpass.getuser(), env, folder)
        subprocess.run(["qconf", "-as", "localhost"], env=env, capture_output=True, timeout=30)
        subprocess.run(["qconf", "-as", host], env=env, capture_output=True, timeout=30)
        yield env
