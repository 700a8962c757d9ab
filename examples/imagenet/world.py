"""The ranks of a run, and how they come to the same decision.

One rank alone, without MPI, has the same methods, so the trainer has one path for both.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import launcher
import numpy
from config.checks import REMOVED_COMMUNICATORS
from errors import InputError

from chainer_ooc.compat.communicators import current_name

#: A launcher has read what a rank wrote so long ago (seconds). MPICH's drops what it has not read when a rank aborts.
FORWARDED = 0.5

POLL = 0.05
"""Most seconds between two looks of a rank that sleeps."""

LONGEST_ABORT = 5
"""Seconds that MPI gets to end all ranks."""


class World:
    """All ranks of this run.

    Args:
        comm: ChainerMN communicator, or None for a process alone.

    Attributes:
        rank: This process, from 0.
        size: Number of ranks.
        intra_rank: This process among those on the same machine, from 0.
    """

    def __init__(self, comm: Any = None) -> None:
        self.comm = comm
        self.rank: int = comm.rank if comm else 0
        self.size: int = comm.size if comm else 1
        self.intra_rank: int = comm.intra_rank if comm else 0
        self.intra_size: int = comm.intra_size if comm else 1

    def sum(self, values: Sequence[float]) -> numpy.ndarray:
        """Returns the sums over all ranks, float64. Collective."""
        return self._allreduce(values, "SUM")

    def max(self, values: Sequence[float]) -> numpy.ndarray:
        """Returns the maxima over all ranks, float64. Collective."""
        return self._allreduce(values, "MAX")

    def _allreduce(self, values: Sequence[float], op: str) -> numpy.ndarray:
        mine = numpy.array(values, dtype=numpy.float64)
        if self.comm is None:
            return mine
        from mpi4py import MPI

        total = numpy.empty_like(mine)
        self.comm.mpi_comm.Allreduce(mine, total, getattr(MPI, op))
        return total

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's ``value`` on every rank. Collective."""
        return value if self.comm is None else self.comm.mpi_comm.bcast(value)

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, on every rank. Collective."""
        return [value] if self.comm is None else self.comm.mpi_comm.allgather(value)

    def barrier(self) -> None:
        """Waits for all ranks. Collective."""
        if self.comm is not None:
            self.comm.mpi_comm.Barrier()

    @contextmanager
    def others_wait(self) -> Iterator[bool]:
        """Says whether this is rank 0; the others wait for the end of its block, and sleep. Collective.

        MPI's own waiting, also when a rank ends, takes a core that rank 0 may need.
        """
        try:
            yield self.rank == 0
        finally:
            self.sleep_until_all_are_here()

    def sleep_until_all_are_here(self) -> None:
        """Waits for all ranks without taking a core from those that still work. Collective."""
        if self.comm is None:
            return
        request = self.comm.mpi_comm.Ibarrier()
        pause = POLL / 64
        while not request.Test():
            time.sleep(pause)
            pause = min(2 * pause, POLL)

    def agree(self, error: str | None) -> None:
        """Raises the same InputError on every rank when any rank has an error. Collective."""
        if self.max([error is not None])[0]:
            raise InputError(next(e for e in self.gather(error) if e is not None))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Lets an InputError on one rank end the block with that error on every rank.

        The block must not communicate: a rank that fails leaves it early. Ranks that have come to its
        end sleep until the last one has.
        """
        error = None
        try:
            yield
        except InputError as e:
            error = str(e)
        self.sleep_until_all_are_here()
        self.agree(error)


def abort(status: int) -> None:
    """Ends all ranks at once with this exit status; does nothing without MPI."""
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads any more
                stream.flush()
        time.sleep(FORWARDED)
        MPI.COMM_WORLD.Abort(status)


def end_at_once(number: int) -> None:
    """Ends all ranks because of a signal, with status 128 + ``number``, whatever other threads are doing."""
    signal.alarm(LONGEST_ABORT)  # its default action ends the process even if MPI does not return
    try:
        if launcher.rank() == 0:
            os.write(2, b"train.py: interrupted\n")
        abort(128 + number)
    finally:
        os._exit(128 + number)


def communicator_name(requested: str | None, use_gpu: bool) -> tuple[str | None, str | None]:
    """Returns which ChainerMN communicator to create.

    Args:
        requested: ``--communicator``; None: ``pure_nccl`` with GPUs, else ``naive``. A name that
            ChainerMN 7 removed stands for what there is instead.
        use_gpu: Whether the ranks train on GPUs.

    Returns:
        The name (None when none was requested), and a line that says what replaces a removed name.

    Raises:
        InputError: The communicator needs GPUs.
    """
    if requested in REMOVED_COMMUNICATORS:
        with warnings.catch_warnings(action="ignore"):
            name = current_name(requested) if use_gpu else "naive"
        return name, f"--communicator {requested}: ChainerMN 7 has it no more; using {name}"
    if not use_gpu and requested not in (None, "naive"):
        raise InputError(
            f"--communicator {requested}: works only with GPUs; use naive or leave it out"
        )
    return requested, None


def create_world(
    communicator: str | None,
    use_gpu: bool,
    frees_memory: bool = False,
    allreduce_dtype: str | None = None,
) -> World:
    """Joins the ranks that were started together.

    Args:
        communicator: Name of a ChainerMN communicator as ``communicator_name`` returns it.
        use_gpu: Whether the ranks train on GPUs.
        frees_memory: Whether the run counts on freed host memory going back to the system.
        allreduce_dtype: Precision in which gradients are summed, only with ``pure_nccl``.

    Raises:
        InputError: mpi4py is missing or belongs to another MPI, or the communicator cannot do
            what is asked of it.
    """
    started = launcher.world_size()
    if started == 1 and communicator is None:
        if allreduce_dtype is not None:
            raise InputError(
                f"--allreduce-dtype {allreduce_dtype}: only with several ranks; use mpiexec"
            )
        return World()
    if frees_memory:
        # UCX, the transport of many MPI builds, intercepts the calls that give memory back, and
        # the resident set of a run out of core then grows by megabytes with every iteration.
        # It does so for its cache of memory registered with network cards, and works without.
        os.environ.setdefault("UCX_MEM_EVENTS", "no")
    try:
        import mpi4py.MPI  # noqa: F401
    except (ImportError, RuntimeError) as e:
        raise InputError(
            f"MPI: mpi4py cannot be used ({' '.join(str(e).split())}); "
            f"run `pip install mpi4py mpich`"
        ) from e
    import chainermn

    name = communicator or ("pure_nccl" if use_gpu else "naive")
    options: dict[str, Any] = {}
    if allreduce_dtype is not None and name == "pure_nccl":
        options["allreduce_grad_dtype"] = numpy.dtype(allreduce_dtype)
    elif allreduce_dtype == "float16":
        raise InputError(f"--allreduce-dtype float16: only pure_nccl can do it, not {name}")
    comm = chainermn.create_communicator(name, **options)
    if comm.size != started:
        raise InputError(
            f"MPI: the launcher started {started} ranks, but mpi4py sees {comm.size}; "
            f"use the mpiexec of the MPI that mpi4py was built for"
        )
    _end_all_ranks_with_one(comm.rank)
    return World(comm)


def _end_all_ranks_with_one(rank: int) -> None:
    """Lets an exception in one rank end them all: the others would wait for it."""
    show = sys.excepthook

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            show(kind, error, trace)
            print(f"train.py: rank {rank} failed; all ranks end", file=sys.stderr)
        finally:
            abort(1)

    sys.excepthook = end
