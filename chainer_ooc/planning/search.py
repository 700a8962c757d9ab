"""Search for the best plan: keep, swap or recompute each saved storage, and when each copy begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from chainer_ooc.planning.bound import lower_bound
from chainer_ooc.planning.candidates import Order, candidate_orders, recompute_candidates
from chainer_ooc.planning.plan import Plan
from chainer_ooc.planning.policies import Planned
from chainer_ooc.planning.prefetch_tuner import PrefetchTuner
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.schedule import ScheduleBuilder
from chainer_ooc.planning.simulator import simulate
from chainer_ooc.planning.system import System
from chainer_ooc.planning.timeline import Timeline

__all__ = ["make_plan"]

#: The most simulated steps for one plan. It bounds the planner's time, and plans do not depend on the machine.
EFFORT = 50_000
#: The search ends when the step time is this near to the bound.
ENOUGH = 1.002
#: The number of orders of dropping whose best number of drops is searched.
_REFINED = 3
#: The number of first trials that are improved.
_STARTS = 3
#: The most rounds of moving copies in towards their use.
_PACES = 4


@dataclasses.dataclass(frozen=True)
class Trial:
    """One choice, the plan made from it, and its simulation.

    Attributes:
        dropped: The storages to make again, where that fits.
        kept: The storages that must not be swapped.
        headroom: The bytes that the plan leaves free at each step, so that copies may come in early.
        plan: The plan.
        timeline: The result of the simulation.
    """

    dropped: frozenset[int]
    kept: frozenset[int]
    headroom: int
    plan: Plan
    timeline: Timeline

    @property
    def cost(self) -> tuple[int, float]:
        """The key for comparisons: first the excess of memory, then the time."""
        timeline = self.timeline
        return timeline.over_bytes + timeline.unplaced_bytes, timeline.seconds


class Search:
    """Try choices for one profile on one system."""

    def __init__(self, profile: Profile, system: System) -> None:
        self.profile = profile
        self.system = system
        self.left = max(12, EFFORT // max(1, len(profile.steps)))
        self.builder = ScheduleBuilder(profile, system)
        self.bound = lower_bound(profile, system)
        largest = max((profile.storages[i].nbytes for i in profile.saved), default=0)
        self.headrooms = (0, largest // 2, largest)
        self.best = self._trial(frozenset(), frozenset(), 0)
        self.trials = {(self.best.dropped, self.best.kept, 0): self.best}

    def try_it(
        self, dropped: frozenset[int], headroom: int = 0, kept: frozenset[int] = frozenset()
    ) -> Trial:
        """Plan and simulate one choice. When the effort is spent, return the best trial so far."""
        key = dropped, kept, headroom
        if key not in self.trials and not self.done:
            self.left -= 1
            self.trials[key] = trial = self._trial(*key)
            if trial.cost < self.best.cost:
                self.best = trial
        return self.trials.get(key, self.best)

    @property
    def done(self) -> bool:
        """Whether the best trial is good enough, or the effort is spent."""
        over_bytes, seconds = self.best.cost
        return self.left <= 0 or (not over_bytes and seconds <= ENOUGH * self.bound)

    def _trial(self, dropped: frozenset[int], kept: frozenset[int], headroom: int) -> Trial:
        plan = self.builder.plan(dropped, kept, headroom)
        timeline = simulate(self.profile, self.system, Planned(plan))
        return Trial(dropped, kept, headroom, plan, timeline)

    def start(self, units: Order) -> None:
        """Try very different choices: each order of dropping, and for the best orders the best number to drop."""
        none: frozenset[int] = frozenset()
        for headroom in self.headrooms:
            self.try_it(none, headroom)

        def cost(order: Order, count: int) -> tuple[int, float]:
            return self.try_it(none.union(*order[:count])).cost

        screened = []
        for place, order in enumerate(candidate_orders(self.profile, units)):
            half = len(order) // 2
            costs = {count: cost(order, count) for count in (half, len(order))}
            best = min(costs, key=costs.__getitem__)
            screened.append((costs[best], place, best, order))
        for _, _, best, order in sorted(screened)[:_REFINED]:
            step = len(order) // 4
            while step and not self.done:
                near = (max(0, best - step), best, min(len(order), best + step))
                best = min(near, key=lambda count: cost(order, count))
                step //= 2

    def improve(self, units: Order, start: Trial) -> None:
        """Change one decision at a time, then exchange two, for as long as the plan improves."""
        current = start
        for headroom in self.headrooms:
            current = min(current, self.try_it(current.dropped, headroom), key=lambda t: t.cost)
        better = True
        while better and not self.done:
            better = False
            for drop, keep in self._moves(units, current):
                trial = self.try_it(current.dropped ^ drop, current.headroom, current.kept ^ keep)
                if trial.cost < current.cost:
                    current, better = trial, True
                if self.done:
                    return

    def _moves(
        self, units: Order, current: Trial
    ) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
        """Yield the changes to try: (storages whose drop is toggled, storages whose keep is toggled)."""
        none: frozenset[int] = frozenset()
        back = [unit for unit in reversed(units) if unit & current.dropped]
        away = [unit for unit in units if not unit & current.dropped]
        for unit in (*back, *away):
            yield unit, none
        if current.timeline.wait_in_seconds + current.timeline.wait_out_seconds > 0:
            for _, i in current.plan.copy_out:
                yield none, frozenset((i,))
        rank = {unit: n for n, unit in enumerate(units)}
        pairs = sorted(
            ((a, b) for a in back for b in away), key=lambda pair: rank[pair[1]] - rank[pair[0]]
        )
        for a, b in pairs:
            yield a | b, none


def make_plan(profile: Profile, system: System) -> Plan:
    """Return the plan for an iteration.

    Args:
        profile: The recorded iteration.
        system: The memory and the links.
    """
    search = Search(profile, system)
    units = recompute_candidates(profile)
    search.start(units)
    starts = sorted(search.trials.values(), key=lambda trial: trial.cost)
    for start in starts[:_STARTS]:
        search.improve(units, start)
    best = search.best
    # Copies in begin as early as possible: move them towards their use while that costs no time.
    pacer = PrefetchTuner(best.plan)
    timeline = best.timeline
    for _ in range(_PACES if best.plan.copy_in else 0):
        plan = pacer.update(timeline)
        timeline = simulate(profile, system, Planned(plan))
        trial = dataclasses.replace(best, plan=plan, timeline=timeline)
        best = trial if trial.cost <= best.cost else best
    return dataclasses.replace(
        best.plan,
        seconds=best.timeline.seconds,
        peak_bytes=best.timeline.peak_bytes,
        bound_seconds=search.bound,
    )
