"""Memory and copies of a simulated iteration: where each storage is, and how it gets elsewhere."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chainer_ooc.planning.links import Link, SimulatedTransfer
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.system import System
from chainer_ooc.planning.timeline import Interval

if TYPE_CHECKING:
    from chainer_ooc.planning.policies import Policy

__all__ = ["Moves", "SimulatedState"]


class SimulatedState(enum.IntEnum):
    """Where the bytes of a simulated storage are."""

    UNMADE = 0
    RESIDENT = 1
    GOING_OUT = 2
    BOTH = 3
    OUT = 4
    COMING_IN = 5
    DROPPED = 6  #: to be made again
    DEAD = 7


class Moves:
    """The state of a simulated iteration, and the transitions of its storages. Waits let time pass.

    Attributes:
        profile: The iteration.
        system: Memory and links.
        now: Seconds since the iteration began.
        step: The step that is about to run, or runs (index).
        state: Where each storage is.
        resident: The saved storages in memory, and what copies of dead ones still hold (bytes).
        leaving: The storages that are going out, in the order in which they were begun.
        uses_left: How many backward steps have yet to use each storage.
        arriving: The storages that are coming in.
        pinned: The storages that the step needs, or what is run again for it.
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

    # What policies ask.

    @property
    def used(self) -> int:
        """The bytes in use now, between two functions."""
        return self._held[self.step] + self.resident

    def need(self) -> int:
        """Return the bytes that the step takes at most beyond :attr:`used`."""
        return self.profile.workspace[self.step] + self.profile.made_bytes[self.step]

    def is_held(self, i: int) -> bool:
        """Tell whether something besides the graph needs or refers to a storage."""
        return self.free_from[i] > self.step or i in self.pinned

    def members(self, state: SimulatedState) -> list[int]:
        """Return the saved storages in a state, in the order of making."""
        return [i for i in self.profile.saved if self.state[i] is state]

    # What policies do.

    def begin_out(self, i: int) -> None:
        """RESIDENT -> GOING_OUT."""
        assert self.state[i] is SimulatedState.RESIDENT
        tier = self._tier_for(i)
        self._tier[i] = tier
        copy = self._links[tier].begin(i, self.nbytes[i], False, self.now)
        self.outs[i] = copy
        self._note_copy(copy)
        self.state[i] = SimulatedState.GOING_OUT
        self.leaving.append(i)

    def end_out(self, i: int) -> None:
        """GOING_OUT -> BOTH. Waits."""
        copy = self.outs.pop(i)
        self._wait(copy, "wait out")
        self.state[i] = SimulatedState.BOTH

    def cancel_out(self, i: int) -> bool:
        """GOING_OUT -> RESIDENT if the copy has not begun to move. Returns whether."""
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
        """Take note of the copies out that have ended; return their storages."""
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
        """BOTH -> OUT, unless it is held. Returns the bytes freed."""
        if self.state[i] is not SimulatedState.BOTH or self.is_held(i):
            return 0
        self.state[i] = SimulatedState.OUT
        self._free(self.nbytes[i])
        return self.nbytes[i]

    def begin_in(self, i: int) -> None:
        """OUT -> COMING_IN."""
        assert self.state[i] is SimulatedState.OUT
        copy = self._links[self._tier[i]].begin(i, self.nbytes[i], True, self.now)
        self.arriving[i] = copy
        self._note_copy(copy)
        self.state[i] = SimulatedState.COMING_IN
        self._take(self.nbytes[i])

    def end_in(self, i: int) -> None:
        """COMING_IN -> BOTH. Waits."""
        copy = self.arriving.pop(i)
        before = self.now
        self._wait(copy, "wait in")
        self._waits[i] = self._waits.get(i, 0.0) + self.now - before
        self._slack.setdefault(i, self.now - copy.end)
        self.state[i] = SimulatedState.BOTH

    def drop(self, i: int) -> None:
        """RESIDENT or BOTH -> DROPPED: it is to be made again."""
        assert self.state[i] in (SimulatedState.RESIDENT, SimulatedState.BOTH)
        self._forget_copy(i)
        self.state[i] = SimulatedState.DROPPED
        self._free(self.nbytes[i])

    def wait_for_leaving(self, nbytes: int) -> int:
        """Wait for storages on their way out and release them, the first first. Returns bytes."""
        freed = 0
        while self.leaving and freed < nbytes:
            i = self.leaving.popleft()
            if self.state[i] is SimulatedState.GOING_OUT:
                self.end_out(i)
                freed += self.release(i)
        return freed

    def _finish(self, i: int) -> None:
        """Backward has used a storage for the last time."""
        if not self.system.single_backward:
            return
        if self.state[i] is SimulatedState.GOING_OUT:
            # The copy under way holds the memory until it has ended.
            self._deferred_frees.append((self.outs.pop(i), self.nbytes[i]))
        else:
            self._free(self.nbytes[i])
        self._forget_copy(i)
        self.state[i] = SimulatedState.DEAD

    def _clear_graves(self) -> None:
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
        # The executor would refuse it: it is counted, and the last tier takes it.
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
