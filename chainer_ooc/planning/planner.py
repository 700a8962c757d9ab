"""The planner: keep, swap or recompute each saved storage, and when each copy starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from chainer_ooc.planning.bound import lower_bound
from chainer_ooc.planning.layout import Memory, needs_of
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


@dataclasses.dataclass(frozen=True)
class _Trial:
    plan: Plan
    timeline: Timeline

    @property
    def cost(self) -> tuple[int, float]:
        """What is compared: first that it fits, then time."""
        return self.timeline.over_bytes, self.timeline.seconds


class _Search:
    """Trials of one profile on one system."""

    def __init__(self, profile: Profile, system: System) -> None:
        self.profile = profile
        self.system = system
        self.trials: dict[tuple[frozenset[int], int], _Trial] = {}
        self.most = max(12, EFFORT // max(1, len(profile.steps)))
        # Backward needs the oldest last: they have most time to go and to come.
        self.by_age = sorted(
            profile.saved, key=lambda i: (-profile.storages[i].uses[0], profile.storages[i].producer)
        )
        self.best: _Trial | None = None

    def recomputable(self) -> list[int]:
        """Return what can be made again, the cheapest per byte first."""
        costs = []
        for i in can_be_made_again(self.profile):
            order, _ = chain(self.profile, [i], lambda j: bool(self.profile.storages[j].uses))
            nbytes = self.profile.storages[i].nbytes
            costs.append((sum(rerun.seconds for _, rerun in order) / nbytes, i))
        return [i for _, i in sorted(costs)]

    def try_it(self, dropped: frozenset[int], headroom: int) -> _Trial:
        """Lay out and simulate one choice."""
        key = dropped, headroom
        if key not in self.trials:
            trial = self._lay_out(dropped, headroom)
            self.trials[key] = trial
            if self.best is None or trial.cost < self.best.cost:
                self.best = trial
        return self.trials[key]

    def _lay_out(self, dropped: frozenset[int], headroom: int) -> _Trial:
        profile = self.profile
        needs = needs_of(profile, self.system, dropped)
        memory = Memory(profile, self.system, needs)
        for i in dropped:
            memory.remove(i)
        swapped = memory.cover([i for i in self.by_age if i not in dropped], headroom)
        choices = [Choice.KEEP] * len(profile.storages)
        for i in swapped:
            choices[i] = Choice.SWAP
        for i in dropped:
            choices[i] = Choice.RECOMPUTE
        leave = memory.leave
        plan = Plan(
            profile.signature,
            tuple(choices),
            tuple(sorted((leave[i], i) for i in swapped)),
            tuple(memory.arrivals(swapped)),
            tuple(sorted((leave[i], i) for i in dropped)),
            tuple(needs.reruns),
        )
        return _Trial(plan, simulate(profile, self.system, Planned(plan)))


def make_plan(profile: Profile, system: System) -> Plan:
    """Return the plan for an iteration.

    Args:
        profile: The iteration, as it was recorded.
        system: The memory and the links.
    """
    search = _Search(profile, system)
    sizes = sorted(profile.storages[i].nbytes for i in profile.saved)
    largest = sizes[-1] if sizes else 0
    none: frozenset[int] = frozenset()
    search.try_it(none, 0)
    headrooms = [0, largest // 2, largest, 2 * largest]
    cheap = search.recomputable()
    counts = sorted({round(len(cheap) * f) for f in (0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1)})
    for count in counts:
        for headroom in headrooms:
            search.try_it(frozenset(cheap[:count]), headroom)
    assert search.best is not None
    best = search.best
    return dataclasses.replace(
        best.plan,
        seconds=best.timeline.seconds,
        peak_bytes=best.timeline.peak_bytes,
        bound_seconds=lower_bound(profile, system),
    )
