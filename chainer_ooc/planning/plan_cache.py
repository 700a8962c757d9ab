"""Find the plan that fits the running iteration, compare the functions with it, and judge the plan by its times."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from chainer_ooc.planning.plan import Plan
from chainer_ooc.planning.policies import OnDemand
from chainer_ooc.planning.prefetch_tuner import IterationTimes, PrefetchTuner
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.search import make_plan
from chainer_ooc.planning.simulator import simulate
from chainer_ooc.planning.steps import Step
from chainer_ooc.planning.system import System

__all__ = ["Conditions", "PlanCache", "PlanEntry", "plan_for"]

#: The number of plans that are kept, the last used ones.
_MOST = 32
#: The number of signatures of graphs that are remembered.
_MOST_SEEN = 1024
#: A plan is made again after this many iterations: the recorded one, one of the first, was slow.
_TRIED = 3
#: A plan is measured and tuned for this many iterations.
_SETTLED = 16
#: After this many iterations with other graphs nothing is measured for a plan, until its graph comes again.
_UNSEEN = 32
#: After _TRIED iterations, a plan is disabled if its fastest took more than this times the time on demand.
_WORSE = 1.02
#: Where the simulation says that on demand takes less than this times the time by plan, one iteration on demand is
#: measured if none is known.
_CLOSE = 1.1
#: A plan is made again if the memory beside the saved arrays has changed by this share of the limit.
_DRIFT = 1 / 64
#: How often that may be: memory that goes up and down is no reason to plan for ever.
_MOST_DRIFTS = 4


class Conditions(NamedTuple):
    """What a plan is made for, besides the graph.

    Attributes:
        system: The memory and the links.
        recompute: Functions may be run again.
        beside_bytes: The memory in use (bytes) when an iteration begins, without saved storages.
    """

    system: System
    recompute: bool = True
    beside_bytes: int = 0

    def fit(self, other: Conditions) -> bool:
        """Return whether a plan for these conditions is one for ``other``: links may have other speeds."""
        mine, others = self.system, other.system
        drift = abs(self.beside_bytes - other.beside_bytes)
        return (
            mine.limit_bytes == others.limit_bytes
            and mine.single_backward == others.single_backward
            and [tier.capacity for tier in mine.tiers] == [tier.capacity for tier in others.tiers]
            and self.recompute == other.recompute
            and drift <= _DRIFT * mine.limit_bytes
        )


def plan_for(
    profile: Profile, conditions: Conditions, refused: frozenset[int] = frozenset()
) -> Plan:
    """Return the plan for an iteration under some conditions.

    Args:
        profile: The recorded iteration.
        conditions: What the plan is for.
        refused: Storages that cannot be run again.
    """
    if not conditions.recompute:
        refused = frozenset(range(len(profile.storages)))
    return make_plan(profile.without_reruns(refused), conditions.system)


def _with_more(profile: Profile, nbytes: int) -> Profile:
    """Return the profile with ``nbytes`` more in use all the time."""
    return dataclasses.replace(profile, fixed_bytes=max(0, profile.fixed_bytes + nbytes))


class PlanEntry:
    """One graph: its profile, its plan, and the measured iterations.

    Attributes:
        profile: The recorded iteration.
        conditions: What the plan was made for.
        tuner: The tuner that holds and corrects the plan.
        demand_seconds: The time of an iteration on demand.
        iterations: The number of iterations that have followed the plan.
        unseen: The number of iterations of other graphs since then.
        seconds: The times of the last of them.
        peak_bytes: The highest memory in use in each.
        bytes_out_used: The bytes copied out in each for a second backward.
        saved: The storages (indexes) that each step saves, in order.
        is_probed: The next iteration runs on demand, to measure its time.
    """

    def __init__(
        self,
        profile: Profile,
        plan: Plan,
        demand_seconds: float,
        conditions: Conditions | None = None,
    ) -> None:
        self.profile = profile
        self.conditions = conditions
        self.demand_seconds = demand_seconds
        self.is_probed = False
        self.iterations = self.unseen = 0
        self.seconds: deque[float] = deque(maxlen=64)
        self.peak_bytes: deque[int] = deque(maxlen=64)
        self.bytes_out_used: deque[int] = deque(maxlen=64)
        self.keys = [step.key for step in profile.steps]
        self.saved: dict[int, tuple[int, ...]] = {}
        self.tuner = PrefetchTuner(plan)
        # The storages that could not be discarded when the plan said so.
        self._refused: frozenset[int] = frozenset()
        # The least time of each step, and the least sum of one iteration.
        self._least = list(profile.seconds)
        self._least_sum = math.fsum(self._least)
        self._drifts = 0
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
        if self._given_up is not None:
            return self._given_up
        return self.is_probed or self.slower_than_on_demand

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

    def is_for(self, now: Conditions | None) -> bool:
        """Return whether the plan was made for these conditions."""
        return now is None or self.conditions is None or self.conditions.fit(now)

    def adapt(self, now: Conditions) -> bool:
        """Make the plan again if it was made for other conditions. Return whether it was.

        What was allocated since the iteration was recorded, such as the optimizer's state, counts from then on.
        """
        before = self.conditions
        if before is None or before.fit(now):
            return False
        if before._replace(beside_bytes=now.beside_bytes).fit(now):
            self._drifts += 1
            if self._drifts > _MOST_DRIFTS:
                return False
            now = now._replace(system=before.system)  # with the speeds that are known
        else:  # what was measured was measured under others
            self.iterations = self._drifts = 0
            self.seconds.clear()
            self.peak_bytes.clear()
            self.bytes_out_used.clear()
            self.demand_seconds, self.is_probed = math.inf, False
        self._plan_for(now)
        return True

    def plan_again(self, now: Conditions, refused: Collection[int] = ()) -> None:
        """Make the plan again from the least times of all iterations so far.

        Args:
            now: What the plan is for.
            refused: Storages that could not be discarded: they are not to be.
        """
        self.profile = self.profile.at(self._usual_seconds())
        self._refused = self._refused.union(refused)
        self._plan_for(now)
        if self.iterations >= _TRIED and self.demand_seconds == math.inf:
            self.is_probed = self._is_close(now.system)

    def note_on_demand(self, seconds: float) -> None:
        """Note the time of an iteration on demand: it was to be measured."""
        self.demand_seconds = seconds
        self.is_probed = False

    def take_record(self, profile: Profile, now: Conditions) -> None:
        """Take a later record of the same iteration: of memory under ``now`` it knows more than the first one."""
        before = now if self.conditions is None else self.conditions
        profile = profile.at(self._usual_seconds())
        self.profile = _with_more(profile, before.beside_bytes - now.beside_bytes)

    def _usual_seconds(self) -> list[float]:
        """Return the least time of each step, scaled to add up to the time of the fastest iteration.

        No iteration has all of its steps at their fastest.
        """
        scale = self._least_sum / (math.fsum(self._least) or 1.0)
        return [least * scale for least in self._least]

    def _plan_for(self, conditions: Conditions) -> None:
        if self.conditions is not None:
            more = conditions.beside_bytes - self.conditions.beside_bytes
            self.profile = _with_more(self.profile, more)
        self.conditions = conditions
        self.tuner = PrefetchTuner(plan_for(self.profile, conditions, self._refused))
        self._given_up = None

    def _is_close(self, system: System) -> bool:
        """Return whether moving on demand may be as fast as the plan."""
        on_demand = simulate(self.profile, system, OnDemand())
        return on_demand.seconds < _CLOSE * self.plan.seconds


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
            entry.iterations < _SETTLED and entry.unseen < _UNSEEN and not entry.disabled
            for entry in self.entries.values()
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

    def add(
        self,
        profile: Profile,
        plan: Plan,
        demand_seconds: float = math.inf,
        conditions: Conditions | None = None,
    ) -> PlanEntry:
        """Add the plan of a graph, in place of an earlier one.

        Args:
            profile: The recorded iteration.
            plan: The plan made from it.
            demand_seconds: The time of that iteration; infinite if it says nothing about later ones.
            conditions: What the plan was made for, if it is to be made again for others.

        Raises:
            ValueError: If the plan is another graph's.
        """
        if plan.signature != profile.signature:
            raise ValueError(
                f"the plan is of graph {plan.signature}, the profile of {profile.signature}; "
                "make a plan from this profile"
            )
        entry = PlanEntry(profile, plan, demand_seconds, conditions)
        self.entries[profile.signature] = entry
        self.entries.move_to_end(profile.signature)
        while len(self.entries) > _MOST:
            self.entries.popitem(last=False)
        return entry

    def begin(self, now: Conditions | None = None) -> None:
        """Begin an iteration under some conditions."""
        for entry in self.entries.values():
            entry.take_proposed()
        self._fitting = [
            signature
            for signature, entry in reversed(self.entries.items())
            if not (entry.disabled and entry.is_for(now))
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
            entry = self.entries.get(signature)
            if entry is None or position >= len(entry.keys) or entry.keys[position] != key:
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
        now: Conditions | None = None,
        refused: Collection[int] = (),
        record: Callable[[], Profile] | None = None,
    ) -> str | None:
        """End an iteration, and tune its plan by what was measured.

        Args:
            measured: The waits and their times.
            peak_bytes: The highest memory in use.
            step_seconds: The time of each step without waits.
            now: The conditions of the next iteration. After a few iterations the plan is made again for them.
            refused: The storages that could not be discarded: then the plan is made again without re-runs of them.
            record: Makes the profile of the iteration, if it was recorded.

        Returns:
            The signature of the plan that was followed to its end, or ``None``: then the iteration should
            be recorded and planned.
        """
        done = [s for s in self._fitting if self._position + 1 == len(self.entries[s].keys)]
        self._fitting = []
        for entry in self.entries.values():
            entry.unseen += 1
        if not done:
            return None
        self.entries.move_to_end(done[0])
        self.entries[done[0]].unseen = 0
        if measured is not None:
            entry = self.entries[done[0]]
            entry.finish(measured, peak_bytes, step_seconds)
            # The first iteration of all tells little about the memory and the times of later ones.
            is_rough = entry.iterations == 1 and entry.demand_seconds == math.inf
            if record is not None and now is not None:
                entry.take_record(record(), now)
            if now is not None and (entry.iterations == _TRIED or is_rough or refused):
                entry.plan_again(now, refused)
        return done[0]
