"""The transitions of a storage, one method each. The manager and the evictor decide when to make them."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from chainer_ooc.errors import CorruptCopyError, SwapSpaceError
from chainer_ooc.planning.states import ByState
from chainer_ooc.swap import checksums
from chainer_ooc.swap.devices.protocol import (
    Both,
    Device,
    Known,
    Span,
    SwappedBlock,
    Transfer,
    Verdict,
)
from chainer_ooc.swap.events import Copied, Observer
from chainer_ooc.swap.prefetch import SavedSequence
from chainer_ooc.swap.recipe import Recipe, fingerprint_if_taken, fingerprint_of
from chainer_ooc.swap.storage import State, Storage

__all__ = ["Counters", "Transfers"]

#: Observers are not told of waits shorter than this (seconds).
_NOTICED = 20e-6


@dataclasses.dataclass
class Counters:
    """The transfers of a device so far.

    Attributes:
        bytes_out: Bytes copied out of the device's memory.
        bytes_in: Bytes copied back.
        bytes_out_lasting: The part of ``bytes_out`` that are parameters, gradients and state of optimizers.
        bytes_in_lasting: The same part of ``bytes_in``.
        bytes_out_used: The part of ``bytes_out`` whose arrays backward had used already: written for a second
            backward. With ``single_backward`` none is.
        storages_out: Allocations copied out.
        storages_in: Allocations copied back.
        hits: Reads that found the array in memory.
        prefetched: Allocations whose copy back began before backward asked for them.
        prefetch_hits: Prefetched allocations that were used before they had to leave again.
        bytes_discarded: Bytes freed with no copy, to be computed again.
        storages_remade: Allocations that were computed again.
        recompute_seconds: Time spent computing them.
        seconds: Time from the moment when memory became short to the end of the last function.
        copy_seconds: Time during which at least one copy ran, of those that are known to have ended.
        stall_fetch_seconds: Time that computing threads waited for arrays that nobody prefetched. On a GPU,
            where streams wait, this and the next are the host's waits.
        stall_late_seconds: Time that they waited for arrays that were prefetched too late.
        stall_room_seconds: Time that they waited for copies out, to make room.
        stall_trim_seconds: Time that they spent on giving freed memory back to the system.
    """

    bytes_out: int = 0
    bytes_in: int = 0
    bytes_out_lasting: int = 0
    bytes_in_lasting: int = 0
    bytes_out_used: int = 0
    storages_out: int = 0
    storages_in: int = 0
    hits: int = 0
    prefetched: int = 0
    prefetch_hits: int = 0
    bytes_discarded: int = 0
    storages_remade: int = 0
    recompute_seconds: float = 0.0
    seconds: float = 0.0
    copy_seconds: float = 0.0
    stall_fetch_seconds: float = 0.0
    stall_late_seconds: float = 0.0
    stall_room_seconds: float = 0.0
    stall_trim_seconds: float = 0.0

    @property
    def stall_in_seconds(self) -> float:
        """The time that computing threads waited for copies back."""
        return self.stall_fetch_seconds + self.stall_late_seconds

    @property
    def stall_out_seconds(self) -> float:
        """The time that computing threads waited for copies out."""
        return self.stall_room_seconds

    @property
    def stall_seconds(self) -> float:
        """The time that computing threads waited, for any cause."""
        return self.stall_in_seconds + self.stall_out_seconds + self.stall_trim_seconds

    @property
    def lost_seconds(self) -> float:
        """The time that computing threads spent on out-of-core mode: waits and recomputation."""
        waits = self.stall_fetch_seconds + self.stall_late_seconds + self.stall_room_seconds
        return waits + self.stall_trim_seconds + self.recompute_seconds  # asked at each function


class _Link:
    """The bytes copied in one direction, and the time during which a copy ran."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.seconds = self._busy_until = 0.0

    def note(self, nbytes: int, span: Span) -> None:
        self.nbytes += nbytes
        self.seconds += max(span[1] - max(span[0], self._busy_until), 0)
        self._busy_until = max(self._busy_until, span[1])


class Transfers:
    """Move single storages of one device. Its caller holds the manager's lock.

    Args:
        device: The memory, and the way out of it.
        make_room: Called with a number of bytes when the device has no memory for a transfer. Returns the
            bytes that it freed, 0 if there is nothing left to evict.
        observers: The observers of events.

    Attributes:
        counters: The transfers so far.
        leaving: The storages whose copies out are running, in the order in which they began.
        nbytes: The size of all storages of graphs in each state (bytes).
        lasting: What lasts longer than a graph: parameters, gradients, state of optimizers.
        moved_bytes: The bytes that have come into memory less those that were freed.
        dead: Dead storages. Any thread appends at any time.
        deferred_frees: Their blocks, which :meth:`run_deferred_frees` frees.
    """

    def __init__(
        self, device: Device, make_room: Callable[[int], int], observers: Sequence[Observer] = ()
    ) -> None:
        self.device = device
        self.counters = Counters()
        self.leaving: deque[weakref.ref[Storage]] = deque()
        self.observers = observers
        self._make_room = make_room
        self._busy_until = 0.0
        self._links = _Link(), _Link()  # in, out
        self._copies: deque[tuple[Copied, Transfer]] = (
            deque()
        )  # copies whose times are not known yet
        # Resident storages by the id of their owner, which lives as long as its entry.
        self._by_owner: dict[int, weakref.ref[Storage]] = {}
        self._by_state: ByState[weakref.ref[Storage]] = ByState()
        self.nbytes = self._by_state.nbytes
        self.lasting: ByState[weakref.ref[Storage]] = ByState()
        self._dead_lasting: deque[tuple[State, int, int]] = deque()
        self.moved_bytes = 0
        self.dead: deque[tuple[State, int, int, SavedSequence]] = deque()
        self._known = 0  # storages alive, or dead and still in `dead`
        self.deferred_frees: deque[tuple[SwappedBlock | None, Transfer | None, int]] = deque()
        self._recipes: deque[Recipe] = deque()
        # What was computed again and is being compared, with the arguments of the error if it differs.
        self._remade: deque[tuple[Verdict, tuple[Any, ...], weakref.ref[Storage]]] = deque()

    def find(self, owner: Any) -> Storage | None:
        """Return the resident storage in the memory of ``owner``, or ``None``."""
        reference = self._by_owner.get(id(owner))
        return reference() if reference else None

    def bandwidth(self, out: bool) -> float | None:
        """Return the bytes per second of copies in one direction, ``None`` before the first has ended."""
        with contextlib.suppress(RuntimeError):  # a GPU that has failed: what is known is told
            self._take_times()
        link = self._links[out]
        return link.nbytes / link.seconds if link.seconds > 0 else None

    def stalled(self, cause: str, start: float) -> None:
        """Count the time since ``start`` that the calling thread waited. ``cause`` completes a counter's ``stall_``."""
        end = time.perf_counter()
        name = f"stall_{cause}_seconds"
        setattr(self.counters, name, getattr(self.counters, name) + end - start)
        if end - start > _NOTICED:
            for observer in self.observers:
                observer.stalled(self.device.name, cause, (start, end))

    def register(self, storage: Storage) -> None:
        """Add a new storage, which is RESIDENT."""
        reference = weakref.ref(storage)
        self._by_owner[id(storage.owner)] = reference
        self._group_of(storage).add(storage.sequence, reference, storage.nbytes)
        self._known += storage.key is None

    def _group_of(self, storage: Storage) -> ByState[weakref.ref[Storage]]:
        return self._by_state if storage.key is None else self.lasting

    @property
    def has_living(self) -> bool:
        """Whether a storage of a graph is alive. Safe at any time in any thread."""
        return self._known > len(self.dead)

    # Asked by the policy.

    def members(self, state: State, used: bool | None = None) -> Iterator[Storage]:
        """Yield the storages in a state, in the order of saving. They may change their states meanwhile.

        Args:
            state: RESIDENT, BOTH or COMING_IN.
            used: Yield those that backward has used, or those that it has not; ``None`` for all.
        """
        for reference in self._by_state.members(state):
            storage = reference()
            if storage is None or used is (storage.remaining_uses > 0):  # of the other kind
                continue
            yield storage

    def first_leaving(self) -> Storage | None:
        """Return the storage whose copy out or check began first of those that are running, or ``None``."""
        while self.leaving:
            storage = self.leaving[0]()
            if storage is not None and storage.state in (State.GOING_OUT, State.CHECKING):
                return storage
            self.leaving.popleft()
        return None

    def first_left(self) -> Storage | None:
        """Return the same if its copy or check has ended, else ``None``, without waiting."""
        storage = self.first_leaving()
        running = None if storage is None else storage.verdict or storage.transfer
        return storage if running is not None and running.done() else None

    def end_leaving(self, storage: Storage) -> int:
        """GOING_OUT -> BOTH, CHECKING -> DISCARDED, or -> RESIDENT. Wait for that. Return the bytes freed."""
        if storage.state is State.CHECKING:
            return self.end_discard(storage)
        self.end_out(storage)
        return 0

    def inputs(self, storage: Storage) -> tuple[Storage, ...]:
        """Return the storages that a storage's recipe reads; none without a recipe."""
        return () if storage.recipe is None else storage.recipe.storages()

    def open_inputs(self, storage: Storage) -> tuple[Storage, ...]:
        """Return those of the inputs to which code may write unnoticed as long as it refers to them."""
        return () if storage.recipe is None else storage.recipe.open_inputs()

    def bytes_to_keep(self, storage: Storage) -> int | None:
        """Return the bytes that a discard takes first; ``None`` if the storage has no recipe."""
        return None if storage.recipe is None else storage.recipe.bytes_to_keep()

    def everything(self) -> list[Storage]:
        """Return all storages of graphs, in the order of saving."""
        return self._all_of(self._by_state)

    def all_lasting(self) -> list[Storage]:
        """Return all storages that last longer than a graph."""
        return self._all_of(self.lasting)

    @staticmethod
    def _all_of(group: ByState[weakref.ref[Storage]]) -> list[Storage]:
        references = group.storages
        found = (references[number]() for number in sorted(references))
        return [storage for storage in found if storage is not None]

    def begin_out(self, storage: Storage) -> None:
        """RESIDENT -> GOING_OUT. Begin to copy the storage out.

        Raises:
            SwapSpaceError: If there is no space outside of memory. The storage stays RESIDENT.
        """
        refused = None
        try:
            storage.transfer = self._copy_out(storage)
        except SwapSpaceError as error:
            refused = _explained(SwapSpaceError, error, f"{storage!r} cannot be moved out")
        # Outside of the handler: the first error's frames refer to the memory.
        if refused is not None:
            try:
                raise refused
            finally:
                del refused  # else it refers to this frame, and so to the callers' arrays
        self._move(storage, State.GOING_OUT)
        storage.dirty = False
        self.leaving.append(weakref.ref(storage))

    def end_out(self, storage: Storage) -> None:
        """GOING_OUT -> BOTH, or -> RESIDENT if the storage became dirty. Wait for the copy.

        Raises:
            SwapSpaceError: If writing failed twice. The storage is RESIDENT then.
        """
        transfer = storage.transfer
        assert transfer is not None
        start = time.perf_counter()
        try:
            try:
                transfer.join()
            except OSError:
                transfer.copy.free()
                transfer = self._copy_out(storage)
                transfer.join()
        except OSError as error:
            storage.transfer = None
            self._move(storage, State.RESIDENT)
            transfer.copy.free()
            what = f"{storage!r} could not be written, twice; it stays in memory, no data was lost"
            raise _explained(SwapSpaceError, error, what) from error
        finally:
            self.stalled("room", start)
        storage.transfer = None
        if storage.dirty:
            self._move(storage, State.RESIDENT)
            transfer.copy.free()
        else:
            storage.copy = transfer.copy
            self._move(storage, State.BOTH)
        self._copied(storage, transfer, out=True)

    def release(self, storage: Storage) -> None:
        """BOTH -> OUT. Free the memory. For RESIDENT see :meth:`discard`."""
        self._give_up(storage, State.OUT)

    def _give_up(self, storage: Storage, state: State) -> None:
        self._move(storage, state)
        if storage.key is None and not storage.used:
            storage.saved_sequence.requeue(storage)
        storage.ahead = False
        self._let_go(storage)

    def begin_discard(self, storage: Storage, planned: bool) -> bool:
        """RESIDENT -> CHECKING or DISCARDED, if its recipe computes just these bytes. Return whether it needs no copy.

        A plan may use more recipes than are used without one.
        """
        recipe = storage.recipe
        if recipe is None or (storage.dependents and not planned):
            return False
        verdict = recipe.check(self.device, storage, planned)
        if verdict is None or (verdict.done() and not verdict.equal()):
            return False
        new = [constant for constant in recipe.constants if not constant.is_kept]
        try:
            for constant in new:
                constant.keep()
        except MemoryError:  # it stays
            return False
        if new:  # another thread may have written to them since the recipe was checked
            pairs = [pair for constant in new for pair in constant.pairs()]
            verdict = Both(verdict, self.device.compare(pairs))
        self._check(storage, verdict)
        return True

    def _check(self, storage: Storage, verdict: Verdict) -> None:
        """RESIDENT -> CHECKING, and on to DISCARDED if the verdict is known. The recipe's inputs get one more use."""
        assert storage.recipe is not None
        for needed in storage.recipe.storages():
            needed.remaining_uses += 1
            if needed.dependents is None:
                needed.dependents = weakref.WeakSet()
            needed.dependents.add(storage)
        storage.fingerprint = fingerprint_if_taken(storage.recipe.content)
        if storage.fingerprint is None and not storage.recipe.trusted:
            storage.fingerprint = fingerprint_of(self.device, storage)
            if storage.fingerprint is None:  # the result could not be checked
                verdict = Known(False)
        storage.verdict = verdict
        self._move(storage, State.CHECKING)
        if verdict.done():
            self.end_discard(storage)
        else:
            self.leaving.append(weakref.ref(storage))

    def end_discard(self, storage: Storage) -> int:
        """CHECKING -> DISCARDED, and free the memory; -> RESIDENT if code has written or refers to it.

        Wait for the verdict. Return the bytes freed.
        """
        assert storage.verdict is not None
        start = time.perf_counter()
        is_unchanged = storage.verdict.equal()
        self.stalled("room", start)
        if not is_unchanged or storage.referenced_externally:
            self.cancel_discard(storage)
            return 0
        storage.verdict = None
        self.counters.bytes_discarded += storage.nbytes
        self._give_up(storage, State.DISCARDED)
        return storage.nbytes

    def cancel_discard(self, storage: Storage) -> None:
        """CHECKING -> RESIDENT: it stays, or leaves with a copy. Its recipe is worthless."""
        recipe, storage.recipe, storage.verdict = storage.recipe, None, None
        assert recipe is not None
        self._move(storage, State.RESIDENT)
        self._need_no_more(recipe, storage)

    def remake(self, storage: Storage, array: Any) -> None:
        """DISCARDED -> RESIDENT. Take ``array``, the recipe's result, as the storage's bytes.

        Raises:
            CorruptCopyError: If they are known to differ from the discarded bytes. The storage stays DISCARDED. On a
                GPU that is known later: see :meth:`check_remade`, which is called first.
        """
        assert storage.recipe is not None
        self.check_remade()
        layout = storage.recipe.layout
        owner, origin = self.device.take_buffer(array, layout, storage.nbytes, storage.page_offset)
        del array
        if storage.fingerprint is not None:
            verdict = self.device.matches(storage.fingerprint, owner, origin, storage.nbytes)
            if not verdict.done():
                error = checksums.not_remade(storage).args
                self._remade.append((verdict, error, weakref.ref(storage)))
            elif not verdict.equal():
                raise checksums.not_remade(storage)
        storage.owner, storage.origin = owner, origin
        self._by_owner[id(owner)] = weakref.ref(storage)
        self._move(storage, State.RESIDENT)
        self.moved_bytes += storage.nbytes
        self._need_no_more(storage.recipe, storage)
        self.counters.storages_remade += 1

    def check_remade(self, wait: bool = False) -> None:
        """Check what was computed again, as far as the comparisons have ended, or wait for all of them.

        On a GPU that has failed none ends any more: who waits for all, as when out-of-core mode ends, gets no error.

        Raises:
            CorruptCopyError: If something differs from what was discarded. As long as that is alive, the next calls
                raise, too.
        """
        if not self._remade or not self.device.may_move():
            return
        while self._remade and (wait or self._remade[0][0].done()):
            verdict, error, remade = self._remade[0]
            try:
                is_right = verdict.equal()
            except RuntimeError:  # CuPy's CUDARuntimeError
                if not wait:
                    raise
                self._remade.clear()
                return
            if is_right or remade() is None:
                self._remade.popleft()
            if not is_right:
                raise CorruptCopyError(*error)

    def begin_in(self, storage: Storage, ahead: bool = False) -> None:
        """OUT -> COMING_IN. Allocate memory and begin to copy the storage in, ahead of need or not.

        Raises:
            MemoryError: If there is no memory for the storage.
        """
        copy = storage.copy
        assert copy is not None
        owner, origin, transfer = self._again_with_room(
            storage.nbytes, lambda: self.device.copy_in(copy, storage.nbytes, storage.page_offset)
        )
        storage.owner, storage.origin, storage.transfer = owner, origin, transfer
        self._by_owner[id(owner)] = weakref.ref(storage)
        self._move(storage, State.COMING_IN)
        self.moved_bytes += storage.nbytes
        self.counters.bytes_in += storage.nbytes
        self.counters.bytes_in_lasting += storage.nbytes * (storage.key is not None)
        self.counters.storages_in += 1
        if ahead:
            storage.ahead = True
            self.counters.prefetched += 1

    def end_in(self, storage: Storage) -> None:
        """COMING_IN -> BOTH. Wait for the copy.

        Raises:
            OSError: If reading failed twice. The storage is OUT then.
        """
        start = time.perf_counter()
        try:
            self._join_arrival(storage)
        except OSError:
            self.begin_in(storage)
            try:
                self._join_arrival(storage)
            except CorruptCopyError:
                raise
            except OSError as error:
                what = f"{storage!r} could not be read, twice"
                raise _explained(OSError, error, what) from error
        finally:
            self.stalled("late" if storage.ahead else "fetch", start)

    def mark_dirty(self, storage: Storage) -> None:
        """BOTH -> RESIDENT, CHECKING -> RESIDENT: code that may write has the array. Free its copy."""
        if storage.state is State.CHECKING:
            self.cancel_discard(storage)
        elif storage.state is State.GOING_OUT:
            storage.dirty = True
        elif storage.state is State.BOTH:
            self._move(storage, State.RESIDENT)
            copy, storage.copy = storage.copy, None
            assert copy is not None
            copy.free()

    def drop(self, storage: Storage) -> None:
        """Any state -> DROPPED. Free the memory and the copy."""
        if storage.state is not State.DROPPED:
            if storage.state in (State.CHECKING, State.DISCARDED):
                assert storage.recipe is not None
                self._need_no_more(storage.recipe, storage)
            storage.recipe = storage.verdict = None
            self._move(storage, State.DROPPED)
            self.deferred_frees.append((storage.copy, storage.transfer, storage.nbytes))
            storage.copy = storage.transfer = None
            if storage.owner is not None:
                self._let_go(storage)
            self.run_deferred_frees()

    def defer_free(self, storage: Storage) -> None:
        """Queue a dead storage's blocks for freeing. Safe from ``__del__`` in any thread."""
        if storage.owner is not None:
            self._by_owner.pop(id(storage.owner), None)
        if storage.state in (State.CHECKING, State.DISCARDED):
            assert storage.recipe is not None
            self._recipes.append(storage.recipe)
        if storage.key is None:
            self.dead.append(
                (storage.state, storage.sequence, storage.nbytes, storage.saved_sequence)
            )
        else:
            self._dead_lasting.append((storage.state, storage.sequence, storage.nbytes))
        if storage.copy is not None or storage.transfer is not None:
            self.deferred_frees.append((storage.copy, storage.transfer, storage.nbytes))

    def run_deferred_frees(self) -> None:
        """Forget dead storages, and free queued blocks whose transfers have finished."""
        while self._dead_lasting:
            dead_state, sequence, size = self._dead_lasting.popleft()
            self.lasting.remove(sequence, size, dead_state)
            if dead_state is State.OUT:
                self.moved_bytes += size
        if not (self.dead or self.deferred_frees):
            return
        while self.dead:
            if self._recipes:  # its recipe's inputs may die with it
                self._need_no_more(self._recipes.popleft())
                continue
            state, number, nbytes, saved_sequence = self.dead.popleft()
            saved_sequence.living -= 1
            self._known -= 1
            self._by_state.remove(number, nbytes, state)
            # Without moves its death would free its memory now.
            if state in (State.OUT, State.DISCARDED, State.DROPPED):
                self.moved_bytes += nbytes
        for _ in range(len(self.deferred_frees)):
            copy, transfer, nbytes = self.deferred_frees[0]
            has_ended = transfer is None or transfer.done()  # an error leaves it where it is
            self.deferred_frees.popleft()
            if not has_ended:
                self.deferred_frees.append((copy, transfer, nbytes))
                continue
            if transfer is not None and transfer.copy is not copy:
                transfer.copy.free()
            if copy is not None:
                copy.free()

    def bytes_in_use(self) -> int:
        """Return the memory that saved storages take, and dead ones whose transfers have not ended (bytes)."""
        self.run_deferred_frees()
        living = sum(n for state, n in self.nbytes.items() if state.in_memory)
        dead = sum(n for _, transfer, n in self.deferred_frees if transfer is not None)
        return living + self.nbytes[State.COMING_IN] + dead

    def wait_for_deferred_frees(self) -> None:
        """Wait for the transfers of all queued blocks, and free them."""
        for _, transfer, _ in tuple(self.deferred_frees):
            if transfer is not None:
                transfer.wait()
        self.run_deferred_frees()

    def wait_for_dead(self) -> bool:
        """Wait for those copies of dead storages that still hold memory. Return whether there were any.

        Where calls return before what they compute is there, memory is used again in that order.
        """
        if self.device.runs_behind or not self.deferred_frees:
            return False
        start = time.perf_counter()
        self.wait_for_deferred_frees()
        self.stalled("room", start)
        return True

    def trim(self, desperate: bool = False) -> None:
        """Give the allocator's free memory back to the system; ``desperate`` if nothing else is left to do."""
        start = time.perf_counter()
        self.device.trim(desperate)
        self.stalled("trim", start)

    @staticmethod
    def _need_no_more(recipe: Recipe, dependent: Storage | None = None) -> None:
        for storage in recipe.storages():
            storage.remaining_uses -= 1
            if dependent is not None:
                assert storage.dependents is not None
                storage.dependents.discard(dependent)

    def _move(self, storage: Storage, state: State) -> None:
        before = storage.state
        storage.move_to(state)
        self._group_of(storage).move(storage.sequence, storage.nbytes, before, state)

    def _copied(self, storage: Storage, transfer: Transfer, out: bool) -> None:
        name, sequence = self.device.name, storage.sequence
        copied = Copied(name, storage.label, sequence, storage.nbytes, out)
        self._copies.append((copied, transfer))
        self._take_times()

    def _take_times(self) -> None:
        """Read the times of finished copies. A stream may report them late."""
        while self._copies:
            copied, transfer = self._copies[0]
            if not transfer.done():
                return
            self._copies.popleft()
            span = transfer.span()
            if span is None:  # less than a page: no copy on disk
                continue
            # Transfers overlap: count the time during which any runs.
            self.counters.copy_seconds += max(span[1] - max(span[0], self._busy_until), 0)
            self._busy_until = max(self._busy_until, span[1])
            self._links[copied.out].note(copied.nbytes, span)
            for observer in self.observers:
                observer.copied(copied, span)

    def _copy_out(self, storage: Storage) -> Transfer:
        checksums.check_unchanged(self.device, storage)
        if storage.fingerprint is not None or fingerprint_if_taken(storage.content) is not None:
            storage.fingerprint = fingerprint_of(self.device, storage)
        transfer: Transfer = self._again_with_room(
            storage.nbytes,
            lambda: self.device.copy_out(storage.owner, storage.origin, storage.nbytes),
        )
        self.counters.bytes_out += storage.nbytes
        self.counters.bytes_out_lasting += storage.nbytes * (storage.key is not None)
        self.counters.storages_out += 1
        if storage.used and not storage.kept:
            self.counters.bytes_out_used += storage.nbytes
        return transfer

    def _join_arrival(self, storage: Storage) -> None:
        transfer = storage.transfer
        assert transfer is not None
        try:
            transfer.join()
            checksums.check_arrival(self.device, storage)
        except OSError:
            storage.transfer = None
            self._move(storage, State.OUT)
            self._let_go(storage)
            raise
        storage.transfer = None
        self._move(storage, State.BOTH)
        storage.arrival = transfer.arrival()
        self._copied(storage, transfer, out=False)

    def _let_go(self, storage: Storage) -> None:
        self._by_owner.pop(id(storage.owner), None)
        self.moved_bytes -= storage.nbytes
        self.device.before_release()
        storage.owner = None

    def _again_with_room(self, nbytes: int, begin: Callable[[], Any]) -> Any:
        while True:
            try:
                return begin()
            except MemoryError:
                # Free memory may be fragmented: evict more until it fits.
                if not self._make_room(nbytes):
                    raise


def _explained(kind: type[OSError], error: OSError, what: str) -> OSError:
    """Return an error of ``kind`` with the number and the file of ``error`` and a message that names the storage."""
    return kind(error.errno, f"{what}: {error.strerror or error}", error.filename)
