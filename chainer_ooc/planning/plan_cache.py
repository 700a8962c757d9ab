"""Find the plan that fits the running iteration, compare the functions with it, and judge the plan by its times."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections import OrderedDict, deque
from collections.abc import Sequence

from chainer_ooc.planning.plan import Plan
from chainer_ooc.planning.prefetch_tuner import IterationTimes, PrefetchTuner
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.search import make_plan
from chainer_ooc.planning.steps import Step
from chainer_ooc.planning.system import System

__all__ = ["PlanCache", "PlanEntry"]

#: The number of plans that are kept, the last used ones.
_MOST = 32
#: The number of signatures of graphs that are remembered.
_MOST_SEEN = 1024
#: A plan is made again after this many iterations: the recorded one, one of the first, was slow.
_TRIED = 3
#: A plan is measured and tuned for this many iterations.
_SETTLED = 16
#: After _TRIED iterations, a plan is disabled if its fastest took more than this times the time on demand.
_WORSE = 1.02


class PlanEntry:
    """One graph: its profile, its plan, and the measured iterations.

    Attributes:
        profile: The recorded iteration.
        tuner: The tuner that holds and corrects the plan.
        demand_seconds: The time of the recorded iteration.
        iterations: The number of iterations that have followed the plan.
        seconds: The times of the last of them.
        peak_bytes: The highest memory in use in each.
        bytes_out_used: The bytes copied out in each for a second backward.
        saved: The storages (indexes) that each step saves, in order.
    """

    def __init__(self, profile: Profile, plan: Plan, demand_seconds: float) -> None:
        self.profile = profile
        self.demand_seconds = demand_seconds
        self.iterations = 0
        self.seconds: deque[float] = deque(maxlen=64)
        self.peak_bytes: deque[int] = deque(maxlen=64)
        self.bytes_out_used: deque[int] = deque(maxlen=64)
        self.keys = [step.key for step in profile.steps]
        self.saved: dict[int, tuple[int, ...]] = {}
        self.tuner = PrefetchTuner(plan)
        # The least time of each step, and the least sum of one iteration.
        self._least = list(profile.seconds)
        self._least_sum = math.fsum(self._least)
        # Another rank's decision: until the next iteration begins, and from then on.
        self._proposed: tuple[Plan | None] | None = None
        self._given_up: bool | None = None

    @property
    def plan(self) -> Plan:
        """The present plan."""
        return self.tuner.plan

    @property
    def disabled(self) -> bool:
        """Whether the plan is not followed: on demand was faster, here or on the rank that decides for all."""
        return self.slower_than_on_demand if self._given_up is None else self._given_up

    @property
    def slower_than_on_demand(self) -> bool:
        """Whether this process was faster on demand than by the plan."""
        return self.iterations >= _TRIED and min(self.seconds) > _WORSE * self.demand_seconds

    @functools.cached_property
    def identity(self) -> str:
        """The conditions of the plan (hexadecimal): the graph, and its numbered storages."""
        storages = [(s.nbytes, s.producer, s.uses) for s in self.profile.storages]
        text = repr((self.profile.signature, self.keys, storages))
        return hashlib.sha256(text.encode()).hexdigest()

    def propose(self, plan: Plan | None) -> None:
        """Replace the plan from the next iteration on; ``None`` disables it."""
        self._proposed = (plan,)

    def take_proposed(self) -> None:
        """Put the proposed plan into force."""
        if self._proposed is not None:
            (plan,) = self._proposed
            self._proposed = None
            self._given_up = plan is None
            if plan is not None and plan != self.plan:
                self.tuner = PrefetchTuner(plan)

    def finish(
        self, measured: IterationTimes, peak_bytes: int, step_seconds: Sequence[float]
    ) -> None:
        """Note an iteration that has followed the plan, and tune the plan."""
        self.iterations += 1
        self.seconds.append(measured.seconds)
        self.peak_bytes.append(peak_bytes)
        self.tuner.update(measured)
        if len(step_seconds) == len(self._least):
            self._least = [min(pair) for pair in zip(self._least, step_seconds, strict=True)]
            self._least_sum = min(self._least_sum, math.fsum(step_seconds))

    def plan_again(self, system: System) -> None:
        """Make the plan again from the least times of all iterations so far.

        No iteration has all of its steps at their fastest. So the least times are scaled to add up to the
        time of the fastest iteration.
        """
        slower = self._least_sum / (math.fsum(self._least) or 1.0)
        steps_now = tuple(
            dataclasses.replace(step, seconds=least * slower)
            for step, least in zip(self.profile.steps, self._least, strict=True)
        )
        self.profile = dataclasses.replace(self.profile, steps=steps_now)
        self.tuner = PrefetchTuner(make_plan(self.profile, system))


class PlanCache:
    """Keep the plans of several graphs, and follow the one that fits.

    :meth:`advance` gets each step's key before the step runs, and returns the plan that fits all steps so
    far. A step that fits no plan ends that: until :meth:`begin` everything moves on demand. If two graphs
    begin alike, the plan followed last is taken until they differ.

    Attributes:
        entries: The graphs with plans, by signature.
    """

    def __init__(self) -> None:
        self.entries: OrderedDict[str, PlanEntry] = OrderedDict()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._fitting: list[str] = []
        self._position = -1

    def __len__(self) -> int:
        """Return the number of plans."""
        return len(self.entries)

    @property
    def is_settling(self) -> bool:
        """Whether measurements of the next iterations can still change a plan."""
        return any(
            entry.iterations < _SETTLED and not entry.disabled for entry in self.entries.values()
        )

    def wants(self, signature: str) -> bool:
        """Return whether a recorded graph without a plan should get one.

        The first graph should, and any graph that comes a second time: a plan for a graph that never comes
        again is a waste.
        """
        wanted = not self._seen or signature in self._seen
        self._seen[signature] = None
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return wanted and signature not in self.entries

    def add(self, profile: Profile, plan: Plan, demand_seconds: float = float("inf")) -> None:
        """Add the plan of a graph, in place of an earlier one.

        Args:
            profile: The recorded iteration.
            plan: The plan made from it.
            demand_seconds: The time of that iteration.

        Raises:
            ValueError: If the plan is another graph's.
        """
        if plan.signature != profile.signature:
            raise ValueError(
                f"the plan is of graph {plan.signature}, the profile of {profile.signature}; "
                "make a plan from this profile"
            )
        self.entries[profile.signature] = PlanEntry(profile, plan, demand_seconds)
        self.entries.move_to_end(profile.signature)
        while len(self.entries) > _MOST:
            self.entries.popitem(last=False)

    def begin(self) -> None:
        """Begin an iteration."""
        for entry in self.entries.values():
            entry.take_proposed()
        self._fitting = [
            signature for signature, entry in reversed(self.entries.items()) if not entry.disabled
        ]
        self._position = -1

    def advance(self, step: Step | str) -> tuple[Plan, int] | None:
        """Compare the step that is about to run with the plans.

        Args:
            step: The step, or its key.

        Returns:
            The plan that fits all steps so far and the step's number in it, or ``None``.
        """
        key = step if isinstance(step, str) else step.key
        position = self._position = self._position + 1
        fitting = self._fitting
        for signature in fitting:
            if not self._fits(signature, position, key):
                fitting = self._fitting = [s for s in fitting if self._fits(s, position, key)]
                break
        return (self.entries[fitting[0]].plan, position) if fitting else None

    def _fits(self, signature: str, position: int, key: str) -> bool:
        entry = self.entries.get(signature)
        return entry is not None and position < len(entry.keys) and entry.keys[position] == key

    def finish(
        self,
        measured: IterationTimes | None = None,
        peak_bytes: int = 0,
        step_seconds: Sequence[float] = (),
        system: System | None = None,
    ) -> str | None:
        """End an iteration, and tune its plan by what was measured.

        Args:
            measured: The waits and their times.
            peak_bytes: The highest memory in use.
            step_seconds: The time of each step without waits.
            system: The memory and the links as they are now. After a few iterations the plan is made again
                for them.

        Returns:
            The signature of the plan that was followed to its end, or ``None``: then the iteration should
            be recorded and planned.
        """
        done = [s for s in self._fitting if self._position + 1 == len(self.entries[s].keys)]
        self._fitting = []
        if not done:
            return None
        self.entries.move_to_end(done[0])
        if measured is not None:
            entry = self.entries[done[0]]
            entry.finish(measured, peak_bytes, step_seconds)
            if system is not None and entry.iterations == _TRIED:
                entry.plan_again(system)
        return done[0]
