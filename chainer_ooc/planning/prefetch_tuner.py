"""Tune a plan between iterations: measured waits move the begin of each copy in."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from chainer_ooc.planning.plan import Plan

__all__ = ["IterationTimes", "PrefetchTuner"]

#: Shares of the step time: the least wait that counts, and the slack that copies keep.
TOLERANCE, SPARE = 2e-4, 5e-3


class IterationTimes(Protocol):
    """The measured times of an iteration; a :class:`~chainer_ooc.planning.timeline.Timeline` has them."""

    @property
    def seconds(self) -> float:
        """The step time."""

    @property
    def waits(self) -> Mapping[int, float]:
        """The seconds that computation waited for each storage to come in."""

    @property
    def slack(self) -> Mapping[int, float]:
        """The seconds between each storage's arrival and its use."""

    @property
    def starts(self) -> Sequence[float]:
        """The start of each step (seconds)."""


class PrefetchTuner:
    """Adjust a plan after each iteration so that copies in end just in time.

    If computation waited for a copy, the copy begins earlier the next time, by one and a half times the
    wait, but not before there is room for it. If a copy ended long before its use, it begins later, by half
    of the spare time, but never again at a step at which computation waited for it. So each begin changes
    only finitely often, whatever the noise, and then stays.

    Args:
        plan: The first plan.
        tolerance: Waits up to this share of the step time are ignored.
        spare: The share of the step time that copies keep as slack.

    Attributes:
        plan: The plan for the next iteration.
    """

    def __init__(self, plan: Plan, tolerance: float = TOLERANCE, spare: float = SPARE) -> None:
        self.plan = plan
        self._tolerance = tolerance
        self._spare = spare
        self._latest = [len(plan.choices) + (1 << 30)] * len(plan.copy_in)

    def update(self, measured: IterationTimes) -> Plan:
        """Adjust the plan to a measured iteration, and return it.

        Args:
            measured: The times of the iteration that followed :attr:`plan`.
        """
        plan, starts = self.plan, measured.starts
        tolerance = self._tolerance * measured.seconds
        spare = self._spare * measured.seconds
        begins = []
        following = len(starts)
        for place in range(len(plan.copy_in) - 1, -1, -1):
            step, i = plan.copy_in[place]
            begin = step
            if measured.waits.get(i, 0.0) > tolerance:
                self._latest[place] = min(self._latest[place], step - 1)
                begin = self._step_at(starts, starts[step] - 1.5 * measured.waits[i])
                begin = min(begin, step - 1)
            elif measured.slack.get(i, 0.0) > 2 * spare:
                later = starts[step] + (measured.slack[i] - spare) / 2
                begin = max(step, min(self._step_at(starts, later), self._latest[place]))
            # Copies begin in the order in which they are needed.
            following = min(max(begin, plan.earliest[place]), following)
            begins.append((following, i))
        self.plan = dataclasses.replace(plan, copy_in=tuple(reversed(begins)))
        return self.plan

    @staticmethod
    def _step_at(starts: Sequence[float], time: float) -> int:
        return max(0, bisect.bisect_right(starts, time) - 1)
