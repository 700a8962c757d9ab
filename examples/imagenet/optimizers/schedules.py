"""Learning rate and weight decay as functions of how far the training is.

They are set before each update from the epoch alone, so a run that continues has the rates of one
that was never stopped.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

Schedule = Callable[[float, float], float]
"""From the epoch (from 0, fractional) and the part done (0 to 1) to a factor or a value."""

REFERENCE_BATCH = 256
"""Images per iteration that a learning rate is for under the linear scaling rule."""


def scaled(lr: float, images: int) -> float:
    """Returns the learning rate for iterations of ``images`` images (all ranks together).

    The linear scaling rule: 0.1 for 256 images is 0.1 * images / 256 (Goyal et al. 2017,
    arXiv:1706.02677).
    """
    return lr * images / REFERENCE_BATCH


def constant(epoch: float, done: float) -> float:
    """The factor 1."""
    return 1.0


def step(drops: Sequence[float], gamma: float) -> Schedule:
    """The factor is multiplied by ``gamma`` at each of the epochs ``drops``."""
    return lambda epoch, done: gamma ** bisect.bisect_right(drops, epoch)


def slow_start(epoch: float, done: float) -> float:
    """The factors of Akiba et al. 2017 (arXiv:1711.04325), made for 90 epochs.

    0.5 for 40 epochs, 0.075 for 30, 0.01 for 15, 0.001 for the last 5.
    """
    return (0.5, 0.075, 0.01, 0.001)[bisect.bisect_right((40, 70, 85), epoch)]


def polynomial(power: float) -> Schedule:
    """The factor ``(1 - done)**power``."""
    return lambda epoch, done: (1 - min(done, 1.0)) ** power


def cosine(epoch: float, done: float) -> float:
    """Half a wave from 1 to 0 (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def with_warmup(schedule: Schedule, epochs: float, start: float) -> Schedule:
    """The factor grows linearly from ``start`` to the schedule's in the first ``epochs``.

    With the linear scaling rule ``start`` is that of 256 images (Goyal et al. 2017).
    """

    def factor(epoch: float, done: float) -> float:
        target = schedule(epoch, done)
        if epoch >= epochs:
            return target
        return start + (target - start) * epoch / epochs

    return factor


class Regime:
    """Rows of first epoch (counted from 1), learning rate and weight decay, one after another."""

    def __init__(self, rows: Sequence[tuple[int, float, float]]) -> None:
        self._starts = [row[0] for row in rows]
        self._rows = rows

    def __call__(self, epoch: float) -> tuple[float, float]:
        """Returns learning rate and weight decay at an epoch (from 0, fractional)."""
        row = bisect.bisect_right(self._starts, math.floor(epoch) + 1) - 1
        return self._rows[row][1], self._rows[row][2]
