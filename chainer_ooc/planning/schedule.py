"""Turn a choice of storages to recompute into a schedule: what to swap, and when each storage leaves and returns."""

from __future__ import annotations

import bisect
from collections.abc import Collection

import numpy as np

from chainer_ooc.planning.plan import Choice, Plan
from chainer_ooc.planning.profile import Profile, Rerun
from chainer_ooc.planning.rerun import can_be_made_again
from chainer_ooc.planning.residency import Eviction, Needs, Residency, needs_of
from chainer_ooc.planning.system import System, Tier

__all__ = ["ScheduleBuilder", "bytes_for_second_backward"]

#: The most repairs of a schedule that does not fit.
_REPAIRS = 24


def bytes_for_second_backward(profile: Profile, plan: Plan, limit_bytes: int) -> int:
    """Return the bytes that a plan copies out, and that could stay if used storages were dropped.

    Args:
        profile: The recorded iteration.
        plan: Its plan, without ``single_backward``. What is made again stays so.
        limit_bytes: The limit.
    """

    def leaving(plan: Plan) -> int:
        return sum(profile.storages[i].nbytes for _, i in plan.copy_out)

    once = System(limit_bytes, (Tier("any", 1.0, 1.0),), single_backward=True)
    least = ScheduleBuilder(profile, once).plan(plan.chosen(Choice.RECOMPUTE), (), 0)
    return max(leaving(plan) - leaving(least), 0)


class ScheduleBuilder:
    """Build schedules for one profile on one system, without simulating times.

    Args:
        profile: The iteration.
        system: The memory limit.
    """

    def __init__(self, profile: Profile, system: System) -> None:
        self.profile = profile
        self.system = system
        # From this step on only the graph refers to the storage, and no code writes to its re-run's inputs unnoticed.
        self._drop_from = {i: self._free_from(i) for i in can_be_made_again(profile)}
        # To be given up after their last use at no cost, the largest first: the fewer functions are guarded.
        free = (i for i in self._drop_from if not self._rerun_of(i).guard_seconds)
        self._given_up = sorted(free, key=lambda i: -profile.storages[i].nbytes)
        # Backward needs the oldest last: they have the most time to leave and return.
        self.by_age = sorted(
            profile.saved,
            key=lambda i: (-profile.storages[i].uses[0], profile.storages[i].producer),
        )

    def plan(self, dropped: Collection[int], kept: Collection[int], headroom: int) -> Plan:
        """Return the plan for one choice.

        Args:
            dropped: The storages to make again, where that fits.
            kept: The storages that must not be swapped.
            headroom: The bytes to leave free at each step, so that copies may come in early.
        """
        profile, system = self.profile, self.system
        gone = {i for i in dropped if self._drop_from[i] < profile.storages[i].uses[0]}
        self._keep_what_is_made_from_nothing(gone)
        evicted: set[Eviction] = set()
        for _ in range(_REPAIRS):
            needs = needs_of(profile, system, gone, evicted)
            memory = Residency(profile, system, needs)
            for i in gone:
                memory.leave[i] = self._drop_from[i]
                memory.remove(i)
            for i, after in evicted:
                if after in needs.steps[i]:
                    memory.remove_after(i, after)
            spent: list[int] = []
            if not system.single_backward:
                spent = memory.spend((i for i in self._given_up if i not in gone), headroom)
            movable = [i for i in self.by_age if i not in gone and i not in kept]
            swapped = memory.cover(movable, headroom)
            if not self._repair(memory, needs, gone, set(swapped), evicted):
                break
        return self._plan_of(memory, needs, gone, swapped, evicted, spent)

    def _keep_what_is_made_from_nothing(self, gone: set[int]) -> None:
        """Keep storages that could not be made again, as ``single_backward`` drops inputs of their re-runs first."""
        if not self.system.single_backward:
            return
        storages, makers = self.profile.storages, self.profile.makers
        for i in sorted(gone):
            now, todo, seen = storages[i].uses[-1], [i], {i}
            while todo:
                one = todo.pop()
                number = makers.get(one)
                rerun = None if number is None else self.profile.steps[number].rerun
                if rerun is None:
                    gone.remove(i)
                    break
                for read in rerun.reads:
                    uses = storages[read].uses
                    if (read in gone or not uses or uses[-1] < now) and read not in seen:
                        seen.add(read)
                        todo.append(read)

    def _free_from(self, i: int) -> int:
        storages = self.profile.storages
        found = (i, *self._rerun_of(i).open_reads)
        return max(storages[one].free_from for one in found if storages[one].uses)

    def _rerun_of(self, i: int) -> Rerun:
        rerun = self.profile.steps[self.profile.makers[i]].rerun
        assert rerun is not None
        return rerun

    def _repair(
        self,
        memory: Residency,
        needs: Needs,
        gone: set[int],
        swapped: set[int],
        evicted: set[Eviction],
    ) -> bool:
        """Change one decision that does not fit. Return whether anything was changed."""
        short = np.flatnonzero(memory.room < 0)
        if not len(short):
            return False
        number = int(short[np.argmin(memory.room[short])])
        missing = -int(memory.room[number])
        # A storage that an earlier and a later step need leaves in between.
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
        # The re-runs themselves do not fit: keep the storages that they make.
        for step, again in needs.reruns:
            if step == number:
                reruns = [self.profile.steps[n].rerun for n in again]
                back = gone.intersection(*[{i for r in reruns if r for i in r.writes}])
                gone.difference_update(back)
                return bool(back)
        return False

    def _plan_of(
        self,
        memory: Residency,
        needs: Needs,
        gone: set[int],
        swapped: list[int],
        evicted: set[Eviction],
        spent: list[int],
    ) -> Plan:
        storages = self.profile.storages
        choices = [Choice.KEEP] * len(storages)
        for i in swapped:
            choices[i] = Choice.SWAP
        for i in gone:
            choices[i] = Choice.RECOMPUTE
        leave = memory.leave
        gaps = [(i, -1) for i in swapped]
        release, drop, evict_after_recompute = [], [(leave[i], i) for i in gone], []
        for i, after in sorted(evicted):
            if after not in needs.steps[i] or choices[i] is Choice.KEEP:
                continue
            if after not in storages[i].uses:
                evict_after_recompute.append((after, i))
            elif choices[i] is Choice.SWAP:
                release.append((after + 1, i))
            else:
                drop.append((after + 1, i))
            if choices[i] is Choice.SWAP and after != needs.steps[i][-1]:
                gaps.append((i, after))
        arrivals = tuple(memory.arrivals(gaps))
        if not self.system.single_backward:
            # Backward may run again: used storages leave as well, and keep their copy or their re-run.
            release += [(storages[i].uses[-1] + 1, i) for i in swapped]
            drop += [(storages[i].uses[-1] + 1, i) for i in gone]
            rest = ((needs.steps[i][-1] + 1, i) for i in spent if choices[i] is Choice.KEEP)
            drop += [(step, i) for step, i in rest if step < len(self.profile.steps)]
        return Plan(
            self.profile.signature,
            tuple(choices),
            copy_out=tuple(sorted((leave[i], i) for i in swapped)),
            copy_in=arrivals,
            earliest=tuple(step for step, _ in arrivals),
            release=tuple(sorted(release)),
            discard=tuple(sorted(drop)),
            evict_after_recompute=tuple(sorted(evict_after_recompute)),
            need_bytes=self.profile.need_bytes,
        )
