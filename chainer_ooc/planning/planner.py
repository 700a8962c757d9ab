"""The planner: keep, swap or recompute each saved storage, and when each copy starts."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator

import numpy as np

from chainer_ooc.planning.bound import lower_bound
from chainer_ooc.planning.layout import Eviction, Memory, Needs, needs_of
from chainer_ooc.planning.pacing import Pacer
from chainer_ooc.planning.plan import Choice, Plan
from chainer_ooc.planning.policies import Planned
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.records import Timeline
from chainer_ooc.planning.rerun import can_be_made_again, chain
from chainer_ooc.planning.system import System
from chainer_ooc.planning.timeline import simulate

__all__ = ["make_plan"]

#: Simulated steps that one plan may take: it bounds the planner's time, and is the same on every machine.
EFFORT = 60_000
#: A step time this near to the bound is not improved on.
ENOUGH = 1.002
#: How many kinds of functions are tried by themselves.
_KINDS = 4
#: How many of the first trials are improved.
_STARTS = 3
#: How often copies in are moved towards their use.
_PACES = 4
#: How often a layout that does not fit is repaired.
_REPAIRS = 24


@dataclasses.dataclass(frozen=True)
class Trial:
    """One layout and what the simulation says of it."""

    dropped: frozenset[int]
    headroom: int
    plan: Plan
    timeline: Timeline

    @property
    def cost(self) -> tuple[int, float]:
        """What is compared: first that it fits, then time."""
        return self.timeline.over_bytes, self.timeline.seconds


Order = list[frozenset[int]]
Costs = dict[int, tuple[int, float]]


def orders(profile: Profile, units: Order) -> Iterator[Order]:
    """Yield orders in which units may be dropped: the first so many of one of them are.

    Args:
        profile: The iteration.
        units: What can be made again, the cheapest per byte first.
    """
    yield units
    # No re-run that needs another one.
    reads: dict[frozenset[int], set[int]] = {}
    for unit in units:
        _, needed = chain(profile, unit, lambda i: bool(profile.storages[i].uses))
        reads[unit] = set(needed)
    alone: Order = []
    dropped: set[int] = set()
    needed_by: set[int] = set()
    for unit in units:
        if not (unit & needed_by or reads[unit] & dropped):
            alone.append(unit)
            dropped |= unit
            needed_by |= reads[unit]
    yield alone
    # One kind of function after the other, the one with most bytes first.
    kinds: dict[str, Order] = {}
    for unit in units:
        kinds.setdefault(profile.storages[min(unit)].label, []).append(unit)
    nbytes = {
        kind: sum(profile.storages[i].nbytes for unit in order for i in unit)
        for kind, order in kinds.items()
    }
    for kind in sorted(kinds, key=lambda kind: -nbytes[kind])[:_KINDS]:
        yield kinds[kind]
    # Stretches between which something stays, so that re-runs do not need all that came before.
    forward = sorted(units, key=min)
    for length in (3, 6, 12, 2):
        yield [unit for n, unit in enumerate(forward) if n % (length + 1)]


class Search:
    """Trials of one profile on one system."""

    def __init__(self, profile: Profile, system: System) -> None:
        self.profile = profile
        self.system = system
        self.left = max(12, EFFORT // max(1, len(profile.steps)))
        # Backward needs the oldest last: they have most time to go and to come.
        self.by_age = sorted(
            profile.saved,
            key=lambda i: (-profile.storages[i].uses[0], profile.storages[i].producer),
        )
        self.bound = lower_bound(profile, system)
        self.best = self._trial(frozenset(), 0)
        self.trials = {(self.best.dropped, self.best.headroom): self.best}

    def units(self) -> list[frozenset[int]]:
        """Return what can be made again, together what one function makes, the cheapest per byte first."""
        profile = self.profile
        made: dict[int, list[int]] = {}
        for i in can_be_made_again(profile):
            made.setdefault(profile.makers[i], []).append(i)
        costs = []
        for group in made.values():
            order, _ = chain(profile, group, lambda i: bool(profile.storages[i].uses))
            nbytes = sum(profile.storages[i].nbytes for i in group)
            costs.append((sum(rerun.seconds for _, rerun in order) / nbytes, group))
        return [frozenset(group) for _, group in sorted(costs)]

    def try_it(self, dropped: frozenset[int], headroom: int) -> Trial:
        """Lay out and simulate one choice."""
        key = dropped, headroom
        if key not in self.trials and not self.done:
            self.left -= 1
            self.trials[key] = trial = self._trial(dropped, headroom)
            if trial.cost < self.best.cost:
                self.best = trial
        return self.trials.get(key, self.best)

    @property
    def done(self) -> bool:
        """Whether nothing better is to be expected, or the effort is spent."""
        over_bytes, seconds = self.best.cost
        return self.left <= 0 or (not over_bytes and seconds <= ENOUGH * self.bound)

    def _trial(self, dropped: frozenset[int], headroom: int) -> Trial:
        plan = self._lay_out(dropped, headroom)
        return Trial(dropped, headroom, plan, simulate(self.profile, self.system, Planned(plan)))

    def _lay_out(self, dropped: frozenset[int], headroom: int) -> Plan:
        profile, system = self.profile, self.system
        gone = set(dropped)
        evicted: set[Eviction] = set()
        for _ in range(_REPAIRS):
            needs = needs_of(profile, system, gone, evicted)
            memory = Memory(profile, system, needs)
            for i in gone:
                memory.remove(i)
            for i, after in evicted:
                if after in needs.steps[i]:
                    memory.remove(i, after)
            swapped = memory.cover([i for i in self.by_age if i not in gone], headroom)
            if not self._repair(memory, needs, gone, set(swapped), evicted):
                break
        return self._plan_of(memory, needs, gone, swapped, evicted)

    def _repair(
        self,
        memory: Memory,
        needs: Needs,
        gone: set[int],
        swapped: set[int],
        evicted: set[Eviction],
    ) -> bool:
        """Change what does not fit. Returns whether something was changed."""
        short = np.flatnonzero(memory.room < 0)
        if not len(short):
            return False
        number = int(short[np.argmin(memory.room[short])])
        missing = -int(memory.room[number])
        # What came back for an earlier step and is needed by a later one leaves meanwhile.
        found = []
        for i in (*gone, *swapped):
            position = bisect.bisect_right(needs.steps[i], number)
            before, after = needs.steps[i][:position], needs.steps[i][position:]
            if before and after and (i, before[-1]) not in evicted:
                first, end = memory.gap(i, before[-1])
                if first <= number < end:
                    found.append((i in gone, -after[0], i, before[-1]))
        for _, _, i, last in sorted(found):
            evicted.add((i, last))
            missing -= self.profile.storages[i].nbytes
            if missing <= 0:
                break
        if found:
            return True
        # The re-runs themselves do not fit: what is wanted there is not dropped.
        for step, again in needs.reruns:
            if step == number:
                reruns = [self.profile.steps[n].rerun for n in again]
                back = gone.intersection(*[{i for r in reruns if r for i in r.writes}])
                gone.difference_update(back)
                return bool(back)
        return False

    def _plan_of(
        self,
        memory: Memory,
        needs: Needs,
        gone: set[int],
        swapped: list[int],
        evicted: set[Eviction],
    ) -> Plan:
        storages = self.profile.storages
        choices = [Choice.KEEP] * len(storages)
        for i in swapped:
            choices[i] = Choice.SWAP
        for i in gone:
            choices[i] = Choice.RECOMPUTE
        leave = memory.leave
        gaps = [(i, -1) for i in swapped]
        release, drop, pass_by = [], [(leave[i], i) for i in gone], []
        for i, after in sorted(evicted):
            if after not in needs.steps[i] or choices[i] is Choice.KEEP:
                continue
            if after not in storages[i].uses:
                pass_by.append((after, i))
            elif choices[i] is Choice.SWAP:
                release.append((after + 1, i))
            else:
                drop.append((after + 1, i))
            if choices[i] is Choice.SWAP and after != needs.steps[i][-1]:
                gaps.append((i, after))
        arrivals = tuple(memory.arrivals(gaps))
        return Plan(
            self.profile.signature,
            tuple(choices),
            copy_out=tuple(sorted((leave[i], i) for i in swapped)),
            copy_in=arrivals,
            earliest=tuple(step for step, _ in arrivals),
            release=tuple(sorted(release)),
            drop=tuple(sorted(drop)),
            rerun=tuple(needs.reruns),
            pass_by=tuple(sorted(pass_by)),
        )

    def start(self, units: list[frozenset[int]]) -> None:
        """Try what differs widely, of each way of choosing as much as is best."""
        largest = max((self.profile.storages[i].nbytes for i in self.profile.saved), default=0)
        none: frozenset[int] = frozenset()
        for headroom in (0, largest // 2, largest):
            self.try_it(none, headroom)
        spent, whole = 0, self.left
        for order in orders(self.profile, units):
            costs = {0: self.try_it(none, 0).cost}

            def cost(count: int, order: Order = order, costs: Costs = costs) -> tuple[int, float]:
                if count not in costs:
                    costs[count] = self.try_it(none.union(*order[:count]), 0).cost
                return costs[count]

            size = len(order)
            best = min((round(size * part / 4) for part in range(5)), key=cost)
            step = size // 8
            for _ in range(2):
                near = (max(0, best - step), best, min(size, best + step))
                best = min(near, key=cost)
                step //= 2
            spent = whole - self.left
            if self.done or spent > 0.6 * whole:
                return

    def improve(self, units: list[frozenset[int]], start: Trial) -> None:
        """Change one decision at a time, then exchange two, as long as that helps."""
        largest = max((self.profile.storages[i].nbytes for i in self.profile.saved), default=0)
        current = start
        for headroom in (0, largest // 2, largest):
            current = min(current, self.try_it(current.dropped, headroom), key=lambda t: t.cost)
        rank = {unit: n for n, unit in enumerate(units)}
        better = True
        while better and not self.done:
            better = False
            back = [unit for unit in reversed(units) if unit & current.dropped]
            away = [unit for unit in units if not unit & current.dropped]
            exchanges = sorted(
                ((a, b) for a in back for b in away), key=lambda pair: rank[pair[1]] - rank[pair[0]]
            )
            for move in (*back, *away, *(a | b for a, b in exchanges)):
                trial = self.try_it(current.dropped ^ move, current.headroom)
                if trial.cost < current.cost:
                    current, better = trial, True
                    if move not in rank:
                        break
                if self.done:
                    return


def make_plan(profile: Profile, system: System) -> Plan:
    """Return the plan for an iteration.

    Args:
        profile: The iteration, as it was recorded.
        system: The memory and the links.
    """
    search = Search(profile, system)
    units = search.units()
    search.start(units)
    starts = sorted(search.trials.values(), key=lambda trial: trial.cost)
    for start in starts[:_STARTS]:
        search.improve(units, start)
    best = search.best
    # What comes in as early as it can comes in just in time, as far as that costs nothing.
    pacer = Pacer(best.plan)
    timeline = best.timeline
    for _ in range(_PACES if best.plan.copy_in else 0):
        plan = pacer.update(timeline)
        timeline = simulate(profile, system, Planned(plan))
        if (timeline.over_bytes, timeline.seconds) <= best.cost:
            best = dataclasses.replace(best, plan=plan, timeline=timeline)
    return dataclasses.replace(
        best.plan,
        seconds=best.timeline.seconds,
        peak_bytes=best.timeline.peak_bytes,
        bound_seconds=search.bound,
    )
