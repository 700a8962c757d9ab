"""Trainer extensions: figures of out-of-core mode for LogReport and PrintReport; one plan for all ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

from chainer.training import extension

from chainer_ooc.graph import agreement
from chainer_ooc.statistics import Stats, stats
from chainer_ooc.swap.transfers import Counters

__all__ = ["AgreeOnPlans", "OutOfCoreReport"]

#: The first plans are made before the third iteration, and again before the sixth.
_FIRST = 4


class AgreeOnPlans(extension.Extension):
    """Make all ranks of a ChainerMN run follow rank 0's plans.

    Without it each rank plans for itself, from its own times. Ranks then move different arrays at different
    times, and each update waits for the slowest. With this extension on all ranks, a rank follows rank 0's
    plan if it has the same graph, arrays and limit; otherwise it keeps its own. The call is collective
    after the iterations 4, 8, 16, 32 and so on, and does nothing after others.

    >>> comm = chainermn.create_communicator("pure_nccl")
    >>> trainer.extend(chainer_ooc.extensions.AgreeOnPlans(comm))

    Args:
        communicator: The run's ChainerMN communicator.
    """

    trigger = (1, "iteration")
    priority = extension.PRIORITY_READER

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator

    def __call__(self, trainer: Any) -> None:
        """Take over rank 0's plans, in the iterations for that."""
        iteration = trainer.updater.iteration
        if iteration >= _FIRST and iteration & (iteration - 1) == 0:
            mine = agreement.offers() if self._communicator.rank == 0 else None
            agreement.follow(self._communicator.bcast_obj(mine))


class OutOfCoreReport(extension.Extension):
    """Report the figures of out-of-core mode at every iteration.

    ``LogReport`` averages its values over an interval, so its entries are per iteration. Their names are
    ``prefix`` plus the names of :class:`~chainer_ooc.Stats`: bytes and seconds of copies and stalls, and
    ``stall_seconds``, their sum. ``prefetch_accuracy`` and ``overlap_percent`` are present if they are
    known. ``peak_bytes`` (the highest memory since the process began) and the limits are current values.

    >>> trainer.extend(chainer_ooc.extensions.OutOfCoreReport())
    >>> trainer.extend(extensions.LogReport())
    >>> trainer.extend(extensions.PrintReport(["iteration", "main/loss", "ooc/bytes_in", "ooc/stall_seconds"]))

    Under ChainerMN each rank reports its own.

    Args:
        prefix: The beginning of the names.
    """

    trigger = (1, "iteration")
    priority = extension.PRIORITY_WRITER

    def __init__(self, prefix: str = "ooc/") -> None:
        self._prefix = prefix
        self._before: Stats | None = None

    def initialize(self, trainer: Any) -> None:
        """Begin to count."""
        self._before = stats()

    def __call__(self, trainer: Any) -> None:
        """Report the figures since the last call."""
        now, before = stats(), self._before or stats()
        self._before = now
        changes = {
            field.name: getattr(now, field.name) - getattr(before, field.name)
            for field in dataclasses.fields(Counters)
        }
        done = dataclasses.replace(now, **changes)
        figures = dataclasses.asdict(done)
        for name in ("stall_seconds", "prefetch_accuracy", "overlap_percent"):
            figures[name] = getattr(done, name)
        for name, value in figures.items():
            if value is not None:
                trainer.observation[self._prefix + name] = value
