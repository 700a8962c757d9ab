"""The device of NumPy arrays: threads copy them from RAM to the swap file and back, with direct I/O."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import xxhash

from chainer_ooc import wording
from chainer_ooc.swap.devices.copy_threads import CopyThreads, FileTransfer
from chainer_ooc.swap.devices.protocol import Known, Location, Span, as_bytes, lies_alike
from chainer_ooc.swap.devices.ram import native
from chainer_ooc.swap.devices.ram.file_copies import FileCopy
from chainer_ooc.swap.system import memory
from chainer_ooc.swap.system.ranks import ranks_of_this_node
from chainer_ooc.swap.tiers.swap_file import ALIGNMENT, SwapFile

if TYPE_CHECKING:
    from chainer_ooc.swap.devices.protocol import Layout

__all__ = ["RamDevice"]

#: Freed arrays of this size (bytes) and more go back to the system at once, when memory has become short.
#: NumPy asks for huge pages from this size on, so that taking them again is cheap.
RETURNED = 4 << 20


@functools.cache
def _checksum_bandwidth() -> float:
    data, fastest = bytes(4 << 20), math.inf
    for _ in range(3):
        start = time.perf_counter()
        xxhash.xxh3_64_intdigest(data)
        fastest = min(fastest, time.perf_counter() - start)
    return len(data) / fastest


class _Backoff:
    """Skip attempts after failures: after each failure twice as many, up to 31."""

    def __init__(self) -> None:
        self._in_vain = self._left = 0

    @property
    def skips(self) -> bool:
        """Whether to skip this attempt."""
        self._left -= 1
        return self._left >= 0

    def lose(self) -> None:
        """Note a failed attempt."""
        self._in_vain = min(self._in_vain + 1, 5)
        self._left = 2**self._in_vain - 1

    def reset(self) -> None:
        """Skip no attempts any more."""
        self._in_vain = self._left = 0


class RamDevice:
    """The process's own memory, in which NumPy's arrays lie.

    Args:
        directory: The directory of the swap file.

    Attributes:
        file: The swap file.
        pages: The ``PagePool`` of large arrays, once memory may get short.
    """

    name = "RAM"
    asks_for_room = runs_behind = False
    on_one_stream = True
    stand_in = np.empty(0, np.uint8)

    def __init__(self, directory: str) -> None:
        self.file = SwapFile(directory)
        self.pages: Any = None
        self._resident = memory.ResidentMemory()
        self._threads = CopyThreads()
        self._memory_is_short = False
        self._cached_limit = 0
        # Running copies in, and the bytes they fill that the kernel does not count yet.
        self._arriving: dict[int, tuple[FileTransfer, int]] = {}
        self._ordinary, self._desperate = _Backoff(), _Backoff()

    def locate(self, array: Any) -> Location | None:
        """Return the place of a plain NumPy array; ``None`` if its memory is not NumPy's or not dense."""
        owner = array
        while (base := owner.base) is not None:
            if type(base) is not np.ndarray:
                return None
            owner = base
        if type(array) is not np.ndarray or array.dtype.hasobject or not owner.flags.owndata:
            return None
        if not _is_dense(owner):
            return None
        start = owner.__array_interface__["data"][0]
        address = start if array is owner else array.__array_interface__["data"][0]
        return Location(owner, owner.nbytes, start, address - start)

    def view(self, owner: np.ndarray, origin: int, layout: Layout) -> np.ndarray:
        """Return an array with ``layout`` in ``owner``, with ``owner`` as its base."""
        array: np.ndarray = np.ndarray(
            layout.shape, layout.dtype, _dense_order(owner), origin + layout.offset, layout.strides
        )
        if not layout.writeable:
            array.flags.writeable = False
        return array

    def copy_out(self, owner: np.ndarray, origin: int, nbytes: int) -> FileTransfer:
        """Begin to write a storage to the swap file."""
        memory = _bytes_of(owner)[origin : origin + nbytes]
        copy = FileCopy(self.file, nbytes, _address(owner) + origin)
        return self._start(copy, copy.write(memory))

    def copy_in(
        self, copy: FileCopy, nbytes: int, page_offset: int
    ) -> tuple[np.ndarray, int, FileTransfer]:
        """Allocate memory with that page offset and begin to read a storage into it."""
        owner, origin = _empty(nbytes, page_offset)
        address = _address(owner)
        pooled = self.pages is not None and address in self.pages
        untouched = self.pages.untouched_bytes(address) if pooled else nbytes
        memory = _bytes_of(owner)[origin : origin + nbytes]
        transfer = self._start(copy, copy.read(memory))
        if untouched:
            self._arriving[id(transfer)] = transfer, untouched
        if self._arriving:
            self._arriving_bytes()  # removes those that have ended
        return owner, origin, transfer

    def take_buffer(
        self, array: np.ndarray, layout: Layout, nbytes: int, page_offset: int
    ) -> tuple[np.ndarray, int]:
        """Use the buffer of ``array`` as the storage's memory if strides and page offset match; else copy."""
        location = self.locate(array)
        if location is not None and lies_alike(array, location, layout, nbytes):
            if (location.address - page_offset) % ALIGNMENT == 0:
                return location.owner, 0
            layout = as_bytes(nbytes)
            array = self.view(location.owner, 0, layout)
        return self.duplicate(array, layout, nbytes, page_offset)

    def duplicate(
        self, array: np.ndarray, layout: Layout, nbytes: int, page_offset: int
    ) -> tuple[np.ndarray, int]:
        """Copy ``array`` into new memory with that layout. Return the storage's owner and origin."""
        owner, origin = _empty(nbytes, page_offset)
        self.view(owner, origin, layout._replace(writeable=True))[...] = array
        return owner, origin

    def checksum(self, owner: np.ndarray, origin: int, nbytes: int) -> int:
        """Return the XXH3 of a storage's bytes, computed about as fast as memory can be read."""
        return xxhash.xxh3_64_intdigest(_bytes_of(owner)[origin : origin + nbytes])

    fingerprint = checksum

    def compare(self, pairs: Sequence[tuple[Any, Any]]) -> Known:
        """Return whether the two fingerprints of each pair are equal."""
        return Known(all(first == second is not None for first, second in pairs))

    def matches(self, fingerprint: int, owner: np.ndarray, origin: int, nbytes: int) -> Known:
        """Return whether a storage's bytes have a fingerprint."""
        return Known(self.fingerprint(owner, origin, nbytes) == fingerprint)

    def fingerprint_bandwidth(self) -> float:
        """Return the bytes per second of which checksums are taken, measured once."""
        return _checksum_bandwidth()

    def before_release(self) -> None:
        """Do nothing: NumPy has finished its work when a call returns."""

    def used_bytes(self) -> int:
        """Return the resident memory plus running copies in, without cached free pages (bytes).

        Cached pages serve the next allocation. Pages beyond :meth:`set_cached_limit` go back to the system.
        """
        arriving = self._arriving_bytes() if self._arriving else 0
        if self.pages is None:
            return self._resident.bytes() + arriving
        return int(self.pages.used_bytes())

    def _arriving_bytes(self) -> int:
        """Return the bytes that running copies in are about to fill: the kernel does not count them yet."""
        total = 0
        for key, (transfer, nbytes) in list(self._arriving.items()):  # other threads add to it
            if transfer.done():
                self._arriving.pop(key, None)
            else:
                total += nbytes
        if self.pages is not None:
            self.pages.set_arriving_bytes(total)
        return total

    def set_cached_limit(self, nbytes: int) -> None:
        """Cap memory in use plus the page pool's cached pages; 0 disables caching."""
        if nbytes != self._cached_limit:
            self._cached_limit = nbytes
            if self.pages is not None:
                self.pages.set_cached_limit(nbytes)

    def keep_pages(self) -> Any:
        """Return the page pool for large arrays, made now if need be; ``None`` if there can be none."""
        if self.pages is None:
            self.pages = _pool_of_process()
            if self.pages is not None:
                self.pages.set_cached_limit(self._cached_limit)
        return self.pages

    def peak_bytes(self) -> int:
        """Return the highest resident memory since the process began (bytes)."""
        return self._resident.peak_bytes()

    def may_move(self) -> bool:
        """Return ``True``."""
        return True

    def capacity(self) -> int:
        """Return this process's memory plus what is available to it, less a reserve of 5 % (bytes)."""
        return memory.attainable_bytes(0.05, ranks_of_this_node())

    def total_bytes(self) -> int:
        """Return this process's share of the machine's memory (bytes)."""
        return memory.physical_bytes() // ranks_of_this_node()

    def mark(self) -> float:
        """Return the time of the host's clock (seconds)."""
        return time.perf_counter()

    def seconds(self, earlier: float, later: float) -> float:
        """Return the time between two moments (seconds)."""
        return later - earlier

    def tiers(self) -> list[tuple[str, int | None, bool]]:
        """Return the swap file. The same threads read and write it."""
        return [("swap file", None, True)]

    def trim(self, desperate: bool = False) -> None:
        """Give free memory of malloc's heaps back to the system.

        This takes milliseconds. After calls that freed nothing it is skipped more and more often, counted
        separately for ``desperate`` calls, when nothing else is left to do.
        """
        if not self._memory_is_short:
            # Only now: memory that is given back at once must be taken anew, which costs time.
            self._memory_is_short = True
            if memory.ucx_keeps_freed_memory():
                wording.warn(
                    "MPI's transport UCX keeps freed memory from going back to the system: memory will grow past "
                    "the limit; set UCX_MEM_EVENTS=no in the environment before MPI is loaded"
                )
            memory.keep_less_freed_memory(RETURNED)
        patience = self._desperate if desperate else self._ordinary
        if patience.skips:
            return
        before = self.used_bytes()
        memory.trim()
        if before - self.used_bytes() >= RETURNED // 4:
            self._ordinary.reset()
            self._desperate.reset()
        else:
            patience.lose()

    def move_to(self, directory: str) -> None:
        """Make the next swap file in another directory. Copies in the old file stay readable."""
        if directory != self.file.directory:
            self.file = SwapFile(directory)

    def after_fork(self) -> None:
        """Start in a forked child with no running copies and a file of its own."""
        self._arriving = {}
        self.file = SwapFile(self.file.directory)

    def close(self) -> None:
        """End the threads and free the file's space."""
        self._threads.close()
        self.set_cached_limit(0)
        self.file.close()

    def _start(self, copy: FileCopy, jobs: list[Callable[[], Span]]) -> FileTransfer:
        transfer = FileTransfer(copy, len(jobs))
        for job in jobs:
            self._threads.submit(functools.partial(transfer.run, job))
        return transfer


@functools.cache
def _pool_of_process() -> Any:
    """Return the process's only page pool; ``None`` without the extension or if address space is limited.

    Arrays in it may outlive the device. A forked child has a copy of it.
    """
    try:
        return native.allocator and native.allocator.PagePool(4 * psutil.virtual_memory().total)
    except MemoryError:
        return None


def _empty(nbytes: int, page_offset: int) -> tuple[np.ndarray, int]:
    """Return new memory, and the byte in it whose address is ``page_offset`` modulo the page size."""
    owner = np.empty(nbytes, np.uint8)
    if (_address(owner) - page_offset) % ALIGNMENT == 0:
        return owner, 0
    del owner
    owner = np.empty(nbytes + ALIGNMENT, np.uint8)
    return owner, (page_offset - _address(owner)) % ALIGNMENT


def _is_dense(owner: np.ndarray) -> bool:
    if owner.flags.c_contiguous or owner.flags.f_contiguous:
        return True
    return _dense_order(owner).flags.c_contiguous


def _dense_order(owner: np.ndarray) -> np.ndarray:
    """Return ``owner`` with its axes in the order of memory: C-contiguous if it is dense."""
    if owner.flags.c_contiguous:
        return owner
    return owner.transpose(sorted(range(owner.ndim), key=lambda axis: -owner.strides[axis]))


def _bytes_of(owner: np.ndarray) -> memoryview:
    flat: Any = _dense_order(owner).reshape(-1).view(np.uint8)
    return memoryview(flat)


def _address(owner: np.ndarray) -> int:
    return int(owner.__array_interface__["data"][0])
