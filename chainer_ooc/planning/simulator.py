"""Simulate an iteration: computation, copies in two directions, and memory under the limit.

The simulation goes from step to step as the engine does. A policy (:mod:`chainer_ooc.planning.policies`)
decides between two functions: the engine's own one, or prior art's. This module computes the times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from chainer_ooc.planning.eviction import outside
from chainer_ooc.planning.links import Link, SimulatedTransfer
from chainer_ooc.planning.profile import Profile, Rerun
from chainer_ooc.planning.rerun import chain
from chainer_ooc.planning.states import AWAY, ByState, State
from chainer_ooc.planning.system import LOW_WATER, REMEMBERED_GROWTH, System
from chainer_ooc.planning.timeline import Interval, Timeline
from chainer_ooc.planning.use_order import UpcomingUses

__all__ = ["Policy", "SimulatedStorage", "Simulator", "simulate"]


class Policy(Protocol):
    """The decisions in a simulated iteration."""

    def begin(self, simulator: Simulator) -> None:
        """Begin an iteration."""

    def between(self, simulator: Simulator) -> None:
        """Act before a step."""

    def fetched(self, simulator: Simulator, group: Sequence[SimulatedStorage]) -> None:
        """Act when all storages that a backward step needs are in memory."""

    def make_room(self, simulator: Simulator, nbytes: int) -> None:
        """Make room under the limit for an allocation of ``nbytes``."""

    def read_again(self, simulator: Simulator, storage: SimulatedStorage) -> None:
        """Act when the re-runs before a step need a storage no more."""


class SimulatedStorage:
    """A saved storage in a simulation: see :class:`~chainer_ooc.planning.eviction.Stored`.

    Attributes:
        number: Its index in the profile.
        nbytes: Its size (bytes).
        state: Where its bytes are.
        remaining_uses: The number of backward steps, and of discarded storages, that still need it.
        used: Nothing needs it any more.
        dirty: The running copy is worthless.
        inputs: The saved storages from which re-runs make it, ``None`` if they cannot.
        referenced_externally: The step, its re-runs or the user's code refer to it.
    """

    state = State.RESIDENT
    used = dirty = False
    referenced_externally = True
    inputs: Sequence[SimulatedStorage] | None = None

    def __init__(self, number: int, nbytes: int, uses: int) -> None:
        self.number = number
        self.nbytes = nbytes
        self.remaining_uses = uses


class Simulator:
    """Simulate one iteration. Policies read its state and call its methods. Waits let time pass.

    It is to the policy what the engine's ``Transfers`` and ``MemoryBudget`` are: see
    :class:`~chainer_ooc.planning.eviction.Moves` and :class:`~chainer_ooc.planning.eviction.Budget`.

    Attributes:
        profile: The iteration.
        system: The memory and the links.
        now: The seconds since the iteration began.
        step: The step that is about to run or runs (index).
        storages: The saved storages that have been made so far, ``None`` for all others.
        nbytes: The size of all storages in each state (bytes).
        resident: The memory of saved storages, and of dead ones whose copies are running (bytes).
        leaving: The storages whose copies out are running, in the order in which they began.
        high: The high watermark (bytes).
        low: The low watermark (bytes).
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
        self.storages: list[SimulatedStorage | None] = [None] * len(profile.storages)
        self._by_state: ByState[SimulatedStorage] = ByState()
        self.nbytes = self._by_state.nbytes
        self.resident = 0
        self.leaving: deque[SimulatedStorage] = deque()
        self.reruns: list[tuple[int, tuple[int, ...]]] = []
        self.high = system.high_bytes
        self.low = int(system.limit_bytes * LOW_WATER)
        self._growth: deque[int] = deque([0], REMEMBERED_GROWTH)
        self._upcoming = UpcomingUses(profile.use_order)
        self._lingering = 0  # used storages that were not dropped
        self._keeps_all = False  # nothing is discarded now
        self._copying: dict[int, SimulatedTransfer] = {}
        self._links = [Link(tier) for tier in system.tiers]
        self._room = [tier.capacity for tier in system.tiers]
        self._tier: dict[int, int] = {}
        self._deferred_frees: list[tuple[SimulatedTransfer, int]] = []
        self._seconds = seconds
        self._held = [profile.fixed_bytes + held for held in profile.held]
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
        profile, policy, held, high = self.profile, self.policy, self._held, self.high
        between, storages, starts, grow = (
            policy.between,
            self.storages,
            self._starts,
            self._growth.append,
        )
        unmade = self._unmade()
        policy.begin(self)
        steps = zip(
            self._seconds or profile.seconds,
            *(profile.freed, profile.used, profile.made, profile.made_bytes, profile.need_bytes),
            strict=True,
        )
        for number, (seconds, freed, used, made, made_bytes, need) in enumerate(steps):
            self.step = number
            if self._deferred_frees:
                self._run_deferred_frees()
            for i in freed:
                unmade[i].referenced_externally = False
            between(self)
            if used:
                group = [unmade[i] for i in used]
                self._fetch(group)
                policy.fetched(self, group)
            peak = held[number] + self.resident + need
            if peak > high:
                policy.make_room(self, need)
                peak = held[number] + self.resident + need
            if peak > self._peak:
                self._peak = peak
            starts.append(self.now)
            if self._detailed:
                self._note_step(number, seconds, peak)
            self.now += seconds
            self.resident += made_bytes
            for i in made:
                storages[i] = storage = unmade[i]
                self._by_state.add(i, storage, storage.nbytes)
            grow(need)
            if used:
                self._release(group)
        for link in self._links:
            link.advance(self.now)
        return self._result()

    def _unmade(self) -> dict[int, SimulatedStorage]:
        """Return the saved storages as they are when they have been made."""
        saved, sources = self.profile.storages, self.profile.sources
        found = {
            i: SimulatedStorage(i, saved[i].nbytes, len(saved[i].uses)) for i in self.profile.saved
        }
        for i in found.keys() & sources.keys():
            found[i].inputs = [found[n] for n in sources[i]]
        return found

    def _fetch(self, group: Sequence[SimulatedStorage]) -> None:
        """Bring the storages that the step needs into memory: wait for their copies, or make them again."""
        away = []
        for storage in group:
            storage.referenced_externally = True
            if not storage.state.in_memory:
                away.append(storage)
        if not away:
            return
        begun: list[SimulatedStorage] = []
        for storage in away:
            if storage.state in AWAY:
                for one in self._begin(storage):
                    if not one.referenced_externally:
                        one.referenced_externally = True
                        begun.append(one)
        for storage in begun:
            storage.referenced_externally = False
        discarded = [storage for storage in away if storage.state is State.DISCARDED]
        if discarded:
            self._run_again(discarded)
        for storage in away:
            if not storage.state.in_memory:
                self._bring_in(storage)

    def _begin(self, storage: SimulatedStorage) -> list[SimulatedStorage]:
        """Begin to fetch a storage that is out, or what it is made again from. Return what was begun."""
        wanted = outside(self, storage)
        for needed in wanted:
            if self.used_bytes() + needed.nbytes > self.high:
                self.policy.make_room(self, needed.nbytes)
            self.begin_in(needed)
        return wanted

    def _bring_in(self, storage: SimulatedStorage) -> None:
        """Bring a storage into memory that is not there."""
        if storage.state in AWAY:
            self._begin(storage)
        if storage.state is State.DISCARDED:
            self._run_again([storage])
        elif storage.state is State.COMING_IN:
            self.end_in(storage)

    def _run_again(self, wanted: Sequence[SimulatedStorage]) -> None:
        storages = self.storages
        order, reads = chain(self.profile, [storage.number for storage in wanted], self._is_there)
        last = {i: n for n, rerun in order for i in (*rerun.writes, *rerun.reads)}
        held = []  # so that making one storage again cannot evict another
        for storage in [*wanted, *(one for i in reads if (one := storages[i]) is not None)]:
            leaves = storage.state in (State.RESIDENT, State.GOING_OUT, State.OUT)
            if not leaves and not storage.referenced_externally:
                storage.referenced_externally = True
                held.append(storage)
        temporary: dict[int, int] = {}
        for n, rerun in order:
            read = [one for i in rerun.reads if (one := storages[i]) is not None]
            arrays = []
            for one in read:
                if not one.state.in_memory:
                    self._bring_in(one)
                if not one.referenced_externally:
                    one.referenced_externally = True
                    arrays.append(one)
            made = self._make_again(n, rerun, temporary)
            for one in arrays:
                one.referenced_externally = False
            if temporary:
                temporary = {i: nbytes for i, nbytes in temporary.items() if last[i] != n}
            for one in (*read, *made):
                if last[one.number] == n and one not in wanted:
                    if one in held:
                        one.referenced_externally = False
                    self.policy.read_again(self, one)
        for storage in held:
            storage.referenced_externally = False
        self.reruns.append((self.step, tuple(n for n, _ in order)))

    def _make_again(
        self, number: int, rerun: Rerun, temporary: dict[int, int]
    ) -> list[SimulatedStorage]:
        """Run one function again. What it makes besides discarded storages is added to ``temporary``."""
        back = []
        for i in rerun.writes:
            storage = self.storages[i]
            if storage is not None and storage.state is State.DISCARDED:
                back.append(storage)
            else:
                temporary[i] = self.profile.storages[i].nbytes
        nbytes = sum(storage.nbytes for storage in back)
        beside = rerun.workspace_bytes + sum(temporary.values())
        if self.used_bytes() + nbytes + beside > self.high:
            self.policy.make_room(self, nbytes + beside)
        self._take(nbytes)
        self._note_peak(self.used_bytes() + beside)
        if self._detailed:
            self._intervals.append(Interval("rerun", number, self.now, self.now + rerun.seconds))
        self.now += rerun.seconds
        self._rerun += rerun.seconds
        for storage in back:
            self._move(storage, State.RESIDENT)
            for needed in storage.inputs or ():
                needed.remaining_uses -= 1
                if not needed.remaining_uses:
                    needed.used = True
                    self._lingering += 1
        return back

    def _is_there(self, i: int) -> bool:
        storage = self.storages[i]
        return storage is not None and storage.state not in (State.DISCARDED, State.DROPPED)

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
            max(0, self._peak - self.high),
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

    def _release(self, group: Sequence[SimulatedStorage]) -> None:
        """Count a use of each storage; drop those that nothing needs any more."""
        single_backward, saved, step = self.system.single_backward, self.profile.storages, self.step
        for storage in group:
            free_from = saved[storage.number].free_from
            storage.referenced_externally = free_from > step
            storage.remaining_uses -= 1
            if not storage.remaining_uses:
                storage.used = True
                self._lingering += 1
        for storage in group:
            if storage.state is State.GOING_OUT and not (single_backward and storage.used):
                self._note_who_holds(storage)
        if single_backward:
            for storage in group:
                if storage.used:
                    self._drop(storage)

    def _note_who_holds(self, storage: SimulatedStorage) -> None:
        """Mark a storage as dirty if it is still being copied out, and make again what depends on it.

        The engine cannot tell who refers to it: the copy, or code that may write to it.
        """
        copy = self._copying[storage.number]
        copy.link.advance(self.now)
        if copy.end < 0:
            self._keeps_all = True
            for one in self.storages:
                if one and one.state is State.DISCARDED and storage in (one.inputs or ()):
                    self._bring_in(one)
            self._keeps_all = False
            if storage.state is State.BOTH:  # the copy has ended meanwhile
                self._forget_copy(storage)
                self._move(storage, State.RESIDENT)
            else:
                storage.dirty = storage.state is State.GOING_OUT

    # Asked by policies.

    def used_bytes(self) -> int:
        """Return the bytes in use now, between two functions."""
        if self._deferred_frees:
            self._run_deferred_frees()
        return self._held[self.step] + self.resident

    def high_beside_growth(self) -> int:
        """Return the high watermark less the most that recent functions took for themselves."""
        return self.high - max(self._growth)

    def members(self, state: State, used: bool | None = None) -> Iterable[SimulatedStorage]:
        """Return the storages in a state, the used ones or the others, in the order in which they were made."""
        if used and not self._lingering:
            return ()
        found = self._by_state.members(state)
        if used is None or not self._lingering:
            return found
        return (storage for storage in found if storage.used is used)

    def first_leaving(self) -> SimulatedStorage | None:
        """Return the storage whose copy out began first of those that are running, or ``None``."""
        while self.leaving:
            if self.leaving[0].state is State.GOING_OUT:
                return self.leaving[0]
            self.leaving.popleft()
        return None

    def first_left(self) -> SimulatedStorage | None:
        """Return the same if its copy has ended, else ``None``."""
        leaving = self.leaving
        while leaving:
            storage = leaving[0]
            if storage.state is State.GOING_OUT:
                copy = self._copying[storage.number]
                copy.link.advance(self.now)
                return storage if copy.end >= 0 else None
            leaving.popleft()
        return None

    def inputs(self, storage: SimulatedStorage) -> Sequence[SimulatedStorage]:
        """Return the saved storages from which re-runs make a storage; none if it cannot be made again."""
        return storage.inputs or ()

    def bytes_to_keep(self, storage: SimulatedStorage) -> int | None:
        """Return 0: a discard takes no memory here; ``None`` if a storage cannot be made again."""
        return None if storage.inputs is None else 0

    def following(self, group: Iterable[SimulatedStorage]) -> Iterator[SimulatedStorage]:
        """Yield the storages that backward uses after these and that are not being fetched yet, nearest first."""
        for i in self._upcoming.after([storage.number for storage in group]):
            storage = self.storages[i]
            if storage is not None:
                yield storage

    # Done by policies.

    def begin_out(self, storage: SimulatedStorage) -> None:
        """RESIDENT -> GOING_OUT. Begin to copy a storage out."""
        tier = self._tier[storage.number] = self._tier_for(storage)
        copy = self._links[tier].begin(storage.number, storage.nbytes, False, self.now)
        self._copying[storage.number] = copy
        self._note_copy(copy, storage.nbytes)
        self._move(storage, State.GOING_OUT)
        self.leaving.append(storage)

    def end_out(self, storage: SimulatedStorage) -> None:
        """GOING_OUT -> BOTH, or -> RESIDENT if the copy is worthless. Wait for the copy."""
        self._wait(self._copying.pop(storage.number), "wait out")
        if storage.dirty:
            storage.dirty = False
            self._forget_copy(storage)
            self._move(storage, State.RESIDENT)
        else:
            self._move(storage, State.BOTH)

    def end_leaving(self, storage: SimulatedStorage) -> int:
        """GOING_OUT -> BOTH, or -> RESIDENT. Wait for the copy. No memory is freed: discards end at once here."""
        self.end_out(storage)
        return 0

    def cancel_out(self, storage: SimulatedStorage) -> bool:
        """GOING_OUT -> RESIDENT, if the copy has not moved a byte yet. Return whether it was canceled."""
        copy = self._copying[storage.number]
        copy.link.advance(self.now)
        if not copy.link.cancel(copy):
            return False
        self._bytes[0] -= storage.nbytes
        del self._copying[storage.number]
        self.leaving.remove(storage)
        self._forget_copy(storage)
        self._move(storage, State.RESIDENT)
        return True

    def release(self, storage: SimulatedStorage) -> None:
        """BOTH -> OUT. Free the memory."""
        self._give_up(storage, State.OUT)

    def begin_discard(self, storage: SimulatedStorage, planned: bool) -> bool:
        """RESIDENT -> DISCARDED, if a plan says so and nobody can write to what the storage is made from.

        Free the memory; what it is made from gets one more use. Which re-runs are cheap enough without a plan is not
        recorded.
        """
        if not planned or storage.inputs is None or self._keeps_all:
            return False
        for one in storage.inputs:
            open_to_all = one.dirty or (one.state is State.RESIDENT and one.referenced_externally)
            if open_to_all or one.state is State.DROPPED:
                return False
        for needed in storage.inputs:
            self._lingering -= needed.used
            needed.remaining_uses += 1
            needed.used = False
        self._give_up(storage, State.DISCARDED)
        return True

    def begin_in(self, storage: SimulatedStorage, ahead: bool = False) -> None:
        """OUT -> COMING_IN. Begin to copy a storage in."""
        link = self._links[self._tier[storage.number]]
        copy = link.begin(storage.number, storage.nbytes, True, self.now)
        self._copying[storage.number] = copy
        self._note_copy(copy, storage.nbytes)
        self._move(storage, State.COMING_IN)
        self._take(storage.nbytes)

    def end_in(self, storage: SimulatedStorage) -> None:
        """COMING_IN -> BOTH. Wait for the copy."""
        i, before = storage.number, self.now
        copy = self._copying.pop(i)
        self._wait(copy, "wait in")
        self._waits[i] = self._waits.get(i, 0.0) + self.now - before
        self._slack.setdefault(i, self.now - copy.end)
        self._move(storage, State.BOTH)

    def wait_for_dead(self) -> bool:
        """Wait for the copies of dead storages. Return whether there were any."""
        if not self._deferred_frees:
            return False
        for copy, _ in self._deferred_frees:
            self._wait(copy, "wait out")
        self._run_deferred_frees()
        return True

    def trim(self, desperate: bool = False) -> None:
        """Do nothing: freed memory is free."""

    # States.

    def _move(self, storage: SimulatedStorage, state: State) -> None:
        self._by_state.move(storage.number, storage.nbytes, storage.state, state)
        storage.state = state

    def _give_up(self, storage: SimulatedStorage, state: State) -> None:
        self._move(storage, state)
        if not storage.used:
            self._upcoming.requeue(storage.number)
        self._take(-storage.nbytes)

    def _drop(self, storage: SimulatedStorage) -> None:
        """Any state -> DROPPED. Free the memory and the copy."""
        if storage.state is State.GOING_OUT:
            # The running copy keeps the memory until it ends.
            self._deferred_frees.append((self._copying.pop(storage.number), storage.nbytes))
        else:
            self._take(-storage.nbytes)
        if storage.number in self._tier:
            self._forget_copy(storage)
        self._by_state.remove(storage.number, storage.nbytes, storage.state)
        storage.state = State.DROPPED
        self._lingering -= 1

    def _run_deferred_frees(self) -> None:
        for link in self._links:
            link.advance(self.now)
        running = [one for one in self._deferred_frees if one[0].end < 0]
        ended = sum(nbytes for copy, nbytes in self._deferred_frees if copy.end >= 0)
        self._deferred_frees = running
        if ended:
            self._take(-ended)

    # Time and memory.

    def _tier_for(self, storage: SimulatedStorage) -> int:
        for tier, room in enumerate(self._room):
            if room is None:
                return tier
            if room >= storage.nbytes:
                self._room[tier] = room - storage.nbytes
                return tier
        # The engine could not make this copy: count it, and use the last tier.
        self._unplaced += storage.nbytes
        return len(self._room) - 1

    def _forget_copy(self, storage: SimulatedStorage) -> None:
        tier = self._tier.pop(storage.number)
        room = self._room[tier]
        if room is not None:
            self._room[tier] = room + storage.nbytes

    def _note_copy(self, copy: SimulatedTransfer, nbytes: int) -> None:
        self._bytes[copy.inward] += nbytes
        if self._detailed:
            self._copies.append(copy)

    def _take(self, nbytes: int) -> None:
        self.resident += nbytes
        if self._detailed:
            self._memory.append((self.now, self._held[self.step] + self.resident))

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
