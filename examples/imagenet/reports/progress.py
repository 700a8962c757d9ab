"""The progress bar, or lines of progress where there is no terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

from chainer import training
from tqdm import tqdm
from training import Stop

from reports import terminal
from reports.figures import Synchronize
from reports.units import gibibytes

LONGEST_SILENCE = 60.0
"""Most seconds between two lines where there is no terminal."""

_BAR_WIDTH = 4
"""The least of the bar that is left when there are many figures."""
_SEPARATOR = "  "


class _Display(Protocol):
    def show(self, n: int, figures: Sequence[str]) -> None: ...

    def close(self) -> None: ...


class _Bar:
    """A bar that stays on the last line of a terminal."""

    def __init__(self, total: int, n: int) -> None:
        self._bar = tqdm(
            file=sys.stdout,
            total=total,
            initial=n,
            unit="it",
            mininterval=0.5,
            ncols=_bar_columns(),
            nrows=24,
            bar_format="{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}",
        )

    def show(self, n: int, figures: Sequence[str]) -> None:
        bar = self._bar
        bar.ncols = _bar_columns()
        times = 2 * len(tqdm.format_interval(bar.format_dict["elapsed"])) + 1
        taken = [f"{n}/{bar.total} ", " " * _BAR_WIDTH, " ", " " * times, ", "]
        bar.postfix = fit(figures, bar.ncols - sum(map(len, taken)))
        bar.update(n - bar.n)

    def close(self) -> None:
        self._bar.refresh()
        self._bar.close()


def _bar_columns() -> int:
    # In the last column the cursor of some terminals goes to the next line.
    return (terminal.columns() or terminal.WIDTH + 1) - 1


class _Lines:
    """Lines for a file, ever rarer until there is one every ``LONGEST_SILENCE`` seconds."""

    def __init__(self, total: int, n: int) -> None:
        self._total = total
        self._from, self._start = n, time.monotonic()
        self._n, self._figures = n, ()
        self._shown = -1
        self._next = self._silence = 0.0

    def show(self, n: int, figures: Sequence[str]) -> None:
        self._n, self._figures = n, tuple(figures)
        now = time.monotonic() - self._start
        if now >= self._next:
            self._print(now)
            self._silence = min(max(1.0, 2 * self._silence), LONGEST_SILENCE)
            self._next = now + self._silence

    def _print(self, elapsed: float) -> None:
        done = self._n - self._from
        left = elapsed / done * (self._total - self._n) if done else None
        remaining = "?" if left is None else tqdm.format_interval(left)
        times = f"{tqdm.format_interval(elapsed)}<{remaining}"
        print(_SEPARATOR.join([f"{self._n}/{self._total}", times, *self._figures]), flush=True)
        self._shown = self._n

    def close(self) -> None:
        if self._shown != self._n:
            self._print(time.monotonic() - self._start)


def fit(parts: Sequence[str], width: int) -> str:
    """Joins as many of ``parts`` as fit into ``width`` columns; the first ones come first."""
    text = ""
    for part in parts:
        longer = text + _SEPARATOR + part if text else part
        if len(longer) <= width:
            text = longer
    return text


class Progress(training.Extension):
    """Progress of the iterations: time left, loss, speed, data, memory and swapped bytes.

    It is on standard output like the table: mpiexec does not keep the order of two streams. On a
    terminal it is a bar with as many of the figures as fit; elsewhere it is lines.

    Args:
        stop: The run's stop trigger.
        iterations_per_epoch: Number of iterations of an epoch.
        figures: Source of speed and memory; None: loss only.
        limit_bytes: Memory limit of a rank; None: in core.
    """

    name = "Progress"

    def __init__(
        self,
        stop: Stop,
        iterations_per_epoch: float,
        figures: Synchronize | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        length, unit = stop.get_training_length()
        self._total = length if unit == "iteration" else math.ceil(length * iterations_per_epoch)
        self._figures = figures
        self._limit = limit_bytes
        self._display: _Display | None = None

    def initialize(self, trainer: training.Trainer) -> None:
        """Starts where the training is."""
        display = _Lines if terminal.columns() is None else _Bar
        self._display = display(self._total, trainer.updater.iteration)

    def __call__(self, trainer: training.Trainer) -> None:
        """Shows the iteration."""
        assert self._display is not None
        loss: Any = trainer.observation["main/loss"]
        self._display.show(trainer.updater.iteration, [f"loss {loss:.3f}", *self._costs()])

    def _costs(self) -> list[str]:
        figures = self._figures
        if figures is None or not figures.step.images or not figures.step.seconds:
            return []
        step = figures.step
        memory = gibibytes(figures.peak_bytes)
        if self._limit is not None:
            limit = gibibytes(self._limit)
            memory = f"{memory.removesuffix(limit[-4:])} of {limit}"  # the unit once
        costs = [
            f"{step.images / step.seconds:.3g} images/s",
            f"peak {memory}",
            f"data {step.data_seconds / step.seconds:.0%}",
        ]
        if step.swapped_bytes:
            costs.insert(2, f"swap {gibibytes(step.swapped_bytes)}/it")
        return costs

    def finalize(self) -> None:
        """Leaves the last state."""
        if self._display is not None:
            self._display.close()
