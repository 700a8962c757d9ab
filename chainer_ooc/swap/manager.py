"""The manager of one device's saved arrays: the interface that ``graph/`` calls."""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from chainer_ooc.errors import GraphReleasedError, OutOfCoreError, OutOfMemoryError
from chainer_ooc.planning.eviction import EVERYTHING, Evictor, outside
from chainer_ooc.planning.executor import PlanExecutor
from chainer_ooc.planning.system import MARGIN
from chainer_ooc.settings import Settings
from chainer_ooc.swap import checksums
from chainer_ooc.swap.budget import MemoryBudget
from chainer_ooc.swap.devices.protocol import Device, Layout, Location, Span
from chainer_ooc.swap.devices.ram import native
from chainer_ooc.swap.events import Observer
from chainer_ooc.swap.lasting import Lasting, Use
from chainer_ooc.swap.prefetch import UseOrder
from chainer_ooc.swap.recipe import PrivateContent, Recipe, fingerprint_of, to_be_made
from chainer_ooc.swap.shortages import Shortage, Shortages
from chainer_ooc.swap.storage import AWAY, PackedArray, State, Storage
from chainer_ooc.swap.system import forks
from chainer_ooc.swap.transfers import Counters, Transfers
from chainer_ooc.wording import mib

__all__ = ["SwapManager"]

_WRITEABLE = 0x400  # NPY_ARRAY_WRITEABLE of numpy/ndarraytypes.h


class SwapManager:
    """Move the storages of one device out of its memory and back.

    Nothing moves while the device's memory is below the low watermark. Past it, the manager copies out the
    oldest storages that only the graph refers to, behind the computation: backward needs them last. When an
    announced allocation does not fit (:meth:`make_room`), it evicts storages. In backward it prefetches
    them in the order in which backward will use them.

    All methods may be called from any thread. Transfers run in the background.

    Args:
        device: The memory, and the way out of it.
        settings: Returns the settings in force in the calling thread.
        save_pending: Called when memory gets short: saves the arrays whose saving was postponed.
        is_read_only: Returns whether the calling thread runs code that never writes to the arrays it reads.
        observers: The observers of events: a list that may change.
        collect: Called when moving what graphs saved does not suffice, and later when there may be more: gives the
            parameters, gradients and state of optimizers that have none a storage (:meth:`save_lasting`).

    Attributes:
        budget: The limit, the watermarks and the memory in use.
        has_been_short: Memory has passed the low watermark before, or everything was forced out.
        counters: The counts of transfers so far.
        lasting: The order of use of parameters, gradients and state, and which of them moves.
        shortages: What did not fit, and the least limit that suffices.
        peak_without_offload: The most that would have been in use (bytes) if nothing had ever moved, since
            memory became short.
        tracker: The tracker of the iterations on this device, set by ``graph/iteration.py``.
        measures_growth: What functions take for themselves matters. It does not while a plan is followed that is not
            measured any more.
    """

    _transfers_type = Transfers

    def __init__(
        self,
        device: Device,
        settings: Callable[[], Settings],
        save_pending: Callable[[], None] = lambda: None,
        is_read_only: Callable[[], bool] = lambda: False,
        observers: list[Observer] | None = None,
        collect: Callable[[SwapManager], None] | None = None,
    ) -> None:
        self.device = device
        self.settings = settings
        self.save_pending = save_pending
        self.is_read_only = is_read_only
        self.budget = MemoryBudget(device, settings)
        self.shortages = Shortages(device)
        self._observers = [] if observers is None else observers
        self._transfers = self._transfers_type(device, self.reclaim, self._observers)
        self.counters: Counters = self._transfers.counters
        self._evictor: Evictor[Storage] = Evictor(self._transfers, self.budget)
        self._order = UseOrder()
        self._collect = collect
        self.lasting = Lasting(
            self._transfers,
            self._evictor,
            self.budget,
            lambda: self._parameters_move,
            self._save_all_lasting,
        )
        self._lock = native.EngineLock()
        self._sequence = 0
        self._is_remaking = False
        self._last_end = 0.0  # when the last function ended
        self.has_been_short = False
        self.peak_without_offload = 0
        self.tracker: Any = None
        self.measures_growth = True
        # The low watermark, if cached free memory may reach the high one; else 0.
        self._low_after_graph = 0
        # Storages to evict again once the recipes of others have read them.
        self._evict_after_recompute: weakref.WeakSet[Storage] = weakref.WeakSet()
        _managers.add(self)

    @property
    def limit(self) -> int:
        """The limit in force (bytes)."""
        return self.budget.limit

    @property
    def follows_plan(self) -> bool:
        """Whether a plan decides what moves ahead of need."""
        return self._evictor.follows_plan

    @property
    def busy(self) -> bool:
        """Whether the calling thread is inside one of these methods, and not inside a recipe's function."""
        return bool(self._lock._is_owned()) and not self._is_remaking

    # Called by graph/.

    def save(self, array: Any, label: str) -> PackedArray | None:
        """Return the stand-in of ``array``, or ``None`` if the array must stay as it is.

        Args:
            array: An array of this device.
            label: The name of the function that saves it.
        """
        location = self.device.locate(array)
        settings = self.settings()
        if location is None or location.nbytes < max(settings.min_bytes, 1):
            return None
        with self._lock:
            storage = self._transfers.find(location.owner)
            if storage is None:
                storage = self._new_storage(location, label)
                self._order.save(storage)
                self._transfers.register(storage)
                if settings.verify:
                    checksums.begin(self.device, storage)
            return _packed(storage, array, location)

    def save_lasting(self, array: Any, label: str, key: int) -> PackedArray | None:
        """Return the stand-in of a parameter, a gradient or a state, ``None`` if the array must stay as it is.

        Args:
            array: An array of this device.
            label: What it is.
            key: Its key in the order of uses.
        """
        location = self.device.locate(array)
        if location is None or location.nbytes < max(self.settings().min_bytes, 1):
            return None
        with self._lock:
            storage = self._transfers.find(location.owner)
            if storage is None:
                storage = self._new_storage(location, label)
                storage.key, storage.kept = key, True
                self._transfers.register(storage)
                self.lasting.register(storage)
            elif storage.key is None:
                storage.kept = True  # a graph saved it: whoever has the parameter reads it, too
            return _packed(storage, array, location)

    @property
    def _parameters_move(self) -> bool:
        return self.settings().parameters == "auto"

    def _save_all_lasting(self) -> None:
        if self._collect is not None:
            self._collect(self)

    def _new_storage(self, location: Location, label: str) -> Storage:
        self._transfers.run_deferred_frees()
        self._sequence += 1
        return Storage(
            self, self._sequence, location.owner, location.nbytes, location.address, label
        )

    def add_use(self, group: Iterable[PackedArray], rank: int = 0) -> None:
        """Count one more function whose backward needs ``group``.

        Args:
            group: The arrays that the function saved.
            rank: The function's rank in the graph: backward runs in the order of falling rank.
        """
        with self._lock:
            for storage in _storages_of(group):
                storage.remaining_uses += 1
                storage.rank = max(storage.rank, rank)

    def fingerprint(self, saved: PackedArray) -> Any:
        """Return the fingerprint of the storage that holds an array; ``None`` if it is not known."""
        storage = saved.storage
        with self._lock:
            if storage.state.in_memory and (storage.copy is None or storage.fingerprint is None):
                storage.fingerprint = fingerprint_of(self.device, storage)
            return storage.fingerprint

    def expose(self, private: PrivateContent) -> None:
        """Note that other code than Chainer's functions is about to get a saved array."""
        with self._lock:  # no other thread moves it meanwhile
            private.expose()

    def check_unchanged(self, array: Any) -> None:
        """With ``verify``, warn if a saved array has been modified since it was saved."""
        with self._lock:
            if (storage := self._resident_of(array)) is not None:
                checksums.check_unchanged(self.device, storage)

    def accept_changes(self, array: Any) -> None:
        """Take the present content of a saved array for the right one."""
        with self._lock:
            storage = self._resident_of(array)
            if storage is not None and storage.checksum is not None:
                self._mark_dirty(storage)
                storage.checksum = checksums.checksum_of(self.device, storage)

    def _resident_of(self, array: Any) -> Storage | None:
        location = self.device.locate(array)
        storage = None if location is None else self._transfers.find(location.owner)
        return storage if storage is not None and storage.state.in_memory else None

    def give_recipe(self, saved: PackedArray, recipe: Recipe) -> None:
        """Allow the storage of ``saved``, a resident array, to be computed again instead of moved.

        The array must fill its storage, unless the recipe gives a part of a larger array, too. A storage keeps the
        first recipe that it gets.
        """
        storage, layout = saved.storage, saved.layout
        fills = not layout.offset and (
            math.prod(layout.shape) * layout.dtype.itemsize == storage.nbytes
        )
        with self._lock:
            if (
                storage.recipe is None
                and storage.state is State.RESIDENT
                and (fills or (recipe.crops and not storage.origin))
                and all(one.storage.manager is self for one in recipe.inputs)
            ):
                storage.recipe = recipe

    def read(self, saved: PackedArray, read_only: bool = False) -> Any:
        """Return the array of ``saved``, fetched first if its bytes are not in memory.

        Args:
            saved: The array's stand-in.
            read_only: The reader does not write to the array, so the copy outside stays valid.

        Raises:
            GraphReleasedError: If ``single_backward`` dropped it after its last use.
            OSError: If reading the copy failed twice.
        """
        storage = saved.storage
        with self._lock:
            if storage.key is not None and self.lasting.active:
                self.lasting.note((storage.key,), Use.OTHER)
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
        """Return the arrays of ``group``. All transfers begin before the first wait."""
        with self._lock:
            self._transfers.check_remade()
            # What is there first: held by this list, it cannot be released for the others.
            arrays: list[Any] = []
            absent = []
            for place, saved in enumerate(group):
                if saved.storage.state.in_memory:
                    arrays.append(self.read(saved, read_only))
                    if saved.storage.checksum is not None:
                        checksums.check_unchanged(self.device, saved.storage)
                else:
                    arrays.append(None)
                    absent.append(place)
            if absent:
                self._fetch_absent(group, arrays, absent, read_only)
            return arrays

    def _fetch_absent(
        self,
        group: Sequence[PackedArray],
        arrays: list[Any],
        absent: Iterable[int],
        read_only: bool,
    ) -> None:
        """Fetch the arrays at some places of ``group`` into ``arrays``."""
        owners, begun = {}, []  # referred to, so that none is released for another
        for place in absent:
            storage = group[place].storage
            begun += [one.owner for one in self._begin_in(storage)]
            owners[storage] = storage.owner
        discarded = [s.storage for s in group if s.storage.state is State.DISCARDED]
        begun.clear()
        if discarded:
            self._make_again(discarded)
        for place in absent:
            # A copy that failed is made again, into other memory, for which this makes room.
            owners.pop(group[place].storage, None)
            arrays[place] = self.read(group[place], read_only)

    # Called by graph/ for what lasts longer than graphs.

    def use_lasting(self, group: Sequence[PackedArray], use: Use, read_only: bool) -> list[Any]:
        """Note that a function uses ``group``, return the arrays, and begin to fetch what is used next."""
        with self._lock:
            self.lasting.note(_keys_of(group), use)
            arrays = self.fetch(group, read_only)
            if self.device.may_move():
                self.lasting.prefetch()
            return arrays

    def begin_update(self, group: Sequence[PackedArray]) -> None:
        """Note that ``group`` is used for an update, and begin to fetch it and what is used next."""
        with self._lock:
            self.lasting.note(_keys_of(group), Use.UPDATE)
            if self.device.may_move():
                for storage in _storages_of(group):
                    self._begin_in(storage)
                self.lasting.prefetch()

    def used_lasting(self, group: Iterable[PackedArray], may_leave: bool) -> None:
        """Note that a function, or an update, has used ``group``: what is used last may leave behind it."""
        with self._lock:
            self._note_who_holds(_storages_of(group))
            self.lasting.may_have_changed()
            if not (may_leave and self.device.may_move() and self._parameters_move):
                return
            if self.settings().swap_parameters:
                self.lasting.move_all_out()
            else:
                self.lasting.write_behind()

    def move_lasting_out(self) -> None:
        """Move out all parameters, gradients and state to which nothing else refers."""
        self.begin_lasting()
        if self.lasting.active and self.device.may_move() and self._parameters_move:
            with self._lock:
                self.lasting.move_all_out()

    def begin_lasting(self) -> bool:
        """Let parameters, gradients and state move from now on. Return whether they do so for the first time."""
        if self.lasting.active or self._collect is None or not self._parameters_move:
            return False
        with self._lock:
            self.lasting.active = True
            self._evictor.besides = self.lasting
            self.lasting.collect()
        return True

    def prefetch(self, group: Iterable[PackedArray]) -> None:
        """Begin to fetch the storages that backward needs after ``group``, as far as free memory allows.

        The memory that recent functions took for themselves stays free. Otherwise the next function would
        evict what was just fetched.
        """
        with self._lock:
            storages = [one for one in _storages_of(group) if one.key is None]
            following = self._order.use(storages)
            if self._evictor.may_prefetch and self.device.may_move():
                self._evictor.prefetch(following)

    def release_use(self, group: Iterable[PackedArray], drop: bool) -> None:
        """Count a function whose backward has used ``group``.

        Args:
            group: The arrays that the function saved.
            drop: Drop the storages that no other function needs.
        """
        with self._lock:
            self._transfers.run_deferred_frees()  # dead storages no longer use others
            storages = _storages_of(group)
            for storage in storages:
                storage.remaining_uses -= 1
            if not drop:
                self._note_who_holds(storages)
                return
            over = {s for s in storages if s.used and not (s.kept or s.dependents)}
            self._note_who_holds([storage for storage in storages if storage not in over])
            for storage in storages:  # marking one dirty may have computed its dependents
                if storage.used and not (storage.kept or storage.dependents):
                    self._transfers.drop(storage)

    def returned(self, group: Iterable[PackedArray]) -> None:
        """Note that a function has used ``group`` in backward and will use it once more: see :meth:`keep`."""
        with self._lock:
            self._note_who_holds(_storages_of(group))

    def keep(self, group: Iterable[PackedArray]) -> None:
        """Do not drop ``group`` after its last use: other readers than the counted functions may need it."""
        with self._lock:
            for saved in group:
                saved.storage.kept = True

    def _note_who_holds(self, storages: Iterable[Storage]) -> None:
        for storage in storages:
            copy = storage.transfer if storage.state is State.GOING_OUT else None
            if copy is not None and copy.done():  # it does not refer to the memory any more
                self._transfers.end_out(storage)
            if storage.state.in_memory and storage.referenced_externally:
                # Backward gave it to somebody, a gradient say, who may write to it.
                self._mark_dirty(storage)

    def usage_without_offload(self, used: int) -> int:
        """Return the memory that would be in use (bytes) if nothing had ever moved.

        Its rise while a function runs is the memory that the function takes for itself, whatever moves
        meanwhile.
        """
        transfers = self._transfers
        if transfers.dead or transfers.deferred_frees:  # else no wait for a thread that moves
            with self._lock:
                transfers.run_deferred_frees()
        used -= transfers.moved_bytes
        if used > self.peak_without_offload:
            self.peak_without_offload = used
        return used

    def note_peak_without_offload(self, nbytes: int) -> None:
        """Note the memory that would be in use now if nothing had ever moved (bytes)."""
        self.peak_without_offload = max(self.peak_without_offload, nbytes)

    def bytes_beside_saved(self) -> int:
        """Return the memory in use without that of saved storages (bytes)."""
        with self._lock:
            saved = self._transfers.bytes_in_use()
        return max(0, self.budget.used_bytes() - saved)

    def moved_bytes(self) -> int:
        """Return the bytes that transfers have brought into memory less those that they have freed."""
        return self._transfers.moved_bytes

    def granted_bytes(self) -> int:
        """Return the memory in use (bytes) up to which allocations need not ask for room."""
        if self._observers:  # they are told of each allocation
            return 0
        _, high, low = self.budget.levels()
        return high if self.has_been_short and not self.is_between_graphs() else low

    def ran(self, label: str, backward: bool, span: Span) -> None:
        """Tell the observers that a function has run, and how much memory is in use now."""
        used = self.budget.used_bytes()
        for observer in self._observers:
            observer.ran(self.device.name, label, backward, span)
            observer.used(self.device.name, span[1], used)

    def ended(self, backward: bool) -> None:
        """Note that a function has ended that ran outside of others; warn of a shortage once it is known."""
        if self.has_been_short:
            now = time.perf_counter()
            self.counters.seconds += now - (self._last_end or now)
            self._last_end = now
            self.shortages.ended(backward)
            raised = self.shortages.raised_bytes if self._parameters_move else 0
            if raised != self.budget.raised:
                self.budget.raise_to(raised)
                native.ask_again()

    def run_plan(self, executor: PlanExecutor[Storage] | None, step: int = 0) -> None:
        """Run the plan's transfers that are due before ``step``; disables on-demand prefetch and write-behind.

        Args:
            executor: The executor of the plan; ``None`` returns to moving on demand.
            step: The number of the step.
        """
        with self._lock:
            self._evictor.follows_plan = executor is not None
            evict_after_recompute = () if executor is None else executor.evict_after_recompute(step)
            if evict_after_recompute or self._evict_after_recompute:
                self._evict_after_recompute = weakref.WeakSet(evict_after_recompute)
            if executor is not None and self.device.may_move():  # else what is due is done later
                self._transfers.run_deferred_frees()
                executor.step(step, self._transfers, self._evictor, self.budget.high)

    def bandwidths(self, otherwise: float) -> tuple[float, float]:
        """Return the measured bytes per second of copies out and of copies in; ``otherwise`` without any copy."""
        out, back = self.measured_bandwidths()
        return out or back or otherwise, back or out or otherwise

    def measured_bandwidths(self) -> tuple[float | None, float | None]:
        """Return the bytes per second of copies out and of copies in, each ``None`` without any."""
        with self._lock:
            return self._transfers.bandwidth(out=True), self._transfers.bandwidth(out=False)

    # Making room.

    def make_room(self, nbytes: int) -> bool:
        """Make room under the limit for an allocation of ``nbytes``.

        With 0, after a function, copies out begin behind the next function.

        Returns:
            Whether the allocation fits now.

        Raises:
            SwapSpaceError: If there is no space outside of memory.
        """
        used = self.budget.used_bytes()
        for observer in self._observers:
            observer.used(self.device.name, time.perf_counter(), used)
        _, high, low = self.budget.levels()
        if used + nbytes <= low:
            if self.has_been_short and self.is_between_graphs():
                self.device.set_cached_limit(low)
            return True
        if not self.device.may_move():
            return used + nbytes <= high
        self._note_shortage()
        self._low_after_graph = low
        self.device.set_cached_limit(high)
        with self._lock:
            if not self.follows_plan or used + nbytes > high:  # a plan ignores what it keeps
                self.save_pending()
            self._transfers.run_deferred_frees()
            if self.lasting.active and not self._transfers.lasting.storages:  # the model is dead
                self.lasting.active, self._evictor.besides = False, None
            needed = self._evictor.make_room(nbytes) + nbytes
            if needed > max(self.limit, high) and self.begin_lasting():
                needed = self._evictor.make_room(nbytes) + nbytes
            return needed <= high

    def _note_shortage(self) -> None:
        if not self.has_been_short:
            self.has_been_short = True
            native.ask_again()  # no function is let through unseen from now on

    def move_all_out(self) -> None:
        """Move out every storage that only the graph refers to, except those that were prefetched."""
        if not self.device.may_move():
            return
        self._note_shortage()
        with self._lock:
            self._transfers.run_deferred_frees()
            self._evictor.push_out(EVERYTHING)
            self._evictor.release_clean(EVERYTHING, used_only=True)

    def reclaim(self, nbytes: int) -> int:
        """Free ``nbytes`` more, even if that much seems free: an allocation failed on fragmented memory.

        Returns:
            The bytes that were freed.

        Raises:
            SwapSpaceError: If there is no space outside of memory.
        """
        if not self.device.may_move():
            return 0
        with self._lock:
            self.save_pending()
            used = self.device.used_bytes()
            self._evictor.reclaim(nbytes + max(self.budget.high - used, 0))
            if self.device.used_bytes() >= used:
                self._transfers.wait_for_deferred_frees()  # copies may still use dead memory
            return max(used - self.device.used_bytes(), 0)

    def _begin_in(self, storage: Storage) -> list[Storage]:
        """Begin to fetch a storage that is out, or what it is made again from. Return what was begun.

        Raises:
            OutOfCoreError: While a CUDA graph is captured, to which the copy would not belong.
        """
        if not self.device.may_move():
            raise OutOfCoreError(
                f"{storage!r} is not in memory, and nothing can be copied back while a CUDA graph is captured: read it "
                "before the capture begins, or turn out-of-core mode off around the forward that saves it"
            )
        wanted = outside(self._transfers, storage) if storage.state in AWAY else []
        for needed in wanted:
            self._evictor.reclaim(needed.nbytes)
            self._transfers.begin_in(needed)
        return wanted

    def _bring_in(self, storage: Storage) -> None:
        """Make a storage resident: wait for its copy, or compute it."""
        self._begin_in(storage)
        if storage.state is State.DISCARDED:
            self._make_again([storage])
        else:
            self._transfers.end_in(storage)

    def _make_again(self, wanted: Collection[Storage]) -> None:
        """Compute storages again, and first the discarded ones that their recipes need."""
        order = to_be_made(wanted)
        last = {needed: storage for storage, recipe in order for needed in recipe.storages()}
        # Referred to, so that computing one cannot evict another. What has no copy may leave: while it is
        # referred to, nothing that depends on it could be discarded.
        owners = {needed: needed.owner for needed in last if needed.copy is not None}
        for storage, recipe in order:
            self._run_again(storage, recipe)
            if storage in wanted:
                owners[storage] = storage.owner
            for needed in recipe.storages():
                if last[needed] is storage and needed not in wanted:
                    owners.pop(needed, None)
                    if needed in self._evict_after_recompute:
                        self._evictor.give_up(needed)

    def _run_again(self, storage: Storage, recipe: Recipe) -> None:
        if native.allocator is None and not self.device.asks_for_room:
            self._evictor.reclaim(storage.nbytes)  # the function's allocations cannot ask for room
        arrays = [self.read(saved, read_only=True) for saved in recipe.inputs]
        start, waited = time.perf_counter(), self.counters.stall_seconds
        self._is_remaking = True  # the function's allocations ask for room, as any function's do
        try:
            self._transfers.remake(storage, recipe.run(arrays))
        finally:
            self._is_remaking = False
        end = time.perf_counter()
        # Waits for room are counted elsewhere.
        self.counters.recompute_seconds += end - start - (self.counters.stall_seconds - waited)
        for observer in self._observers:
            observer.remade(storage, (start, end))

    def _mark_dirty(self, storage: Storage) -> None:
        """Note that code may write to a storage; compute the storages that depend on it first."""
        storage.exposed = True
        if storage.content is not None:
            storage.content.expose()
        self.make_dependents(storage)
        self._transfers.mark_dirty(storage)

    def make_dependents(self, storage: Storage) -> None:
        """Compute the discarded storages that depend on this one, and keep those that were to be discarded."""
        if not storage.dependents:
            return
        with self._lock:
            self._evictor.discards = False  # its dependents must not be discarded again
            try:
                for dependent in sorted(storage.dependents, key=lambda one: one.sequence):
                    if dependent.state is State.CHECKING:
                        self._transfers.cancel_discard(dependent)
                    elif dependent.state is State.DISCARDED:  # else another's re-run has made it
                        self._bring_in(dependent)
            finally:
                self._evictor.discards = True

    def is_between_graphs(self) -> bool:
        """Return whether no saved storage is alive."""
        return not self._transfers.has_living

    # When there is no room.

    def shortage(self, nbytes: int, what: str) -> OutOfMemoryError | None:
        """Return the error for ``nbytes`` that do not fit if ``strict``; else note it, for one warning."""
        if self.settings().strict:
            return OutOfMemoryError(self.explain_shortage(nbytes, what))
        need = self.budget.last_used + nbytes
        self.shortages.note_held(need)
        if need - self.limit > self.limit * MARGIN and self.shortages.note_need(need):
            self.shortages.note(self._shortage(nbytes, what))
        return None

    def explain_shortage(self, nbytes: int, what: str) -> str:
        """Return a message: what fills the memory when ``nbytes`` for ``what`` do not fit, and what would help."""
        shortage = self._shortage(nbytes, what)
        self.shortages.note_need(shortage.need)
        return self.shortages.explain(shortage)

    def _shortage(self, nbytes: int, what: str) -> Shortage:
        used = self.budget.used_bytes()
        with self._lock:
            resident = [storage for storage in self.storages() if storage.owner is not None]
            saved = sum(storage.nbytes for storage in resident)
            held = sum(storage.nbytes for storage in resident if storage.referenced_externally)
            lasting = sum(
                one.nbytes for one in self._transfers.all_lasting() if one.owner is not None
            )
        return Shortage(what, nbytes, used, self.limit, saved, held, lasting)

    # All storages.

    def storages(self) -> list[Storage]:
        """Return the living storages in the order of saving."""
        with self._lock:
            return self._transfers.everything()

    def after_fork(self) -> None:
        """Start anew in a forked child: it can read the parent's copies and changes nothing of the parent's."""
        self._lock = native.EngineLock()
        self.shortages = Shortages(self.device)  # the parent warns
        self.device.after_fork()

    def defer_free(self, storage: Storage) -> None:
        """Queue a dead storage's blocks for freeing. Safe from ``__del__`` in any thread."""
        self._transfers.defer_free(storage)
        if self._transfers.has_living:
            return
        if native.allocator is not None:
            native.allocator.ask_again()  # granted_bytes() falls between two graphs
        if self._low_after_graph:
            # Other code's allocations now, as for a snapshot, are not announced: leave room for them.
            self.device.set_cached_limit(self._low_after_graph)

    def keep_no_free_memory(self) -> None:
        """Give cached free memory back to the system, now and whenever memory becomes free."""
        self._low_after_graph = 0
        self.device.set_cached_limit(0)

    def check_remade(self) -> None:
        """Wait until it is known whether all that was computed again has the bits of what was discarded.

        Raises:
            CorruptCopyError: If it has not.
        """
        with self._lock:
            self._transfers.check_remade(wait=True)

    def settle(self) -> None:
        """Wait for all transfers, and free the blocks of all dead storages."""
        with self._lock:
            self._end_transfers()  # its locals, maybe a storage's last reference, end with it
            self._transfers.wait_for_deferred_frees()

    def _end_transfers(self) -> None:
        while (storage := self._transfers.first_leaving()) is not None:
            self._transfers.end_leaving(storage)
        for storage in self._transfers.members(State.COMING_IN):
            self._transfers.end_in(storage)
        for storage in self._transfers.all_lasting():
            if storage.state is State.COMING_IN:
                self._transfers.end_in(storage)

    def __repr__(self) -> str:
        with self._lock:
            with contextlib.suppress(RuntimeError):  # the GPU has failed
                self._transfers.run_deferred_frees()
            size, counters = dict(self._transfers.nbytes), self.counters
        resident = sum(nbytes for state, nbytes in size.items() if state.in_memory)
        return (
            f"<SwapManager of {self.device.name}: {mib(self.device.used_bytes())} of {mib(self.limit)} used; "
            f"saved: {mib(resident)} resident, {mib(size[State.OUT])} out, "
            f"{mib(size[State.DISCARDED])} discarded, {mib(size[State.GOING_OUT])} going out, "
            f"{mib(size[State.COMING_IN])} coming in; so far {mib(counters.bytes_out)} out, "
            f"{mib(counters.bytes_in)} in>"
        )


_managers: weakref.WeakSet[SwapManager] = weakref.WeakSet()


def _before_fork() -> None:
    forks.hold([manager._lock for manager in tuple(_managers)])


def _after_fork() -> None:
    for manager in tuple(_managers):
        manager._lock = native.EngineLock()


forks.register(_after_fork, _before_fork)


def _storages_of(group: Iterable[PackedArray]) -> dict[Storage, None]:
    """Return the storages of saved arrays, each once, in their order."""
    storages: dict[Storage, None] = {}
    for saved in group:
        storages[saved.storage] = None
    return storages


def _keys_of(group: Iterable[PackedArray]) -> list[int]:
    """Return the keys of the storages that last longer than a graph."""
    return [storage.key for storage in _storages_of(group) if storage.key is not None]


def _packed(storage: Storage, array: Any, location: Location) -> PackedArray:
    """Return the stand-in of an array in a storage."""
    offset = location.offset - storage.origin
    layout = Layout(array.dtype, array.shape, array.strides, offset, _is_writeable(array))
    return PackedArray(storage, layout, array)


def _is_writeable(array: Any) -> bool:
    """Return whether an array is writeable, without NumPy's warning about results of ``broadcast_arrays``."""
    bits = getattr(array.flags, "num", None)
    return getattr(array.flags, "writeable", True) if bits is None else bool(bits & _WRITEABLE)
