"""How this process was started: which MPI rank it is and how many threads it may use.

Nothing here imports NumPy: the number of threads must be in the environment before it loads its BLAS.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from types import FrameType

from chainer_ooc.swap.system.ranks import first_number, rank, ranks_of_this_node, world_size

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user may already have said how many threads to use."""

STARTED = "IMAGENET_STARTED_RANKS"
"""Variable that says that this script has started this process as one of several ranks."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a run to end: Ctrl-C, and those that batch systems send before they kill."""

_CHOSEN = "IMAGENET_CHOSE_THREADS"  # says that limit_threads, not the user, has set them


def local_size(environ: Mapping[str, str] = os.environ) -> int:
    """Returns the number of ranks on this machine, as far as the launcher tells.

    A launcher that names only the size of the whole world is taken to have started
    everything here: too few threads are slow, too many are slower.
    """
    return ranks_of_this_node(environ, unknown=world_size(environ))


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
    return first_number(environ, *THREAD_VARIABLES) or usable_cores()


def limit_threads(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets OMP_NUM_THREADS to this rank's share of the cores unless the user has set threads.

    Must run before NumPy is imported. Oversubscribed BLAS threads are several times slower.
    """
    if not first_number(environ, *THREAD_VARIABLES):
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
    prefixes = ("PMI_", "PMIX_", "OMPI_", "MV2_", "HYDI_", "HYDRA_", "MPI_LOCAL", "PALS_", "PRTE_")
    return {k: v for k, v in environ.items() if not k.startswith(prefixes)}


def mpiexec_command(n: int, argv: Sequence[str]) -> list[str] | None:
    """Returns the command that starts this script ``n`` times, or None without an mpiexec."""
    beside = Path(sys.executable).parent / "mpiexec"
    program = str(beside) if beside.exists() else shutil.which("mpiexec")
    if program is None:
        return None
    return [program, "-n", str(n), sys.executable, *argv]
