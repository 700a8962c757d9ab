"""How this process was started: which MPI rank it is and how many threads it may use.

Only the standard library is imported here, because the number of threads must be in the
environment before NumPy loads its BLAS.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from types import FrameType

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user may already have said how many threads to use."""

STARTED = "IMAGENET_STARTED_RANKS"
"""Variable that says that this script has started this process as one of several ranks."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a run to end: Ctrl-C, and those that batch systems send before they kill."""

_CHOSEN = "IMAGENET_CHOSE_THREADS"  # says that limit_threads, not the user, has set them

# Hydra (MPICH, Intel MPI), Open MPI, MVAPICH2, and Slurm's srun.
_SIZE = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_SIZE = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")


def _first_int(names: Sequence[str], environ: Mapping[str, str]) -> int | None:
    for name in names:
        value = environ.get(name, "")
        if value.isdigit():
            return int(value)
    return None


def _under_srun(environ: Mapping[str, str]) -> bool:
    # Inside `sbatch` the SLURM_* variables of the job are set for a plain python as well;
    # SLURM_PROCID with more than one task in the *step* means that srun started this process.
    return "SLURM_PROCID" in environ and environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Returns the number of MPI ranks that were started together (1: no MPI launcher)."""
    size = _first_int(_SIZE, environ)
    if size is None and _under_srun(environ):
        size = _first_int(("SLURM_STEP_NUM_TASKS",), environ)
    return size or 1


def rank(environ: Mapping[str, str] = os.environ) -> int:
    """Returns this process's MPI rank as the launcher says it (0 without a launcher)."""
    value = _first_int(_RANK, environ)
    if value is None and _under_srun(environ):
        value = _first_int(("SLURM_PROCID",), environ)
    return value or 0


def local_size(environ: Mapping[str, str] = os.environ) -> int:
    """Returns the number of ranks on this machine, as far as the launcher tells.

    A launcher that names only the size of the whole world is taken to have started
    everything here: too few threads are slow, too many are slower.
    """
    value = _first_int(_LOCAL_SIZE, environ)
    if value is None and _under_srun(environ):
        # "4(x2),3": nodes with 4, 4 and 3 tasks; which of them this one is does not matter much.
        counts = re.findall(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        value = max((int(count) for count in counts), default=None)
    return value or world_size(environ)


def usable_cores() -> int:
    """Returns the number of cores this process may use: its affinity and its cgroup's quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this operating system
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def threads(environ: Mapping[str, str] = os.environ) -> int:
    """Returns the number of threads that the environment gives this process's BLAS."""
    return _first_int(THREAD_VARIABLES, environ) or usable_cores()


def limit_threads(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets OMP_NUM_THREADS to this rank's share of the cores unless the user has set threads.

    Must run before NumPy is imported. Oversubscribed BLAS threads are several times slower.
    """
    if not _first_int(THREAD_VARIABLES, environ):
        environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // local_size(environ)))
        environ[_CHOSEN] = environ["OMP_NUM_THREADS"]


def environment_of_ranks(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the environment for ranks that this process starts: they share the cores anew."""
    ranks = without_mpi(environ)
    if ranks.pop(_CHOSEN, None) is not None:
        del ranks["OMP_NUM_THREADS"]
    ranks[STARTED] = "1"
    return ranks


def exit_on_interrupt(message: str | None) -> None:
    """Lets Ctrl-C end this process at once, with one line of rank 0 and no traceback.

    For the seconds in which modules are imported, when nothing needs to be tidied up.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        if message and rank() == 0:
            os.write(2, f"{message}\n".encode())
        os._exit(128 + number)

    signal.signal(signal.SIGINT, leave)


def without_mpi(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the environment without what would make a child process join this MPI job."""
    prefixes = ("PMI_", "PMIX_", "OMPI_", "MV2_", "HYDI_", "HYDRA_", "MPI_LOCAL", "PRTE_")
    return {k: v for k, v in environ.items() if not k.startswith(prefixes)}


def mpiexec_command(n: int, argv: Sequence[str]) -> list[str] | None:
    """Returns the command that starts this script ``n`` times, or None without an mpiexec."""
    beside = Path(sys.executable).parent / "mpiexec"
    program = str(beside) if beside.exists() else shutil.which("mpiexec")
    if program is None:
        return None
    return [program, "-n", str(n), sys.executable, *argv]
