"""SwapManager: what the graph asks of a device's memory, and room for what is allocated there."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from chainer_ooc import wording
from chainer_ooc.errors import GraphReleasedError, OutOfMemoryError
from chainer_ooc.planning.system import MARGIN
from chainer_ooc.settings import Settings
from chainer_ooc.swap import fingerprints
from chainer_ooc.swap.budget import MemoryBudget
from chainer_ooc.swap.devices.protocol import Device, Layout, Span
from chainer_ooc.swap.devices.ram import native
from chainer_ooc.swap.events import Observer
from chainer_ooc.swap.eviction import EVERYTHING, Evictor, outside, to_be_made
from chainer_ooc.swap.executor import PlanExecutor
from chainer_ooc.swap.prefetch import UseOrder
from chainer_ooc.swap.recipe import Recipe, checksum_of
from chainer_ooc.swap.storage import AWAY, PackedArray, State, Storage
from chainer_ooc.swap.system import forks
from chainer_ooc.swap.transfers import Counters, Transfers

__all__ = ["SwapManager"]

_WRITEABLE = 0x400  # NPY_ARRAY_WRITEABLE of numpy/ndarraytypes.h


class SwapManager:
    """Moves the storages of one device.

    Nothing moves while the device's memory is below the low-water mark. Past it, the oldest storages that
    nobody else holds are copied out behind the computation: backward needs them last. When there is no
    room for what is announced (:meth:`make_room`), storages give up their memory. In backward they are
    fetched ahead of their use, in the order in which backward will use them.

    All methods may be called from any thread; transfers run beside them.

    Args:
        device: The memory and the way out of it.
        settings: Returns the settings in force in the calling thread.
        save_pending: Called when memory is no longer plenty: save what was put off until then.
        is_read_only: Tells whether the code that reads arrays in the calling thread leaves them as they are.
        observers: Who is told what happens: a list that may change.

    Attributes:
        budget: The limit, and where memory stands.
        has_been_short: Whether memory has passed the low-water mark before, or all had to go out.
        follows_plan: Whether a plan decides what moves ahead of need.
        counters: What has been done so far.
        tracker: What follows the iterations that use this device: the graph's.
    """

    _transfers_type = Transfers

    def __init__(
        self,
        device: Device,
        settings: Callable[[], Settings],
        save_pending: Callable[[], None] = lambda: None,
        is_read_only: Callable[[], bool] = lambda: False,
        observers: list[Observer] | None = None,
    ) -> None:
        self.device = device
        self.settings = settings
        self.save_pending = save_pending
        self.is_read_only = is_read_only
        self.budget = MemoryBudget(device, settings)
        self._observers = [] if observers is None else observers
        self._transfers = self._transfers_type(device, self.reclaim, self._observers)
        self.counters: Counters = self._transfers.counters
        self._evictor = Evictor(self._transfers, self.budget)
        self._order = UseOrder()
        self._lock = native.EngineLock()
        self._sequence = 0
        self._has_warned = self._is_remaking = False
        self.has_been_short = False
        self.follows_plan = False
        self.tracker: Any = None
        self._low_after_graph = (
            0  # the low-water mark, where free memory is kept up to the high one
        )
        # What is given up again once it has served to make others.
        self._evict_after_recompute: weakref.WeakSet[Storage] = weakref.WeakSet()
        _managers.add(self)

    @property
    def limit(self) -> int:
        """The limit in force (bytes)."""
        return self.budget.limit

    @property
    def busy(self) -> bool:
        """Whether the calling thread is inside one of these methods, but not in what a recipe runs."""
        return bool(self._lock._is_owned()) and not self._is_remaking

    # What the graph asks.

    def save(self, array: Any, label: str) -> PackedArray | None:
        """Return what stands in for ``array``, or ``None`` if it must stay as it is.

        Args:
            array: An array of this device.
            label: The function that saves it.
        """
        location = self.device.locate(array)
        settings = self.settings()
        if location is None or location.nbytes < max(settings.min_bytes, 1):
            return None
        with self._lock:
            storage = self._transfers.find(location.owner)
            if storage is None:
                self._transfers.run_deferred_frees()
                self._sequence += 1
                storage = Storage(
                    self, self._sequence, location.owner, location.nbytes, location.address, label
                )
                self._order.save(storage)
                self._transfers.register(storage)
                if settings.verify:
                    fingerprints.begin(self.device, storage)
            layout = Layout(
                array.dtype,
                array.shape,
                array.strides,
                location.offset - storage.origin,
                _is_writeable(array),
            )
            return PackedArray(storage, layout, array)

    def add_use(self, group: Iterable[PackedArray], rank: int = 0) -> None:
        """Tell that one more function will use ``group`` in backward.

        Args:
            group: What it saved.
            rank: Its rank in the graph: functions run backward by falling rank.
        """
        with self._lock:
            for storage in {saved.storage for saved in group}:
                storage.remaining_uses += 1
                storage.rank = max(storage.rank, rank)

    def fingerprint(self, saved: PackedArray) -> int | None:
        """Return the checksum of what the storage of an array has now; ``None`` if nobody knows."""
        storage = saved.storage
        with self._lock:
            if storage.state.in_memory and storage.copy is None:
                if storage.checksum is None:
                    storage.checksum = checksum_of(self.device, storage)
                else:
                    fingerprints.check_unchanged(self.device, storage)
            return storage.checksum

    def check_unchanged(self, array: Any) -> None:
        """Warn if an array that is saved, and that ``verify`` looks at, has been written to."""
        with self._lock:
            if (storage := self._resident_of(array)) is not None:
                fingerprints.check_unchanged(self.device, storage)

    def accept_changes(self, array: Any) -> None:
        """Take what an array that is saved has now for what it should have."""
        with self._lock:
            storage = self._resident_of(array)
            if storage is not None and storage.checksum is not None:
                self._mark_dirty(storage)
                storage.checksum = checksum_of(self.device, storage)

    def _resident_of(self, array: Any) -> Storage | None:
        location = self.device.locate(array)
        storage = None if location is None else self._transfers.find(location.owner)
        return storage if storage is not None and storage.state.in_memory else None

    def give_recipe(self, saved: PackedArray, recipe: Recipe) -> None:
        """Let the storage of ``saved``, a resident array, be computed again instead of moved.

        It is where the array fills its storage. The first recipe is taken.
        """
        storage, layout = saved.storage, saved.layout
        with self._lock:
            if (
                storage.recipe is None
                and storage.state is State.RESIDENT
                and math.prod(layout.shape) * layout.dtype.itemsize == storage.nbytes
                and not layout.offset
                and all(one.storage.manager is self for one in recipe.inputs)
            ):
                storage.recipe = recipe

    def read(self, saved: PackedArray, read_only: bool = False) -> Any:
        """Return the array of ``saved``, fetched first where it is out.

        Args:
            saved: What stands in for it.
            read_only: The reader does not write to it, so that the copy outside stays valid.

        Raises:
            GraphReleasedError: If it was dropped after its last use.
            OSError: If the copy cannot be read, twice.
        """
        storage = saved.storage
        with self._lock:
            array = saved.alive()
            if storage.state is State.DROPPED:
                if array is not None:
                    return array
                raise GraphReleasedError(
                    f"an array that {storage.label} saved was dropped after its use in backward, because "
                    "single_backward=True; to run backward through a graph twice, or to read its arrays "
                    "after it, enable out-of-core mode with single_backward=False"
                )
            if storage.state.in_memory:
                self.counters.hits += 1
            else:
                self._bring_in(storage)
            if storage.ahead:
                storage.ahead = False
                self.counters.prefetch_hits += 1
            if array is None:
                array = self.device.view(storage.owner, storage.origin, saved.layout)
                saved.remember(array)
            if not read_only and saved.layout.writeable:
                self._mark_dirty(storage)
            return array

    def fetch(self, group: Sequence[PackedArray], read_only: bool) -> list[Any]:
        """Return the arrays of ``group``; their transfers are all begun before one is waited for."""
        with self._lock:
            # What is resident first: held by this list, it cannot be released for the others.
            arrays = {id(s): self.read(s, read_only) for s in group if s.storage.state.in_memory}
            for saved in group:
                if id(saved) not in arrays:
                    self._begin_in(saved.storage)
                elif saved.storage.verified:
                    fingerprints.check_unchanged(self.device, saved.storage)
            discarded = [saved.storage for saved in group if saved.storage.state is State.DISCARDED]
            if discarded:
                self._make_again(discarded)
            return [
                arrays.get(id(s)) if id(s) in arrays else self.read(s, read_only) for s in group
            ]

    def prefetch(self, group: Iterable[PackedArray]) -> None:
        """Begin to fetch what backward needs after ``group``, as far ahead as free memory allows.

        As much is left free as functions took for themselves of late: what is fetched too early would have to
        make room for the next of them, and be fetched again.
        """
        with self._lock:
            following = self._order.use({saved.storage for saved in group})
            size = self._transfers.nbytes
            if self.follows_plan or not (size[State.OUT] or size[State.DISCARDED]):
                return
            most = self.budget.high_beside_growth()
            for storage in following:
                wanted = storage.state in AWAY and not storage.used
                if wanted and not self._evictor.begin_ahead(storage, most):
                    return

    def release_use(self, group: Iterable[PackedArray], drop: bool) -> None:
        """Tell that a function has used ``group`` in backward.

        Args:
            group: What it had saved.
            drop: What no other function will use is not needed again.
        """
        with self._lock:
            self._transfers.run_deferred_frees()  # the dead need nothing any more
            storages = {saved.storage for saved in group}
            for storage in storages:
                storage.remaining_uses -= 1
            over = {s for s in storages if drop and s.used and not (s.kept or s.dependents)}
            self._note_who_holds(storages - over)
            for storage in storages:  # what is made from one may have been made meanwhile
                if drop and storage.used and not (storage.kept or storage.dependents):
                    self._transfers.drop(storage)

    def returned(self, group: Iterable[PackedArray]) -> None:
        """Tell that a function has used ``group`` in backward, and will use it once more: see :meth:`keep`."""
        with self._lock:
            self._note_who_holds({saved.storage for saved in group})

    def keep(self, group: Iterable[PackedArray]) -> None:
        """Drop none of ``group`` after its last use: others may read it than the functions that are expected to."""
        with self._lock:
            for saved in group:
                saved.storage.kept = True

    def _note_who_holds(self, storages: Iterable[Storage]) -> None:
        for storage in storages:
            if storage.state.in_memory and storage.referenced_externally:
                # Backward gave it to somebody, a gradient say, who may write to it.
                self._mark_dirty(storage)

    def usage_without_offload(self, used: int) -> int:
        """Return what memory in use would be (bytes) if nothing had been moved since the manager was made.

        Its rise while a function runs is what the function takes for itself, whatever goes and comes meanwhile.
        """
        with self._lock:
            self._transfers.run_deferred_frees()
        return used - self._transfers.moved_bytes()

    def moved_bytes(self) -> int:
        """Return by how much moves have changed the memory in use since the manager was made (bytes)."""
        return self._transfers.moved_bytes()

    def granted_bytes(self) -> int:
        """Return up to which memory in use allocations may be made with nobody asked (bytes)."""
        if self._observers:  # they are told of each
            return 0
        _, high, low = self.budget.levels()
        return high if self.has_been_short and not self._is_between_graphs() else low

    def ran(self, label: str, backward: bool, span: Span) -> None:
        """Tell the observers that a function has run, and how much memory is in use now."""
        used = self.budget.used_bytes()
        for observer in self._observers:
            observer.ran(self.device.name, label, backward, span)
            observer.used(self.device.name, span[1], used)

    def run_plan(self, executor: PlanExecutor | None, step: int = 0) -> None:
        """Make the moves of a plan that are due before a step. From now on nothing else moves ahead of need.

        Args:
            executor: What follows the plan; ``None``: there is none, all is on demand again.
            step: The number of the step.
        """
        with self._lock:
            self.follows_plan = self._evictor.leaving_first = executor is not None
            evict_after_recompute = () if executor is None else executor.evict_after_recompute(step)
            if evict_after_recompute or self._evict_after_recompute:
                self._evict_after_recompute = weakref.WeakSet(evict_after_recompute)
            if executor is not None:
                self._transfers.run_deferred_frees()
                executor.step(step, self._transfers, self._evictor, self.budget)

    def bandwidths(self, otherwise: float) -> tuple[float, float]:
        """Return the bytes per second of copies out and in, as measured so far; ``otherwise`` if there were none."""
        with self._lock:
            out, back = self._transfers.bandwidth(out=True), self._transfers.bandwidth(out=False)
        return out or back or otherwise, back or out or otherwise

    # Room.

    def make_room(self, nbytes: int) -> bool:
        """Make room under the limit for ``nbytes`` that are about to be allocated.

        With 0, which is for the moment after a function, copies go out behind the next one.

        Returns:
            Whether there is room now.

        Raises:
            SwapSpaceError: If there is no more space outside.
        """
        used = self.budget.used_bytes()
        for observer in self._observers:
            observer.used(self.device.name, time.perf_counter(), used)
        _, high, low = self.budget.levels()
        if used + nbytes <= low:
            if self.has_been_short and self._is_between_graphs():
                self.device.set_cached_limit(low)
            return True
        self.has_been_short = True
        self._low_after_graph = low
        self.device.set_cached_limit(high)
        with self._lock:
            if not self.follows_plan or used + nbytes > high:  # a plan need not know what it leaves
                self.save_pending()
            self._transfers.run_deferred_frees()
            if used + nbytes > high:
                self._evictor.reclaim(nbytes)
                used = self.budget.used_bytes()
            if not nbytes and used > low and not self.follows_plan:
                self._evictor.write_behind(used - low)
            return used + nbytes <= high

    def move_all_out(self) -> None:
        """Move every storage out that nobody else holds, and that was not fetched ahead of its use."""
        self.has_been_short = True
        with self._lock:
            self._transfers.run_deferred_frees()
            self._evictor.push_out(EVERYTHING)
            self._evictor.release_clean(EVERYTHING, used_only=True)

    def reclaim(self, nbytes: int) -> int:
        """Give up ``nbytes`` of memory even if so much is free: an allocation has failed, it is in pieces.

        Returns:
            How much has been given up (bytes).

        Raises:
            SwapSpaceError: If there is no more space outside.
        """
        with self._lock:
            self.save_pending()
            used = self.device.used_bytes()
            self._evictor.reclaim(nbytes + max(self.budget.high - used, 0))
            if self.device.used_bytes() >= used:
                self._transfers.wait_for_deferred_frees()  # what died may be held by copies under way
            return max(used - self.device.used_bytes(), 0)

    def _begin_in(self, storage: Storage) -> None:
        """Begin to fetch a storage that is out, or what it is made again from."""
        if storage.state not in AWAY:
            return
        for needed in (storage,) if storage.state is State.OUT else outside(storage):
            self._evictor.reclaim(needed.nbytes)
            self._transfers.begin_in(needed)

    def _bring_in(self, storage: Storage) -> None:
        """Make a storage resident. Waits, or computes."""
        self._begin_in(storage)
        if storage.state is State.DISCARDED:
            self._make_again([storage])
        else:
            self._transfers.end_in(storage)

    def _make_again(self, wanted: Collection[Storage]) -> None:
        """Compute storages again, and before that what they are made from. Waits."""
        order = to_be_made(wanted)
        last = {needed: storage for storage, recipe in order for needed in recipe.storages()}
        owners = []  # held: they do not make room for the next
        for storage, recipe in order:
            self._run_again(storage, recipe)
            if storage in wanted:
                owners.append(storage.owner)
            for needed in recipe.storages():
                if needed in self._evict_after_recompute and last[needed] is storage:
                    self._evictor.give_up(needed)

    def _run_again(self, storage: Storage, recipe: Recipe) -> None:
        if native.allocator is None and not self.device.asks_for_room:
            self._evictor.reclaim(storage.nbytes)  # what it allocates does not ask
        arrays = [self.read(saved, read_only=True) for saved in recipe.inputs]
        start, waited = time.perf_counter(), self.counters.waited_seconds
        self._is_remaking = True  # what is allocated for it asks for room, as in any function
        try:
            self._transfers.remake(storage, recipe.run(arrays))
        finally:
            self._is_remaking = False
        end = time.perf_counter()
        # Waits for room meanwhile are counted as such.
        self.counters.recompute_seconds += end - start - (self.counters.waited_seconds - waited)
        for observer in self._observers:
            observer.remade(storage, (start, end))

    def _mark_dirty(self, storage: Storage) -> None:
        """Take note that somebody may write to a storage: what is made again from it is made now."""
        if storage.dependents:
            self._evictor.discards = False  # nothing more may be given up that is made from it
            try:
                for dependent in tuple(storage.dependents):
                    self._bring_in(dependent)
            finally:
                self._evictor.discards = True
        self._transfers.mark_dirty(storage)

    def _is_between_graphs(self) -> bool:
        """Tell whether nothing lives that was saved."""
        with self._lock:
            self._transfers.run_deferred_frees()
            return not any(self._transfers.nbytes.values())

    # When there is none.

    def shortage(self, nbytes: int, what: str) -> OutOfMemoryError | None:
        """Return the error for ``nbytes`` that do not fit if ``strict``; else warn, once, if it is much."""
        strict = self.settings().strict
        over = self.budget.last_used + nbytes - self.limit
        if not strict and (self._has_warned or over <= self.limit * MARGIN):
            return None
        message = self.explain_shortage(nbytes, what)
        if strict:
            return OutOfMemoryError(message)
        self._has_warned = True
        wording.warn(message, stacklevel=2)
        return None

    def explain_shortage(self, nbytes: int, what: str) -> str:
        """Return what holds the memory when ``nbytes`` for ``what`` do not fit, and what would help."""
        used = self.budget.used_bytes()
        with self._lock:
            resident = [storage for storage in self.storages() if storage.owner is not None]
            saved = sum(storage.nbytes for storage in resident)
            held = sum(storage.nbytes for storage in resident if storage.referenced_externally)
        return (
            f"{what} needs {_mib(nbytes)} more, and {_mib(used)} of the limit of {_mib(self.limit)} are in use: "
            f"{_mib(held)} by saved arrays that something else holds, {_mib(saved - held)} by other saved arrays, "
            f"{_mib(used - saved)} by parameters, gradients, temporaries and the interpreter. It needs "
            f"limit={used + nbytes + int(self.limit * MARGIN)} ({_mib(used + nbytes)}) or a smaller batch."
        )

    # All of them.

    def storages(self) -> list[Storage]:
        """Return the storages that live, in the order of saving."""
        with self._lock:
            return self._transfers.everything()

    def after_fork(self) -> None:
        """In a forked child: what the parent saved can be read, and nothing of the parent's is touched."""
        self._lock = native.EngineLock()
        self.device.after_fork()

    def defer_free(self, storage: Storage) -> None:
        """Forget a dying storage. Called at any time in any thread, even inside these methods."""
        self._transfers.defer_free(storage)
        if self._transfers.has_living:
            return
        if native.allocator is not None:
            native.allocator.ask_again()  # between two graphs less is granted
        if self._low_after_graph:
            # What others allocate now, as for a snapshot, is not announced: it finds room.
            self.device.set_cached_limit(self._low_after_graph)

    def keep_no_free_memory(self) -> None:
        """Give free memory back to the system, also when it becomes free later."""
        self._low_after_graph = 0
        self.device.set_cached_limit(0)

    def settle(self) -> None:
        """Wait for all that is under way and give back the space of all that died."""
        with self._lock:
            self._end_transfers()  # a function of its own: its last storage may be held by nothing else
            self._transfers.wait_for_deferred_frees()

    def _end_transfers(self) -> None:
        for storage in self._transfers.members(State.GOING_OUT):
            self._transfers.end_out(storage)
        for storage in self._transfers.members(State.COMING_IN):
            self._transfers.end_in(storage)

    def __repr__(self) -> str:
        with self._lock:
            self._transfers.run_deferred_frees()
            size, counters = dict(self._transfers.nbytes), self.counters
        resident = size[State.RESIDENT] + size[State.GOING_OUT] + size[State.BOTH]
        return (
            f"<SwapManager of {self.device.name}: {_mib(self.device.used_bytes())} of {_mib(self.limit)} used; "
            f"saved: {_mib(resident)} resident, {_mib(size[State.OUT])} out, "
            f"{_mib(size[State.DISCARDED])} discarded, {_mib(size[State.GOING_OUT])} going out, "
            f"{_mib(size[State.COMING_IN])} coming in; so far {_mib(counters.bytes_out)} out, "
            f"{_mib(counters.bytes_in)} in>"
        )


_managers: weakref.WeakSet[SwapManager] = weakref.WeakSet()


def _before_fork() -> None:
    forks.hold([manager._lock for manager in tuple(_managers)])


def _after_fork() -> None:
    for manager in tuple(_managers):
        manager._lock = native.EngineLock()


forks.register(_after_fork, _before_fork)


def _is_writeable(array: Any) -> bool:
    """Tell whether an array may be written to. NumPy's flag of that name warns about results of broadcast_arrays."""
    bits = getattr(array.flags, "num", None)
    return getattr(array.flags, "writeable", True) if bits is None else bool(bits & _WRITEABLE)


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.0f} MiB"
