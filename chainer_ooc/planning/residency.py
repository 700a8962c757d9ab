"""When storages are in memory: the part of planning that needs no times."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.rerun import chain
from chainer_ooc.planning.system import System

__all__ = ["Needs", "Residency", "needs_of"]

#: (storage, step): the storage leaves after this step needed it, until the next need.
Eviction = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Needs:
    """The steps at which each storage is needed in backward, given the dropped ones.

    Attributes:
        steps: For each storage the steps that need it in memory, ascending: steps that use it, and steps
            before which re-runs read or make it.
        own_bytes: The most bytes that each step takes besides the saved storages alive then.
        rerun_seconds: The time of all re-runs (seconds).
        reruns: (step, forward steps), in order.
    """

    steps: list[list[int]]
    own_bytes: list[int]
    rerun_seconds: float
    reruns: list[tuple[int, tuple[int, ...]]]


def needs_of(
    profile: Profile,
    system: System,
    dropped: Collection[int],
    evicted: Collection[Eviction] = (),
) -> Needs:
    """Return the consequences of dropping some storages.

    Args:
        profile: The iteration.
        system: The memory, and whether backward runs once.
        dropped: The storages to discard and make again.
        evicted: (storage, step) pairs: the storage leaves again after that step needed it.

    Raises:
        ValueError: If a dropped storage cannot be made again.
    """
    storages = profile.storages
    own = profile.workspace.copy()
    if not dropped:
        return Needs([list(s.uses) for s in storages], own, 0.0, [])
    steps = [list(s.uses) for s in storages]
    gone = set(dropped)
    leaves: dict[int, list[int]] = {}
    for i, number in evicted:
        if i in gone:
            leaves.setdefault(number, []).append(i)
    seconds = 0.0
    reruns = []
    for number in sorted({use for i in dropped for use in storages[i].uses}.union(leaves)):
        used = profile.used[number]
        wanted = [i for i in used if i in gone]
        leaving = leaves.get(number, ())
        if wanted:

            def is_there(i: int, now: int = number) -> bool:
                uses = storages[i].uses
                if not uses or i in gone:
                    return False
                return uses[-1] >= now or not system.single_backward

            order, reads = chain(profile, wanted, is_there)
            for i in reads:
                _add(steps[i], number)
            last = {i: n for n, rerun in order for i in rerun.reads}
            temporary: dict[int, int] = {}
            made = most = 0
            for n, rerun in order:
                seconds += rerun.seconds
                for i in rerun.writes:
                    if i in gone:
                        _add(steps[i], number)
                    if i in gone and (i in used or i not in leaving):
                        gone.remove(i)
                        made += storages[i].nbytes
                    else:
                        temporary[i] = storages[i].nbytes
                most = max(most, made + rerun.workspace_bytes + sum(temporary.values()))
                for i in rerun.reads + rerun.writes:
                    if last.get(i, -1) <= n:
                        temporary.pop(i, None)
            # Storages that the re-run makes and keeps count as resident from this step on.
            own[number] = max(own[number], most - made)
            reruns.append((number, tuple(n for n, _ in order)))
        gone.update(leaving)
    return Needs(steps, own, seconds, reruns)


def _add(steps: list[int], number: int) -> None:
    position = bisect.bisect_left(steps, number)
    if position == len(steps) or steps[position] != number:
        steps.insert(position, number)


class Residency:
    """The free memory under the limit at each step, as storages are removed and placed.

    Args:
        profile: The iteration.
        system: The limit, and whether backward runs once.
        needs: The steps at which storages are needed.

    Attributes:
        room: The free bytes at each step, negative if the step does not fit. At first all storages are in
            memory.
    """

    def __init__(self, profile: Profile, system: System, needs: Needs) -> None:
        self.profile = profile
        self.needs = needs.steps
        self.nbytes = [s.nbytes for s in profile.storages]
        self.leave = [s.free_from for s in profile.storages]
        self._single = system.single_backward
        self._spent: set[int] = set()
        count = len(profile.steps)
        change = np.zeros(count + 1, np.int64)
        for i in profile.saved:
            change[profile.storages[i].producer] += self.nbytes[i]
            end = profile.storages[i].uses[-1] + 1 if system.single_backward else count
            change[end] -= self.nbytes[i]
        taken = np.cumsum(change[:-1]) + needs.own_bytes + profile.held
        self.room = system.high_bytes - profile.fixed_bytes - taken

    def gap(self, i: int, after: int = -1) -> tuple[int, int]:
        """Return the steps (first, one after the last) at which a storage need not be in memory.

        Args:
            i: The storage.
            after: The need before the gap; -1 for the gap between forward and backward.
        """
        needs = self.needs[i]
        if after < 0:
            return self.leave[i], needs[0]
        position = needs.index(after) + 1
        # A storage that only the step's re-runs use leaves before the step runs.
        first = after + 1 if after in self.profile.storages[i].uses else after
        if position == len(needs):
            return first, first
        return max(first, self.leave[i]), needs[position]

    def spans(self, i: int) -> list[tuple[int, int]]:
        """Return the spans of steps at which a swapped storage is absent: before backward uses it, and after."""
        spans = [self.gap(i)]
        if not self._single and i not in self._spent:
            spans.append(self._rest(i))
        return [(first, end) for first, end in spans if first < end]

    def _rest(self, i: int) -> tuple[int, int]:
        """Return the span after the last step that needs a storage."""
        return max(self.needs[i][-1] + 1, self.leave[i]), len(self.room)

    def spend(self, candidates: Iterable[int], headroom: int) -> list[int]:
        """Choose storages to remove after their last use, so that ``headroom`` bytes are free, as far as that helps.

        Args:
            candidates: Storages that can be made again, should backward run twice; in the order of preference.
            headroom: Bytes.

        Returns:
            The chosen storages. They are removed for that span.
        """
        missing = np.flatnonzero(self.room < headroom)
        for i in candidates if len(missing) else ():
            first, end = self._rest(i)
            if first < end and np.searchsorted(missing, end) > np.searchsorted(missing, first):
                self._spent.add(i)
                self.room[first:end] += self.nbytes[i]
                missing = missing[self.room[missing] < headroom]
                if not len(missing):
                    break
        return sorted(self._spent)

    def remove(self, i: int) -> None:
        """Remove a storage from memory for all of its spans."""
        for first, end in self.spans(i):
            self.room[first:end] += self.nbytes[i]

    def remove_after(self, i: int, after: int) -> None:
        """Remove a storage from memory for the gap after one of its needs."""
        first, end = self.gap(i, after)
        if end > first:
            self.room[first:end] += self.nbytes[i]

    def cover(self, candidates: Sequence[int], headroom: int) -> list[int]:
        """Choose storages to remove so that ``headroom`` bytes are free at each step.

        Args:
            candidates: The storages in the order of preference.
            headroom: Bytes.

        Returns:
            The chosen storages, in that order. They are removed.
        """
        chosen = []
        missing = np.flatnonzero(self.room < headroom)
        for i in candidates if len(missing) else ():
            spans = self.spans(i)
            if not any(np.diff(np.searchsorted(missing, span)) for span in spans):
                continue
            chosen.append(i)
            for first, end in spans:
                self.room[first:end] += self.nbytes[i]
            missing = missing[self.room[missing] < headroom]
            if not len(missing):
                break
        # Early choices may have become needless: later ones cover their steps.
        needless = set()
        for i in sorted(chosen, key=lambda i: (-self.nbytes[i], i)):
            spans = self.spans(i)
            least = min(np.min(self.room[first:end]) for first, end in spans)
            if least - self.nbytes[i] >= headroom:
                for first, end in spans:
                    self.room[first:end] -= self.nbytes[i]
                needless.add(i)
        return [i for i in chosen if i not in needless]

    def arrivals(self, gaps: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return (step, storage): the earliest step at which each copy in may begin.

        The storage that is needed first is placed first. A copy takes its memory from its begin on. Copies
        begin in the order in which they are needed.

        Args:
            gaps: The gaps to end by a copy in: (storage, need before the gap or -1).
        """
        result = []
        before = 0
        spans = sorted((*reversed(self.gap(i, after)), i) for i, after in gaps)
        for end, first, i in spans:
            tight = np.flatnonzero(self.room[first:end] < self.nbytes[i])
            begin = first + int(tight[-1]) + 1 if len(tight) else first + 1
            begin = min(max(begin, before), end)
            self.room[begin:end] -= self.nbytes[i]
            before = begin
            result.append((begin, i))
        return result
