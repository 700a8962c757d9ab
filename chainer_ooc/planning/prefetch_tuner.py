"""The closed loop: what was measured moves the begin of each copy in, for the next iteration."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from chainer_ooc.planning.plan import Plan

__all__ = ["IterationTimes", "PrefetchTuner"]

#: Shares of the step time: a wait that counts, and the slack that copies are left with.
TOLERANCE, SPARE = 2e-4, 5e-3


class IterationTimes(Protocol):
    """What is measured in an iteration; a :class:`~chainer_ooc.planning.timeline.Timeline` has it."""

    @property
    def seconds(self) -> float:
        """The step time."""

    @property
    def waits(self) -> Mapping[int, float]:
        """Seconds that compute waited for each storage to come in."""

    @property
    def slack(self) -> Mapping[int, float]:
        """Seconds between each storage's arrival and its use."""

    @property
    def starts(self) -> Sequence[float]:
        """When each step started (seconds)."""


class PrefetchTuner:
    """Follows a plan over the iterations and keeps its copies in just in time.

    A copy that compute waited for begins earlier the next time, by as much as the wait and half of it more, down
    to the earliest step at which there is room for it. One that lay in memory long before its use begins later,
    by half of the time that it had to spare; but never again at a step at which it was waited for. So
    each begin moves back and forth only finitely often, whatever the noise, and then stays.

    Args:
        plan: The plan to begin with.
        tolerance: A wait up to this share of the step time is none.
        spare: The slack, as a share of the step time, that is left.

    Attributes:
        plan: The plan for the next iteration.
    """

    def __init__(self, plan: Plan, tolerance: float = TOLERANCE, spare: float = SPARE) -> None:
        self.plan = plan
        self._tolerance = tolerance
        self._spare = spare
        self._latest = [len(plan.choices) + (1 << 30)] * len(plan.copy_in)

    def update(self, measured: IterationTimes) -> Plan:
        """Return the plan for the next iteration.

        Args:
            measured: What the iteration that followed :attr:`plan` did.
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
            # The copies begin in the order in which they are needed.
            following = min(max(begin, plan.earliest[place]), following)
            begins.append((following, i))
        self.plan = dataclasses.replace(plan, copy_in=tuple(reversed(begins)))
        return self.plan

    @staticmethod
    def _step_at(starts: Sequence[float], time: float) -> int:
        return max(0, bisect.bisect_right(starts, time) - 1)
