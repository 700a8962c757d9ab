"""SwapManager: what is resident, what goes out, what comes back, and room under the limit."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from chainer_ooc.errors import GraphReleasedError, OutOfMemoryError
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.base import Device
from chainer_ooc.swap.mover import Counters, Mover
from chainer_ooc.swap.storage import Layout, Saved, State, Storage

__all__ = ["SwapManager"]

#: This share of the limit is left for what nobody announces: Python's objects, BLAS buffers.
MARGIN = 1 / 64
#: The low-water mark, as a share of the limit: past it, copies go out behind the computation.
LOW_WATER = 0.8
#: Most bytes on their way out at a time.
IN_FLIGHT = 256 << 20
#: What the last functions took for themselves is what the next may take: this many of them.
_REMEMBERED = 16
_EVERYTHING = 1 << 62


class SwapManager:
    """Moves the storages of one device.

    Nothing moves while the device's memory is below the low-water mark. Past it, the oldest storages that
    nobody else holds are copied out behind the computation: backward needs them last. When there is no
    room for what is announced (:meth:`make_room`), storages give up their memory: those that backward has
    used first, then the oldest; those with a valid copy before those that must be copied yet.

    All methods may be called from any thread; transfers run beside them.

    Args:
        device: The memory and the way out of it.
        settings: Returns the settings in force in the calling thread.
        adopt: Called when memory is no longer plenty: save what was put off until then.
        is_trusted: Tells whether the code that reads arrays in the calling thread leaves them as they are.

    Attributes:
        last_used: The bytes that were in use when the device was asked last.
    """

    def __init__(
        self,
        device: Device,
        settings: Callable[[], Settings],
        adopt: Callable[[], None] = lambda: None,
        is_trusted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.device = device
        self.settings = settings
        self.adopt = adopt
        self.is_trusted = is_trusted
        self.last_used = 0
        self._growth: deque[int] = deque([0], _REMEMBERED)
        self._mover = Mover(device, self.reclaim)
        self._lock = threading.RLock()
        self._sequence = 0
        # The settings in force, and their limit, high- and low-water mark; what a limit of None means.
        self._measured: tuple[Any, tuple[int, int, int]] = (None, (0, 0, 0))
        self._capacity: int | None = None
        self._slack = self._unasked = 0
        self._has_warned = False

    @property
    def counters(self) -> Counters:
        """What has been done so far."""
        return self._mover.counters

    @property
    def busy(self) -> bool:
        """Whether the calling thread is inside one of these methods."""
        return self._lock._is_owned()  # type: ignore[attr-defined]

    # The limit.

    @property
    def limit(self) -> int:
        """The limit in force (bytes)."""
        return self._marks()[0]

    @property
    def high(self) -> int:
        """The high-water mark (bytes): room is made so that memory stays below it."""
        return self._marks()[1]

    @property
    def low(self) -> int:
        """The low-water mark (bytes): nothing moves below it."""
        return self._marks()[2]

    def _marks(self) -> tuple[int, int, int]:
        settings = self.settings()
        if settings is not self._measured[0]:
            limit = self._limit_of(settings)
            marks = (limit, int(limit * (1 - MARGIN)), int(limit * LOW_WATER))
            self._measured = (settings, marks)
        return self._measured[1]

    def _limit_of(self, settings: Settings) -> int:
        wanted = settings.limit
        if wanted is None:
            # What is free is asked once: later it would be less by what was taken.
            if self._capacity is None:
                self._capacity = self.device.capacity()
            return self._capacity
        return int(wanted * self.device.total_bytes()) if isinstance(wanted, float) else wanted

    def used_bytes(self) -> int:
        """Return the bytes in use now."""
        self.last_used = self.device.used_bytes()
        return self.last_used

    def has_plenty(self, nbytes: int, settings: Settings) -> bool:
        """Tell whether a function that takes at most ``nbytes`` leaves memory below the low-water mark.

        The system is asked only when what functions may have taken since the last time could matter.
        """
        self._slack -= nbytes
        self._unasked += 1
        if self._slack < 0 or self._unasked > 64 or settings is not self._measured[0]:
            self._slack = self.low - self.used_bytes() - nbytes
            self._unasked = 0
        return self._slack >= 0

    # What the graph asks.

    def save(self, array: Any, label: str) -> Saved | None:
        """Return what stands in for ``array``, or ``None`` if it must stay as it is.

        Args:
            array: An array of this device.
            label: The function that saves it.
        """
        location = self.device.locate(array)
        if location is None or location.nbytes < max(self.settings().min_bytes, 1):
            return None
        with self._lock:
            storage = self._mover.find(location.owner)
            if storage is None:
                self._mover.clear_graves()
                self._sequence += 1
                storage = Storage(
                    self, self._sequence, location.owner, location.nbytes, location.address, label
                )
                self._mover.adopt(storage)
            layout = Layout(
                array.dtype,
                array.shape,
                array.strides,
                location.offset - storage.origin,
                getattr(array.flags, "writeable", True),
            )
            return Saved(storage, layout, array)

    def expect(self, group: Iterable[Saved]) -> None:
        """Tell that one more function will use ``group`` in backward."""
        with self._lock:
            for storage in {saved.storage for saved in group}:
                storage.expected += 1

    def read(self, saved: Saved, trusted: bool = False) -> Any:
        """Return the array of ``saved``, fetched first where it is out.

        Args:
            saved: What stands in for it.
            trusted: The reader does not write to it, so that the copy outside stays valid.

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
            if storage.resident:
                self.counters.hits += 1
            else:
                self._begin_in(storage)
                self._mover.end_in(storage)
            if array is None:
                array = self.device.view(storage.owner, storage.origin, saved.layout)
                saved.remember(array)
            if not trusted and saved.layout.writeable:
                self._mover.taint(storage)
            return array

    def fetch(self, group: Sequence[Saved], trusted: bool) -> list[Any]:
        """Return the arrays of ``group``; their transfers are all begun before one is waited for."""
        with self._lock:
            # What is resident first: held by this list, it cannot be released for the others.
            arrays = {id(s): self.read(s, trusted) for s in group if s.storage.resident}
            for saved in group:
                self._begin_in(saved.storage)
            return [arrays.get(id(s)) if id(s) in arrays else self.read(s, trusted) for s in group]

    def note_growth(self, nbytes: int) -> None:
        """Tell how many bytes a function took for itself."""
        self._growth.append(nbytes)

    def prefetch(self, before: int) -> None:
        """Begin to fetch what backward needs next, as far ahead as free memory allows.

        As much is left free as functions took for themselves of late: what is fetched too early would have to
        make room for the next of them, and be fetched again.

        Args:
            before: The lowest sequence number in use now: what was saved before it is needed next.
        """
        with self._lock:
            room: int | None = None
            for storage in self._mover.members(State.OUT, newest_first=True):
                if storage.sequence >= before or storage.used:
                    continue
                if room is None:
                    coming = self._mover.nbytes[State.COMING_IN]
                    room = self.high - self.used_bytes() - max(self._growth) - coming
                if room < storage.nbytes:
                    room += self._release_clean(storage.nbytes - room, used_only=True)
                if room < storage.nbytes:
                    return
                room -= storage.nbytes
                try:
                    self._begin_in(storage)
                except MemoryError:  # the free memory is in pieces: it is fetched when it is needed
                    return
                self.counters.prefetched += 1

    def finish(self, group: Iterable[Saved], drop: bool) -> None:
        """Tell that a function has used ``group`` in backward.

        Args:
            group: What it had saved.
            drop: What no other function will use is not needed again.
        """
        with self._lock:
            for storage in {saved.storage for saved in group}:
                storage.expected -= 1
                if drop and storage.used:
                    self._mover.drop(storage)
                elif storage.resident and storage.held:
                    # Backward gave it to somebody, a gradient say, who may write to it.
                    self._mover.taint(storage)

    # Room.

    def make_room(self, nbytes: int) -> bool:
        """Make room under the limit for ``nbytes`` that are about to be allocated.

        With 0, which is for the moment after a function, copies go out behind the next one.

        Returns:
            Whether there is room now.

        Raises:
            SwapSpaceError: If there is no more space outside.
        """
        if self.used_bytes() + nbytes <= self.low:
            return True
        with self._lock:
            self.adopt()
            self._mover.clear_graves()
            self._reclaim(nbytes)
            used = self.used_bytes()
            if not nbytes and used > self.low:
                self._write_behind(used - self.low)
            return used + nbytes <= self.high

    def move_all_out(self) -> None:
        """Move every storage out that nobody else holds."""
        with self._lock:
            self._mover.clear_graves()
            self._push_out(_EVERYTHING)

    def reclaim(self, nbytes: int) -> int:
        """Give up ``nbytes`` of memory even if so much is free: an allocation has failed, it is in pieces.

        Returns:
            How much has been given up (bytes).

        Raises:
            SwapSpaceError: If there is no more space outside.
        """
        with self._lock:
            self.adopt()
            used = self.device.used_bytes()
            self._reclaim(nbytes + max(self.high - used, 0))
            if self.device.used_bytes() >= used:
                self._mover.wait_for_graves()  # what died may be held by copies under way
            return max(used - self.device.used_bytes(), 0)

    def _reclaim(self, nbytes: int) -> None:
        """Give up memory until ``nbytes`` fit below the high-water mark, or nothing is left to give up."""

        def excess() -> int:
            return self.used_bytes() + nbytes - self.high

        if excess() <= 0:
            return
        self.device.trim()
        for step in (
            self._release_clean,
            self._release_leaving,
            self._push_out,
            self._release_arrivals,
        ):
            missing = excess()
            if missing <= 0:
                return
            if step(missing):
                self.device.trim()

    def _release_clean(self, nbytes: int, used_only: bool = False) -> int:
        """Release storages whose copy is valid: the used ones, then the oldest. Returns bytes."""
        self._settle()
        freed = 0
        for used in (True,) if used_only else (True, False):
            for storage in self._mover.members(State.BOTH):
                if freed >= nbytes:
                    return freed
                if storage.used is used:
                    freed += self._release_unless_held(storage)
        return freed

    def _release_leaving(self, nbytes: int) -> int:
        """Wait for storages on their way out and release them, the first first. Returns bytes."""
        freed = 0
        leaving = self._mover.leaving
        while leaving and freed < nbytes:
            storage = leaving.popleft()()
            if storage is not None and storage.state is State.GOING_OUT:
                self._mover.end_out(storage)
                freed += self._release_unless_held(storage)
        return freed

    def _push_out(self, nbytes: int) -> int:
        """Copy storages out and release them: the oldest first, the used ones last. Returns bytes."""
        freed = 0
        for used in (False, True):
            for storage in self._mover.members(State.RESIDENT):
                if freed + self._mover.nbytes[State.GOING_OUT] >= nbytes:
                    break
                if storage.used is used and not storage.held:
                    self._mover.begin_out(storage)
                    if self._mover.nbytes[State.GOING_OUT] > IN_FLIGHT:
                        freed += self._release_leaving(1)
        return freed + self._release_leaving(nbytes)

    def _release_arrivals(self, nbytes: int) -> int:
        """Release storages that were fetched ahead of their use, the last needed first. Returns bytes."""
        freed = 0
        for storage in self._mover.members(State.COMING_IN):
            if freed >= nbytes:
                break
            self._mover.end_in(storage)
            freed += self._release_unless_held(storage)
        return freed

    def _release_unless_held(self, storage: Storage) -> int:
        if storage.state is not State.BOTH or storage.held:
            return 0
        self._mover.release(storage)
        return storage.nbytes

    def _begin_in(self, storage: Storage) -> None:
        if storage.state is State.OUT:
            self._reclaim(storage.nbytes)
            self._mover.begin_in(storage)

    def _write_behind(self, nbytes: int) -> None:
        """Begin to copy the oldest storages out, until ``nbytes`` could be released at once."""
        self._settle()
        size = self._mover.nbytes
        for storage in self._mover.members(State.RESIDENT):
            if (
                size[State.BOTH] + size[State.GOING_OUT] >= nbytes
                or size[State.GOING_OUT] >= IN_FLIGHT
            ):
                return
            if not storage.used and not storage.held:
                self._mover.begin_out(storage)

    def _settle(self) -> None:
        """Take note of the copies that have ended."""
        leaving = self._mover.leaving
        while leaving:
            storage = leaving[0]()
            if storage is not None and storage.state is State.GOING_OUT:
                if storage.transfer is not None and not storage.transfer.done():
                    return
                leaving.popleft()
                self._mover.end_out(storage)
            else:
                leaving.popleft()

    # When there is none.

    def shortage(self, nbytes: int, what: str) -> OutOfMemoryError | None:
        """Return the error for ``nbytes`` that do not fit if ``strict``; else warn, once, if it is much."""
        strict = self.settings().strict
        over = self.last_used + nbytes - self.limit
        if not strict and (self._has_warned or over <= self.limit * MARGIN):
            return None
        message = self.explain_shortage(nbytes, what)
        if strict:
            return OutOfMemoryError(message)
        self._has_warned = True
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None

    def explain_shortage(self, nbytes: int, what: str) -> str:
        """Return what holds the memory when ``nbytes`` for ``what`` do not fit, and what would help."""
        used = self.used_bytes()
        with self._lock:
            resident = [storage for storage in self.storages() if storage.owner is not None]
            saved = sum(storage.nbytes for storage in resident)
            held = sum(storage.nbytes for storage in resident if storage.held)
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
            return list(self._mover.members(*State))

    def after_fork(self) -> None:
        """In a forked child: what the parent saved can be read, and nothing of the parent's is touched."""
        self._lock = threading.RLock()
        self.device.after_fork()

    def bury(self, storage: Storage) -> None:
        """Forget a dying storage. Called at any time in any thread, even inside these methods."""
        self._mover.bury(storage)

    def settle(self) -> None:
        """Wait for all that is under way and give back the space of all that died."""
        with self._lock:
            for storage in self._mover.members(State.GOING_OUT):
                self._mover.end_out(storage)
            for storage in self._mover.members(State.COMING_IN):
                self._mover.end_in(storage)
            self._mover.wait_for_graves()


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.0f} MiB"
