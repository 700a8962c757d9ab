"""What lasts longer than a graph (parameters, gradients, the state of optimizers): which of it leaves, and when.

A graph's arrays are made forward and used once, backward. These are used again and again, in an order that hardly
changes: forward, backward, update. So the order of use is remembered, what is needed last leaves first, and what is
needed next comes back ahead of need.
"""

from __future__ import annotations

import enum
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

from chainer_ooc.planning.eviction import Evictor
from chainer_ooc.planning.states import State
from chainer_ooc.planning.system import IN_FLIGHT
from chainer_ooc.swap.budget import MemoryBudget
from chainer_ooc.swap.storage import Storage
from chainer_ooc.swap.transfers import Transfers

__all__ = ["DATA", "GRADIENT", "SLOTS", "STATE", "Lasting", "Use", "UseHistory"]

#: The keys of a parameter are this many numbers in a row: its array's, its gradient's, those of the optimizer's state.
SLOTS = 64
DATA, GRADIENT, STATE = 0, 1, 2
#: The number of uses that are remembered, at most.
_MOST = 1 << 17
#: While parameters are updated, what the next so many uses need does not leave.
_NEAR = 8
#: The number of coming uses that are looked at for copies ahead of need.
_AHEAD = 64
_NEVER = 1 << 60


class Use(enum.IntEnum):
    """The kinds of uses."""

    FORWARD = 0
    BACKWARD = 1
    UPDATE = 2
    OTHER = 3


class UseHistory:
    """Foresee the uses of keys: what followed the last time will follow again.

    Attributes:
        at: The place of the use in the past after which those to come are expected; -1 if none is.
        jumps: How often something else was used than expected.
    """

    def __init__(self) -> None:
        self._events: list[tuple[int, Use]] = []
        self._start = 0  # the place of the first event
        self._places: dict[int, list[int]] = {}
        self._updates: list[int] = []
        self._last: dict[object, int] = {}  # the places of pairs of uses and of single ones
        self.at = -1
        self.jumps = 0

    @property
    def now(self) -> int:
        """The place of the last use."""
        return self._start + len(self._events) - 1

    def note(self, key: int, use: Use) -> bool:
        """Note that a key is used. Return whether that was expected."""
        event = key, use
        before = self._events[-1] if self._events else None
        following = self.at + 1
        # A single use is a sequence, too: it may be followed by itself.
        foreseen = self.at >= 0 and following <= self.now and self._event(following) == event
        if foreseen:
            self.at = following
        else:
            at = self._last.get((before, event), self._last.get(event, -1))
            self.at = at if at >= self._start else -1
            self.jumps += 1
        self._events.append(event)
        place = self.now
        self._last[before, event] = self._last[event] = place
        self._places.setdefault(key, []).append(place)
        if use is Use.UPDATE:
            self._updates.append(place)
        if len(self._events) > _MOST:
            self._forget()
        return foreseen

    def next_use(self, key: int) -> int | None:
        """Return the place in the past that stands for the next use of a key, ``None`` if none is foreseen."""
        places = self._places.get(key, ())
        index = bisect_right(places, self.at)
        return places[index] if self.at >= 0 and index < len(places) else None

    def last_use(self, key: int) -> int:
        """Return the place of the last use of a key, -1 without any."""
        places = self._places.get(key)
        return places[-1] if places else -1

    def next_update(self) -> int | None:
        """Return the place that stands for the next update, ``None`` if none is foreseen."""
        index = bisect_right(self._updates, self.at)
        return self._updates[index] if self.at >= 0 and index < len(self._updates) else None

    @property
    def use(self) -> Use:
        """The kind of the last use."""
        return self._events[-1][1] if self._events else Use.OTHER

    def coming(self, most: int) -> Iterator[tuple[int, int]]:
        """Yield the keys of the next uses and their places, nearest first, ``most`` at most."""
        if self.at >= 0:
            for place in range(self.at + 1, min(self.at + 1 + most, self.now + 1)):
                yield self._event(place)[0], place

    def _event(self, place: int) -> tuple[int, Use]:
        return self._events[place - self._start]

    def _forget(self) -> None:
        gone = len(self._events) // 2
        del self._events[:gone]
        self._start += gone
        start = self._start
        self._places = {
            key: kept
            for key, places in self._places.items()
            if (kept := [p for p in places if p >= start])
        }
        self._updates = [place for place in self._updates if place >= start]
        self._last = {what: place for what, place in self._last.items() if place >= start}
        if self.at < start:
            self.at = -1
        self.jumps += 1


class Lasting:
    """Decide which storages that last leave memory, and which come back ahead of need.

    Its caller holds the manager's lock.

    Args:
        transfers: Makes the transitions.
        evictor: The policy for the storages of graphs.
        budget: The watermarks and the memory in use.
        may_move: Returns whether the settings in force allow it.
        collect: Makes storages of the parameters, gradients and state that have none yet.

    Attributes:
        active: They move: without them, the limit was not held.
        history: The order of their uses.
    """

    def __init__(
        self,
        transfers: Transfers,
        evictor: Evictor[Storage],
        budget: MemoryBudget,
        may_move: Callable[[], bool],
        collect: Callable[[], None],
    ) -> None:
        self.active = False
        self.history = UseHistory()
        self._transfers = transfers
        self._evictor = evictor
        self._budget = budget
        self._may_move = may_move
        self._collect = collect
        self._is_collecting = False
        self._by_key: dict[int, weakref.ref[Storage]] = {}
        self._next: dict[int, int] = {}  # where the next use of each key is foreseen
        self._jumps = -1
        self._ranking: list[int] | None = None
        self._changed = True  # there may be arrays without a storage
        self._in_use: Collection[int] = ()
        self._gone: deque[int] = deque()  # parameters that are dead
        self._over: set[int] = (
            set()
        )  # gradients that were used for the update: they will be cleared

    @property
    def is_moving(self) -> bool:
        """Whether any of it is outside of memory, or may leave without a copy."""
        size = self._transfers.lasting.nbytes
        return self.active and size[State.RESIDENT] < sum(size.values())

    @property
    def bytes_away(self) -> int:
        """The bytes that are outside of memory alone."""
        return self._transfers.lasting.nbytes[State.OUT]

    def register(self, storage: Storage) -> None:
        """Add a storage."""
        assert storage.key is not None
        self._by_key[storage.key] = weakref.ref(storage)
        self._over.discard(storage.key)
        self._next[storage.key] = self._foreseen(storage.key)
        self._ranking = None

    def forget(self, number: int) -> None:
        """Note that the ``number``-th parameter does not exist any more. Safe at any time in any thread."""
        self._gone.append(number)

    def _forget_gone(self) -> None:
        while self._gone:
            first = self._gone.popleft() * SLOTS
            for key in range(first, first + SLOTS):
                self._by_key.pop(key, None)
                self._next.pop(key, None)
                self._over.discard(key)
            self._ranking = None

    def note(self, keys: Sequence[int], use: Use) -> None:
        """Note that keys are used at one time."""
        if not keys or (use is Use.OTHER and set(keys).issubset(self._in_use)):
            return
        self._in_use = frozenset(keys)
        for key in keys:
            self.history.note(key, use)
            if use is Use.UPDATE and key % SLOTS == GRADIENT:
                self._over.add(key)
            else:
                self._over.discard(key)
        if self.history.jumps != self._jumps:
            self._jumps = self.history.jumps
            self._next = {key: self._foreseen(key) for key in self._by_key}
        else:
            for key in keys:
                self._next[key] = self._foreseen(key)
        self._ranking = None
        self._changed = True

    def may_have_changed(self) -> None:
        """Note that there may be arrays without a storage."""
        self._changed = True

    # What the evictor asks for.

    def before(self) -> Sequence[Callable[[int], int]]:
        """Return what goes before the storages of graphs: what is needed after backward, or after many updates."""
        if not self._may_move():
            return ()
        self.collect()
        beyond = self._far()
        return (
            lambda nbytes: self._release(nbytes, beyond),
            lambda nbytes: self._push_out(nbytes, beyond),
        )

    def after(self) -> Sequence[Callable[[int], int]]:
        """Return what goes when storages of graphs did not suffice."""
        return (self._release, self._push_out, self._release_arrivals) if self._may_move() else ()

    def collect(self) -> None:
        """Make storages of what has none yet."""
        self._forget_gone()
        if self._changed and not self._is_collecting:
            self._changed, self._is_collecting = False, True
            try:
                self._collect()
            finally:
                self._is_collecting = False

    # Ahead of need.

    def prefetch(self) -> None:
        """Begin to copy in what is used next, where memory is free or what is used later can be released."""
        size = self._transfers.lasting.nbytes
        if not size[State.OUT] or not self._may_move():
            return
        most = self._budget.high_beside_growth()
        ahead = 0
        for key, place in self.history.coming(_AHEAD):
            storage = self._storage(key)
            if storage is None or key in self._in_use:
                continue
            ahead += storage.nbytes
            if storage.state is State.OUT:
                room = most - self._budget.used_bytes()
                if room < storage.nbytes:
                    room += self._release(storage.nbytes - room, place)
                if room < storage.nbytes:
                    return
                try:
                    self._transfers.begin_in(storage, ahead=True)
                except MemoryError:
                    return
            if ahead > IN_FLIGHT:
                return

    def write_behind(self) -> None:
        """Begin to copy out what is used last, until memory could fall to the low watermark without a wait."""
        over = self._budget.used_bytes() - self._budget.low
        if over <= 0:
            return
        self._evictor.settle()
        self.collect()
        size, graphs = self._transfers.lasting.nbytes, self._transfers.nbytes
        near = self.history.at + _NEAR
        for storage in self._farthest_first(State.RESIDENT):
            going = size[State.GOING_OUT] + graphs[State.GOING_OUT]
            if size[State.BOTH] + graphs[State.BOTH] + going >= over or going >= IN_FLIGHT:
                return
            assert storage.key is not None
            if self._next.get(storage.key, _NEVER) <= near:
                return
            if storage.key not in self._over and not storage.referenced_externally:
                self._transfers.begin_out(storage)

    def move_all_out(self) -> None:
        """Move out everything to which nothing refers."""
        self.collect()
        self._push_out(_NEVER)
        self._release(_NEVER)

    def _storage(self, key: int) -> Storage | None:
        reference = self._by_key.get(key)
        return None if reference is None else reference()

    def _foreseen(self, key: int) -> int:
        """Return where the next use is foreseen. What is not foreseen comes late, and state later than gradients.

        What was never used is needed before what was: a model's first pass has not come to it yet.
        """
        place = self.history.next_use(key)
        if place is not None:
            return place
        last, slot = self.history.last_use(key), min(key % SLOTS, STATE)
        if last < 0 and slot == DATA:
            return _NEVER // 8 + key
        return _NEVER // 4 * (slot + 1) - last

    def _far(self) -> int:
        """Return the place of the next use beyond which what lasts leaves before what backward needs."""
        history = self.history
        if history.use is Use.UPDATE:
            return history.at + _NEAR
        update = history.next_update()
        if update is None:  # nothing is known: gradients and state are needed last
            return _NEVER // 4
        return update - 1

    def _farthest_first(self, state: State) -> Iterator[Storage]:
        """Yield the storages in a state, the one that is used last first."""
        if self._ranking is None:
            self._ranking = sorted(
                self._by_key, key=lambda key: self._next.get(key, _NEVER), reverse=True
            )
        for key in self._ranking:
            storage = self._storage(key)
            if storage is not None and storage.state is state:
                yield storage

    def _release(self, nbytes: int, beyond: int = -1) -> int:
        """Release storages with a valid copy whose next use is beyond a place. Return the bytes freed."""
        self._evictor.settle()
        freed = 0
        if not self._transfers.lasting.nbytes[State.BOTH]:
            return freed
        for over in (True, False):
            for storage in self._farthest_first(State.BOTH):
                assert storage.key is not None
                is_over = storage.key in self._over
                if freed >= nbytes:
                    return freed
                if not is_over and self._next.get(storage.key, _NEVER) <= beyond:
                    break
                if is_over is over:
                    freed += self._evictor.release_unless_held(storage)
        return freed

    def _push_out(self, nbytes: int, beyond: int = -1) -> int:
        """Copy storages out whose next use is beyond a place, and release them. Return the bytes freed."""
        moves, size = self._transfers, self._transfers.lasting.nbytes
        freed = 0
        for over in (False, True):
            for storage in self._farthest_first(State.RESIDENT):
                assert storage.key is not None
                is_over = storage.key in self._over
                if freed + size[State.GOING_OUT] >= nbytes:
                    break
                if not is_over and self._next.get(storage.key, _NEVER) <= beyond:
                    break
                if is_over is not over or storage.referenced_externally:
                    continue
                moves.begin_out(storage)
                if size[State.GOING_OUT] > IN_FLIGHT:
                    freed += self._evictor.release_leaving(1)
        return freed + self._evictor.release_leaving(nbytes - freed)

    def _release_arrivals(self, nbytes: int) -> int:
        """Release what is coming in, what is used last first. Return the bytes freed."""
        freed = 0
        for storage in self._farthest_first(State.COMING_IN):
            if freed >= nbytes:
                break
            self._transfers.end_in(storage)
            freed += self._evictor.release_unless_held(storage)
        return freed
