"""A Trainer extension: what out-of-core mode does, iteration by iteration, for LogReport and PrintReport."""

from __future__ import annotations

import dataclasses
from typing import Any

from chainer.training import extension

from chainer_ooc.api import Stats, stats

__all__ = ["OutOfCoreReport"]


class OutOfCoreReport(extension.Extension):
    """Reports the figures of out-of-core mode at every iteration.

    ``LogReport`` averages what it is given over its interval, so that its entries are per iteration: under
    ``prefix + name``, with the names of :class:`~chainer_ooc.Stats`, bytes and seconds of copies and stalls, and
    ``stall_seconds``, their sum. ``prefetch_accuracy`` and ``overlap_percent`` are there where they are known.
    ``peak_bytes``, the highest memory measured since the process began, and ``limit_bytes`` are as they stand.

    >>> trainer.extend(chainer_ooc.extensions.OutOfCoreReport())
    >>> trainer.extend(extensions.LogReport())
    >>> trainer.extend(extensions.PrintReport(["iteration", "main/loss", "ooc/bytes_in", "ooc/stall_seconds"]))

    Under ChainerMN each rank reports its own.

    Args:
        prefix: What the names begin with.
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
        """Report what has been done since the last call."""
        now, before = stats(), self._before or stats()
        self._before = now
        still = {"peak_bytes": now.peak_bytes, "limit_bytes": now.limit_bytes}
        changes = {
            field.name: getattr(now, field.name) - getattr(before, field.name)
            for field in dataclasses.fields(Stats)
            if field.name not in still
        }
        done = Stats(**still, **changes)  # type: ignore[arg-type]
        figures = dataclasses.asdict(done)
        for name in ("stall_seconds", "prefetch_accuracy", "overlap_percent"):
            figures[name] = getattr(done, name)
        for name, value in figures.items():
            if value is not None:
                trainer.observation[self._prefix + name] = value
