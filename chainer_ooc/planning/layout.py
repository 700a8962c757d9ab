"""When storages are in memory: the part of planning that needs no clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.rerun import chain
from chainer_ooc.planning.system import System

__all__ = ["Memory", "Needs", "needs_of"]


@dataclasses.dataclass(frozen=True)
class Needs:
    """When dropped storages are made again, and what that needs.

    Attributes:
        first_use: For each storage the first backward step before which it must be in memory.
        own_bytes: For each step what it takes at most beside the saved storages that exist then.
        rerun_seconds: The time of all re-runs.
        reruns: (step, forward steps) in order.
    """

    first_use: list[int]
    own_bytes: list[int]
    rerun_seconds: float
    reruns: list[tuple[int, tuple[int, ...]]]


def needs_of(profile: Profile, system: System, dropped: Collection[int]) -> Needs:
    """Return what a choice of dropped storages entails.

    Raises:
        ValueError: If one of them cannot be made again.
    """
    storages = profile.storages
    first_use = [s.uses[0] if s.uses else -1 for s in storages]
    own = [s.workspace_bytes for s in profile.steps]
    gone = set(dropped)
    seconds = 0.0
    reruns = []
    for number in range(len(profile.steps)) if gone else ():
        wanted = [i for i in profile.used[number] if i in gone]
        if not wanted:
            continue

        def is_there(i: int, now: int = number) -> bool:
            uses = storages[i].uses
            if not uses or i in gone:
                return False
            return uses[-1] >= now or not system.single_backward

        order, reads = chain(profile, wanted, is_there)
        for i in reads:
            first_use[i] = min(first_use[i], number)
        last = {i: n for n, rerun in order for i in rerun.reads}
        temporary: dict[int, int] = {}
        made = most = 0
        for n, rerun in order:
            seconds += rerun.seconds
            for i in rerun.writes:
                if i in gone:
                    gone.remove(i)
                    made += storages[i].nbytes
                    first_use[i] = min(first_use[i], number)
                else:
                    temporary[i] = storages[i].nbytes
            most = max(most, made + rerun.workspace_bytes + sum(temporary.values()))
            for i in [i for i in temporary if last.get(i, -1) <= n]:
                del temporary[i]
        # What it makes is counted among the storages from this step on.
        own[number] = max(own[number], most - made)
        reruns.append((number, tuple(n for n, _ in order)))
    return Needs(first_use, own, seconds, reruns)


class Memory:
    """The room under the limit at each step; storages are placed in it and taken out.

    Args:
        profile: The iteration.
        system: Its limit, and whether backward runs once.
        needs: What re-runs need.
    """

    def __init__(self, profile: Profile, system: System, needs: Needs) -> None:
        self.profile = profile
        self.nbytes = [s.nbytes for s in profile.storages]
        self.leave = [s.free_from for s in profile.storages]
        self.back = needs.first_use
        count = len(profile.steps)
        ends = [s.uses[-1] + 1 if s.uses else 0 for s in profile.storages]
        if not system.single_backward:
            ends = [count] * len(ends)
        change = np.zeros(count + 1, np.int64)
        for i in profile.saved:
            change[profile.storages[i].producer] += self.nbytes[i]
            change[ends[i]] -= self.nbytes[i]
        held = [s.held_bytes for s in profile.steps]
        taken = np.cumsum(change[:-1]) + np.array(held, np.int64) + needs.own_bytes
        #: Free bytes at each step with everything in memory; negative where it does not fit.
        self.room = system.high_bytes - profile.fixed_bytes - taken

    def gap(self, i: int) -> tuple[int, int]:
        """Return the steps (first, one after the last) at which a storage need not be in memory."""
        return self.leave[i], self.back[i]

    def remove(self, i: int, sign: int = 1) -> None:
        """Take a storage out for its gap; with ``sign=-1`` put it back."""
        first, end = self.gap(i)
        if end > first:
            self.room[first:end] += sign * self.nbytes[i]

    def cover(self, candidates: Sequence[int], headroom: int) -> list[int]:
        """Choose storages to take out so that ``headroom`` bytes are free at each step.

        Args:
            candidates: In the order of preference.
            headroom: Bytes.

        Returns:
            The chosen ones, in that order. They are taken out of the room.
        """
        chosen = []
        short = self.room < headroom
        if not short.any():
            return []
        missing = np.flatnonzero(short)
        for i in candidates:
            first, end = self.gap(i)
            low, high = np.searchsorted(missing, (first, end))
            if low >= high:
                continue
            chosen.append(i)
            self.room[first:end] += self.nbytes[i]
            missing = missing[self.room[missing] < headroom]
            if not len(missing):
                break
        # What was taken first may have become needless: another one covers its steps.
        needed = []
        for i in sorted(chosen, key=lambda i: (self.nbytes[i], i)):
            first, end = self.gap(i)
            rest = self.room[first:end] - self.nbytes[i]
            before = min(headroom, int(self.room[first:end].min(initial=headroom)))
            if end > first and rest.min() >= before:
                self.room[first:end] = rest
            else:
                needed.append(i)
        wanted = set(needed)
        return [i for i in chosen if i in wanted]

    def arrivals(self, swapped: Sequence[int]) -> list[tuple[int, int]]:
        """Return (step, storage): the earliest step at which each copy in may begin.

        The first needed is placed first; a copy takes its memory from its begin on. The copies begin in the
        order in which they are needed.
        """
        result = []
        before = 0
        for i in sorted(swapped, key=lambda i: (self.back[i], i)):
            first, end = self.gap(i)
            begin = end
            tight = np.flatnonzero(self.room[first:end] < self.nbytes[i])
            begin = first + int(tight[-1]) + 1 if len(tight) else first + 1
            begin = min(max(begin, before), end)
            self.room[begin:end] -= self.nbytes[i]
            before = begin
            result.append((begin, i))
        return result
