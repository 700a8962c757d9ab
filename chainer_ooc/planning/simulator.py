"""Simulate an iteration: computation, copies in two directions, and memory under the limit.

The simulation goes from step to step as the engine does. A policy (:mod:`chainer_ooc.planning.policies`)
decides between two functions, as the engine does. This module computes the times.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from chainer_ooc.planning.links import Link, SimulatedTransfer
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.rerun import chain
from chainer_ooc.planning.system import System
from chainer_ooc.planning.timeline import Interval, Timeline

__all__ = ["Policy", "SimulatedState", "Simulator", "simulate"]


class Policy(Protocol):
    """The decisions in a simulated iteration."""

    def between(self, simulator: Simulator) -> None:
        """Act before a step."""

    def make_room(self, simulator: Simulator, nbytes: int) -> None:
        """Make room under the limit for an allocation of ``nbytes``."""

    def evicts_after_recompute(self, simulator: Simulator, i: int) -> bool:
        """Return whether to evict a storage once the re-runs before the step have read it."""


class SimulatedState(enum.IntEnum):
    """The states of a simulated storage."""

    UNMADE = 0
    RESIDENT = 1
    GOING_OUT = 2
    BOTH = 3
    OUT = 4
    COMING_IN = 5
    DISCARDED = 6  #: to be made again
    DEAD = 7


class Simulator:
    """Simulate one iteration. Policies read its state and call its methods. Waits let time pass.

    Attributes:
        profile: The iteration.
        system: The memory and the links.
        now: The seconds since the iteration began.
        step: The step that is about to run or runs (index).
        state: The state of each storage.
        resident: The memory of saved storages, and of dead ones whose copies are running (bytes).
        leaving: The storages whose copies out are running, in the order in which they began.
        uses_left: The number of backward steps that still need each storage.
        arriving: The storages whose copies in are running.
        pinned: The storages that the step or its re-runs need.
    """

    def __init__(
        self,
        profile: Profile,
        system: System,
        policy: Policy,
        detailed: bool = False,
        seconds: Sequence[float] | None = None,
    ) -> None:
        self.profile = profile
        self.system = system
        self.policy = policy
        self.now = 0.0
        self.step = 0
        count = len(profile.storages)
        self.nbytes = [storage.nbytes for storage in profile.storages]
        self.free_from = [storage.free_from for storage in profile.storages]
        self.state = [SimulatedState.UNMADE] * count
        self.uses_left = [len(storage.uses) for storage in profile.storages]
        self.resident = 0
        self.leaving: deque[int] = deque()
        self.arriving: dict[int, SimulatedTransfer] = {}
        self.outs: dict[int, SimulatedTransfer] = {}
        self.reruns: list[tuple[int, tuple[int, ...]]] = []
        self.pinned: set[int] = set()
        self._links = [Link(tier) for tier in system.tiers]
        self._room = [tier.capacity for tier in system.tiers]
        self._tier: dict[int, int] = {}
        self._deferred_frees: list[tuple[SimulatedTransfer, int]] = []
        self._seconds = seconds
        self._held = [profile.fixed_bytes + held for held in profile.held]
        self._high = system.high_bytes
        self._peak = self._unplaced = 0
        self._bytes = [0, 0]
        self._wait_in = self._wait_out = self._rerun = 0.0
        self._waits: dict[int, float] = {}
        self._slack: dict[int, float] = {}
        self._starts: list[float] = []
        self._detailed = detailed
        self._intervals: list[Interval] = []
        self._copies: list[SimulatedTransfer] = []
        self._memory: list[tuple[float, int]] = []

    def run(self) -> Timeline:
        """Run the simulation and return its timeline."""
        profile, policy, held, high = self.profile, self.policy, self._held, self._high
        used, made, made_bytes = profile.used, profile.made, profile.made_bytes
        workspace = profile.workspace
        between, state, uses_left = policy.between, self.state, self.uses_left
        for number, seconds in enumerate(self._seconds or profile.seconds):
            self.step = number
            if self._deferred_frees:
                self._run_deferred_frees()
            between(self)
            if used[number]:
                self.pinned.update(used[number])
                self._bring(used[number])
            need = workspace[number] + made_bytes[number]
            if held[number] + self.resident + need > high:
                policy.make_room(self, need)
            peak = held[number] + self.resident + need
            if peak > self._peak:
                self._peak = peak
            self._starts.append(self.now)
            if self._detailed:
                self._note_step(number, seconds, peak)
            self.now += seconds
            self.resident += made_bytes[number]
            for i in made[number]:
                state[i] = SimulatedState.RESIDENT
            if used[number]:
                self.pinned.clear()
                for i in used[number]:
                    uses_left[i] -= 1
                    if not uses_left[i]:
                        self._finish(i)
        for link in self._links:
            link.advance(self.now)
        return self._result()

    def _bring(self, needed: Iterable[int]) -> None:
        """Bring storages into memory: wait for their copies, or make them again."""
        dropped = []
        for i in needed:
            state = self.state[i]
            if state is SimulatedState.DISCARDED:
                dropped.append(i)
            elif state is SimulatedState.OUT:
                self.policy.make_room(self, self.nbytes[i])
                self.begin_in(i)
        if dropped:
            self._run_again(dropped)
        for i in needed:
            if self.state[i] is SimulatedState.COMING_IN:
                self.end_in(i)

    def _run_again(self, dropped: Iterable[int]) -> None:
        order, reads = chain(self.profile, dropped, self._is_there)
        self.pinned.update(reads)
        self._bring(reads)
        last = {i: number for number, rerun in order for i in rerun.reads}
        using = self.profile.used[self.step]
        evict_after_recompute = {
            i for i in reads if i not in using and self.policy.evicts_after_recompute(self, i)
        }
        temporary: dict[int, int] = {}
        for number, rerun in order:
            back = []
            for i in rerun.writes:
                keep = self.state[i] is SimulatedState.DISCARDED
                if keep and (i in using or not self.policy.evicts_after_recompute(self, i)):
                    back.append(i)
                else:
                    temporary[i] = self.nbytes[i]
            nbytes = sum(self.nbytes[i] for i in back)
            beside = rerun.workspace_bytes + sum(temporary.values())
            self.policy.make_room(self, nbytes + beside)
            for i in back:
                self.state[i] = SimulatedState.RESIDENT
                self.pinned.add(i)
            self._take(nbytes)
            self._note_peak(self.used + beside)
            self._spend("rerun", number, rerun.seconds)
            self._rerun += rerun.seconds
            for i in [i for i in temporary if last.get(i, -1) <= number]:
                del temporary[i]
            for i in [i for i in evict_after_recompute if last[i] <= number]:
                evict_after_recompute.remove(i)
                self.pinned.discard(i)
                self.release(i)
        self.reruns.append((self.step, tuple(number for number, _ in order)))

    def _is_there(self, i: int) -> bool:
        return self.state[i] not in (
            SimulatedState.DISCARDED,
            SimulatedState.DEAD,
            SimulatedState.UNMADE,
        )

    def _note_step(self, number: int, seconds: float, peak: int) -> None:
        phase = self.profile.steps[number].phase
        self._intervals.append(Interval(phase, number, self.now, self.now + seconds))
        self._memory += [(self.now, peak), (self.now + seconds, peak)]

    def _result(self) -> Timeline:
        if self._detailed:
            for copy in self._copies:
                if copy.start >= 0:
                    end = copy.end if copy.end >= 0 else self.now
                    kind = "in" if copy.inward else "out"
                    self._intervals.append(Interval(kind, copy.storage, copy.start, end))
        return Timeline(
            self.now,
            self._peak,
            max(0, self._peak - self._high),
            self._bytes[0],
            self._bytes[1],
            self._wait_in,
            self._wait_out,
            self._rerun,
            self._waits,
            self._slack,
            self._starts,
            self.reruns,
            self._intervals,
            self._memory,
            self._unplaced,
        )

    # Queries of policies.

    @property
    def used(self) -> int:
        """The bytes in use between two functions."""
        return self._held[self.step] + self.resident

    def need(self) -> int:
        """Return the most bytes that the step takes beyond :attr:`used`."""
        return self.profile.workspace[self.step] + self.profile.made_bytes[self.step]

    def is_held(self, i: int) -> bool:
        """Return whether anything besides the graph needs or refers to a storage."""
        return self.free_from[i] > self.step or i in self.pinned

    def members(self, state: SimulatedState) -> list[int]:
        """Return the saved storages in a state, in the order in which they were made."""
        return [i for i in self.profile.saved if self.state[i] is state]

    # Actions of policies.

    def begin_out(self, i: int) -> None:
        """RESIDENT -> GOING_OUT. Begin to copy a storage out."""
        assert self.state[i] is SimulatedState.RESIDENT
        tier = self._tier_for(i)
        self._tier[i] = tier
        copy = self._links[tier].begin(i, self.nbytes[i], False, self.now)
        self.outs[i] = copy
        self._note_copy(copy)
        self.state[i] = SimulatedState.GOING_OUT
        self.leaving.append(i)

    def end_out(self, i: int) -> None:
        """GOING_OUT -> BOTH. Wait for the copy."""
        copy = self.outs.pop(i)
        self._wait(copy, "wait out")
        self.state[i] = SimulatedState.BOTH

    def cancel_out(self, i: int) -> bool:
        """GOING_OUT -> RESIDENT, if the copy has not moved a byte yet. Return whether it was canceled."""
        copy = self.outs[i]
        copy.link.advance(self.now)
        if not copy.link.cancel(copy):
            return False
        self._bytes[0] -= self.nbytes[i]
        del self.outs[i]
        self.leaving.remove(i)
        self._forget_copy(i)
        self.state[i] = SimulatedState.RESIDENT
        return True

    def settle(self) -> list[int]:
        """Note the copies out that have ended, and return their storages."""
        ended = []
        for link in self._links:
            link.advance(self.now)
        while self.leaving:
            i = self.leaving[0]
            if self.state[i] is SimulatedState.GOING_OUT:
                if self.outs[i].end < 0:
                    break
                del self.outs[i]
                self.state[i] = SimulatedState.BOTH
                ended.append(i)
            self.leaving.popleft()
        return ended

    def release(self, i: int) -> int:
        """BOTH -> OUT, unless anything besides the graph refers to the storage. Return the bytes freed."""
        if self.state[i] is not SimulatedState.BOTH or self.is_held(i):
            return 0
        self.state[i] = SimulatedState.OUT
        self._free(self.nbytes[i])
        return self.nbytes[i]

    def begin_in(self, i: int) -> None:
        """OUT -> COMING_IN. Begin to copy a storage in."""
        assert self.state[i] is SimulatedState.OUT
        copy = self._links[self._tier[i]].begin(i, self.nbytes[i], True, self.now)
        self.arriving[i] = copy
        self._note_copy(copy)
        self.state[i] = SimulatedState.COMING_IN
        self._take(self.nbytes[i])

    def end_in(self, i: int) -> None:
        """COMING_IN -> BOTH. Wait for the copy."""
        copy = self.arriving.pop(i)
        before = self.now
        self._wait(copy, "wait in")
        self._waits[i] = self._waits.get(i, 0.0) + self.now - before
        self._slack.setdefault(i, self.now - copy.end)
        self.state[i] = SimulatedState.BOTH

    def discard(self, i: int) -> None:
        """RESIDENT or BOTH -> DISCARDED. Free the memory; the storage is made again later."""
        assert self.state[i] in (SimulatedState.RESIDENT, SimulatedState.BOTH)
        self._forget_copy(i)
        self.state[i] = SimulatedState.DISCARDED
        self._free(self.nbytes[i])

    def wait_for_leaving(self, nbytes: int) -> int:
        """Wait for pending copies out, oldest first; release until ``nbytes`` are free."""
        freed = 0
        while self.leaving and freed < nbytes:
            i = self.leaving.popleft()
            if self.state[i] is SimulatedState.GOING_OUT:
                self.end_out(i)
                freed += self.release(i)
        return freed

    def _finish(self, i: int) -> None:
        """Free a storage that backward has used for the last time."""
        if not self.system.single_backward:
            return
        if self.state[i] is SimulatedState.GOING_OUT:
            # The running copy keeps the memory until it ends.
            self._deferred_frees.append((self.outs.pop(i), self.nbytes[i]))
        else:
            self._free(self.nbytes[i])
        self._forget_copy(i)
        self.state[i] = SimulatedState.DEAD

    def _run_deferred_frees(self) -> None:
        if not self._deferred_frees:
            return
        for link in self._links:
            link.advance(self.now)
        alive = [(copy, nbytes) for copy, nbytes in self._deferred_frees if copy.end < 0]
        self._free(sum(n for _, n in self._deferred_frees) - sum(n for _, n in alive))
        self._deferred_frees = alive

    def wait_for_deferred_frees(self) -> None:
        """Wait for the copies of dead storages."""
        for copy, nbytes in self._deferred_frees:
            self._wait(copy, "wait out")
            self._free(nbytes)
        self._deferred_frees = []

    # Time and memory.

    def _tier_for(self, i: int) -> int:
        for tier, room in enumerate(self._room):
            if room is None:
                return tier
            if room >= self.nbytes[i]:
                self._room[tier] = room - self.nbytes[i]
                return tier
        # The engine could not make this copy: count it, and use the last tier.
        self._unplaced += self.nbytes[i]
        return len(self._room) - 1

    def _forget_copy(self, i: int) -> None:
        tier = self._tier.pop(i, None)
        if tier is not None:
            room = self._room[tier]
            if room is not None:
                self._room[tier] = room + self.nbytes[i]

    def _note_copy(self, copy: SimulatedTransfer) -> None:
        self._bytes[copy.inward] += self.nbytes[copy.storage]
        if self._detailed:
            self._copies.append(copy)

    def _take(self, nbytes: int) -> None:
        self.resident += nbytes
        self._note_memory()

    def _free(self, nbytes: int) -> None:
        self.resident -= nbytes
        self._note_memory()

    def _note_memory(self) -> None:
        if self._detailed:
            self._memory.append((self.now, self.used))

    def _note_peak(self, nbytes: int) -> None:
        self._peak = max(self._peak, nbytes)
        if self._detailed:
            self._memory += [(self.now, nbytes)]

    def _wait(self, copy: SimulatedTransfer, kind: str) -> None:
        copy.link.advance(self.now)
        if copy.end < 0:
            end = copy.link.wait(copy)
            if self._detailed and end > self.now:
                self._intervals.append(Interval(kind, copy.storage, self.now, end))
            if copy.inward:
                self._wait_in += max(0.0, end - self.now)
            else:
                self._wait_out += max(0.0, end - self.now)
            self.now = max(self.now, end)

    def _spend(self, kind: str, number: int, seconds: float) -> None:
        if self._detailed:
            self._intervals.append(Interval(kind, number, self.now, self.now + seconds))
        self.now += seconds


def simulate(
    profile: Profile,
    system: System,
    policy: Policy,
    detailed: bool = False,
    seconds: Sequence[float] | None = None,
) -> Timeline:
    """Simulate one iteration.

    Args:
        profile: The iteration.
        system: The memory and the links.
        policy: The decisions.
        detailed: Also keep all intervals and the memory curve, for pictures.
        seconds: The time of each step, if not the profile's: for noise.
    """
    return Simulator(profile, system, policy, detailed, seconds).run()
