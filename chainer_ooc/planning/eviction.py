"""The policy: which storages leave memory first, which are copied out behind the computation, which are prefetched.

The engine (``swap/``) and the simulator follow this one. They differ in what a storage is, and in what moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Generic, Protocol, TypeVar

from chainer_ooc.planning.states import AWAY, State
from chainer_ooc.planning.system import IN_FLIGHT

__all__ = ["EVERYTHING", "Besides", "Budget", "Evictor", "Moves", "Stored", "outside"]

EVERYTHING = 1 << 62


class Stored(Protocol):
    """A storage, as the policy sees it."""

    @property
    def state(self) -> State:
        """Where its bytes are."""

    @property
    def nbytes(self) -> int:
        """Its size (bytes)."""

    @property
    def used(self) -> bool:
        """Whether no function of the graph is known to need it any more."""

    @property
    def referenced_externally(self) -> bool:
        """Whether anything besides this storage refers to the memory: releasing it would free nothing."""


S = TypeVar("S", bound=Stored)


class Moves(Protocol[S]):
    """What moves single storages, and knows which are where."""

    @property
    def nbytes(self) -> Mapping[State, int]:
        """The size of all storages in each state (bytes)."""

    @property
    def leaving(self) -> Sized:
        """The storages whose copies out or checks have begun: nothing runs while it is empty."""

    def members(self, state: State, used: bool | None = None) -> Iterable[S]:
        """Return the storages in a state, the used ones or the others, in the order of saving.

        They may change their states meanwhile.
        """

    def first_leaving(self) -> S | None:
        """Return the storage whose copy out or check began first of those that are running, or ``None``."""

    def first_left(self) -> S | None:
        """Return the same if its copy or check has ended, else ``None``, without waiting."""

    def inputs(self, storage: S) -> Sequence[S]:
        """Return the storages from which a storage is computed again; none if it cannot be."""

    def open_inputs(self, storage: S) -> Sequence[S]:
        """Return those of the inputs to which code may write unnoticed as long as it refers to them."""

    def bytes_to_keep(self, storage: S) -> int | None:
        """Return the bytes that a discard takes first; ``None`` if the storage cannot be computed again."""

    def begin_out(self, storage: S) -> None:
        """RESIDENT -> GOING_OUT. Begin to copy the storage out."""

    def end_leaving(self, storage: S) -> int:
        """GOING_OUT -> BOTH, CHECKING -> DISCARDED, or -> RESIDENT if code may have written to it. Wait for that.

        Returns:
            The bytes freed.
        """

    def release(self, storage: S) -> None:
        """BOTH -> OUT. Free the memory."""

    def begin_discard(self, storage: S, planned: bool) -> bool:
        """RESIDENT -> CHECKING or DISCARDED, if it can be computed again. Return whether it needs no copy.

        A plan may discard more than is discarded without one.
        """

    def begin_in(self, storage: S, ahead: bool = False) -> None:
        """OUT -> COMING_IN. Begin to copy the storage in, ahead of need or not.

        Raises:
            MemoryError: If there is no memory for the storage.
        """

    def end_in(self, storage: S) -> None:
        """COMING_IN -> BOTH. Wait for the copy."""

    def wait_for_dead(self) -> bool:
        """Wait for those copies of dead storages that still hold memory. Return whether there were any."""

    def trim(self, desperate: bool = False) -> None:
        """Give the allocator's free memory back to the system; ``desperate`` if nothing else is left to do."""


class Budget(Protocol):
    """The watermarks, and the memory in use (bytes)."""

    @property
    def high(self) -> int:
        """The high watermark: room is made so that memory stays below it."""

    @property
    def low(self) -> int:
        """The low watermark: nothing moves below it."""

    def used_bytes(self) -> int:
        """Return the bytes in use now."""

    def high_beside_growth(self) -> int:
        """Return the high watermark less the most that recent functions took for themselves."""


class Besides(Protocol):
    """What can leave besides the storages of graphs."""

    def before(self) -> Sequence[Callable[[int], int]]:
        """Return what frees a number of bytes at less cost than copies of graphs' storages; each returns the bytes."""

    def after(self) -> Sequence[Callable[[int], int]]:
        """Return what frees a number of bytes when storages of graphs did not suffice; each returns the bytes."""


class Evictor(Generic[S]):
    """Free memory when it is short, and use free memory for copies ahead of need. It is not thread-safe.

    Storages with a valid copy leave before those that must be copied first. Among them go first the ones
    that backward has used, then the oldest, which backward needs last. Prefetched storages go last. A
    storage to which anything outside the graph refers stays: releasing it would free nothing.

    Args:
        moves: Makes the transitions.
        budget: The watermarks and the memory in use.

    Attributes:
        follows_plan: A plan decides what moves ahead of need. Storages on their way out are then released
            before those with a valid copy, because the plan chose them.
        discards: Storages that can be computed again are discarded instead of copied out.
        besides: What else can leave; ``None`` for nothing.
    """

    def __init__(self, moves: Moves[S], budget: Budget) -> None:
        self.follows_plan = False
        self.discards = True
        self.besides: Besides | None = None
        self._moves = moves
        self._budget = budget

    def make_room(self, nbytes: int) -> int:
        """Make room for an allocation of ``nbytes``. Return the bytes in use then.

        With 0, after a function, copies out begin behind the next function, unless a plan decides.
        """
        used = self._budget.used_bytes()
        if used + nbytes > self._budget.high:
            self.reclaim(nbytes)
            used = self._budget.used_bytes()
        if not nbytes and not self.follows_plan and used > self._budget.low:
            self.write_behind(used - self._budget.low)
        return used

    def reclaim(self, nbytes: int) -> None:
        """Evict storages until ``nbytes`` fit below the high watermark, or nothing is left to evict.

        Raises:
            SwapSpaceError: If there is no space outside of memory.
        """
        budget, moves = self._budget, self._moves
        most = budget.high - nbytes
        if budget.used_bytes() <= most:
            return
        moves.trim()
        first = [self.release_clean, self.release_leaving]
        if self.follows_plan:
            first.reverse()
        missing = budget.used_bytes() - most
        besides = self.besides
        before = () if besides is None else besides.before()
        after = () if besides is None else besides.after()
        for step in (
            *before,
            *first,
            self._free_dead,
            self.push_out,
            *after,
            self._release_arrivals,
        ):
            if missing <= 0:
                return
            if step(missing):
                moves.trim()
                missing = budget.used_bytes() - most
        if missing > 0:
            moves.trim(desperate=True)

    def release_clean(self, nbytes: int, used_only: bool = False) -> int:
        """Release storages with a valid copy: used ones first, then the oldest. Return the bytes freed."""
        self.settle()
        freed = 0
        if not self._moves.nbytes[State.BOTH]:
            return freed
        for used in (True,) if used_only else (True, False):
            for storage in self._moves.members(State.BOTH, used):
                if freed >= nbytes:
                    return freed
                freed += self.release_unless_held(storage)
        return freed

    def push_out(self, nbytes: int) -> int:
        """Copy storages out and release them: the oldest first, used ones last. Return the bytes freed.

        Storages that can be computed again are discarded, unless a discarded storage needs them.
        """
        moves, size = self._moves, self._moves.nbytes
        freed = 0
        used: list[S] = []
        for candidates in (moves.members(State.RESIDENT), used):
            for storage in candidates:
                if freed + size[State.GOING_OUT] + size[State.CHECKING] >= nbytes:
                    break
                if candidates is not used and storage.used:
                    used.append(storage)
                elif storage.state is not State.RESIDENT or storage.referenced_externally:
                    continue
                elif self.discards and moves.begin_discard(storage, planned=False):
                    if storage.state is State.DISCARDED:
                        freed += storage.nbytes
                else:
                    moves.begin_out(storage)
                    if size[State.GOING_OUT] > IN_FLIGHT:
                        freed += self.release_leaving(1)
        checked = size[State.CHECKING]
        freed += self.release_leaving(nbytes)
        if checked and freed < nbytes:  # what may not be discarded leaves with a copy
            freed += self.push_out(nbytes - freed)
        return freed

    def write_behind(self, nbytes: int) -> None:
        """Begin to copy the oldest storages out, until ``nbytes`` could be released without a wait."""
        self.settle()
        moves, size = self._moves, self._moves.nbytes
        for storage in moves.members(State.RESIDENT, False):
            going = size[State.GOING_OUT]
            if size[State.BOTH] + going >= nbytes or going >= IN_FLIGHT:
                return
            if storage.referenced_externally:
                continue
            if self.discards and moves.begin_discard(storage, planned=False):
                nbytes -= storage.nbytes
            else:
                moves.begin_out(storage)

    @property
    def may_prefetch(self) -> bool:
        """Whether anything has left memory, and no plan decides when it comes back."""
        size = self._moves.nbytes
        return not self.follows_plan and bool(size[State.OUT] or size[State.DISCARDED])

    def prefetch(self, following: Iterable[S]) -> None:
        """Begin to fetch storages, in this order, as far as free memory allows, unless a plan decides.

        The memory that recent functions took for themselves stays free. Otherwise the next function would
        evict what was just fetched.
        """
        if not self.may_prefetch:
            return
        most = self._budget.high_beside_growth()
        for storage in following:
            wanted = storage.state in AWAY and not storage.used
            if wanted and not self.begin_ahead(storage, most):
                return

    def begin_ahead(self, storage: S, most: int) -> bool:
        """Prefetch a storage, or what it is computed again from, if memory stays below ``most`` bytes.

        Returns:
            Whether the copies began.
        """
        wanted = outside(self._moves, storage)
        nbytes = sum(one.nbytes for one in wanted)
        room = most - self._budget.used_bytes()
        if room < nbytes:
            room += self.release_clean(nbytes - room, used_only=True)
        if room < nbytes:
            return False
        for needed in wanted:
            try:
                self._moves.begin_in(needed, ahead=True)
            except MemoryError:  # free memory is fragmented: fetch it when it is needed
                return False
        return True

    def give_up(self, storage: S) -> int:
        """Evict a storage because a plan says so: discard it or use its copy. Return the bytes freed."""
        to_keep = self._moves.bytes_to_keep(storage)
        if to_keep is not None:
            self.reclaim(to_keep)
        goes = self.discards and storage.state is State.RESIDENT
        if goes and not storage.referenced_externally and self._moves.begin_discard(storage, True):
            return storage.nbytes if storage.state is State.DISCARDED else 0
        return self.release_unless_held(storage)

    def release_unless_held(self, storage: S) -> int:
        """Release a storage with a valid copy unless anything else refers to it. Return the bytes freed."""
        if storage.state is not State.BOTH or storage.referenced_externally:
            return 0
        self._moves.release(storage)
        return storage.nbytes

    def settle(self) -> None:
        """Take note of the copies out and of the checks that have ended."""
        moves = self._moves
        if not moves.leaving:
            return
        while (storage := moves.first_left()) is not None:
            moves.end_leaving(storage)

    def release_leaving(self, nbytes: int) -> int:
        """Wait for copies out and checks, oldest first, and free their storages. Return the bytes freed."""
        moves = self._moves
        freed = 0
        if not moves.leaving:
            return freed
        while freed < nbytes and (storage := moves.first_leaving()) is not None:
            freed += moves.end_leaving(storage) + self.release_unless_held(storage)
        return freed

    def _free_dead(self, nbytes: int) -> int:
        """Wait for copies of dead storages: what else went out would go after them. Return whether any ran."""
        return self._moves.wait_for_dead()

    def _release_arrivals(self, nbytes: int) -> int:
        """Release prefetched storages, the one needed last first. Return the bytes freed."""
        freed = 0
        for storage in self._moves.members(State.COMING_IN):
            if freed >= nbytes:
                break
            self._moves.end_in(storage)
            freed += self.release_unless_held(storage)
        return freed


def outside(moves: Moves[S], storage: S) -> list[S]:
    """Return the storages to copy in for this one: itself, or those that computing it again needs."""
    if storage.state is State.OUT:
        return [storage]
    todo = [storage]
    for one in todo:
        if one.state is State.DISCARDED:
            todo += [needed for needed in moves.inputs(one) if needed not in todo]
    return [one for one in todo if one.state is State.OUT]
