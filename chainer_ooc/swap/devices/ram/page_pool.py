"""PagePool: memory for large arrays whose pages are used again, wherever in it they lie."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import itertools
import os
import resource
import threading
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from chainer_ooc.swap.free_blocks import FreeBlocks

__all__ = ["PagePool"]

PAGE = os.sysconf("SC_PAGE_SIZE")
#: At least so many bytes lie between two blocks. NumPy 1 has other loops, with other bits, for a result that begins
#: where an operand ends, as blocks of malloc never do.
GAP = 16
#: Beyond this many sizes those that nobody has any more are forgotten.
MANY_SIZES = 64
#: Pages that lie in mappings of fewer bytes, on average, are given back and taken anew: that takes less time than
#: to move them, which is a call of the kernel for each mapping.
WORTH_MOVING = 16 * PAGE
#: Linux lets a process have 65,530 mappings; beyond this many of ours the free ones are made one again.
MOST_SEAMS = 8192

# mman.h of Linux.
_READ_WRITE, _PRIVATE_ANONYMOUS_NORESERVE, _FIXED = 0x3, 0x2 | 0x20 | 0x4000, 0x10
_MOVE_TO_AND_LEAVE_MAPPED = 1 | 2 | 4  # MREMAP_MAYMOVE, _FIXED, _DONTUNMAP (since Linux 5.7)
_FAILED = ctypes.c_void_p(-1).value


class PagePool:
    """Address space, and pages in it that are used again once they are free.

    Memory that went back to the system must be cleared by the kernel, page by page, before a process has it
    again, at a gigabyte or two per second. Here a free block keeps its pages (it is *warm*), and they serve the
    next allocation. Where no warm block is large enough, pages of several are moved to where they are wanted:
    the kernel changes page tables for that (``mremap``) and copies nothing, so that warm pages serve any
    allocation, however they are scattered. :meth:`give_back` returns pages to the system.

    All methods may be called from any thread, and :meth:`free` in the midst of any other.

    Args:
        nbytes: The size of the address space that is reserved; it takes no memory.

    Attributes:
        addresses: Its address space.
        keeps: Whether what is free is kept.

    Raises:
        MemoryError: If there is no address space, as under a limit of it (``RLIMIT_AS``).
    """

    def __init__(self, nbytes: int) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
            raise MemoryError("address space is limited")
        self._size = nbytes // PAGE * PAGE
        start = _map(self._size)
        self.addresses = range(start, start + self._size)
        # Free warm blocks as they were freed, by size: networks ask for the same sizes again and again. Lists are
        # appended to and popped from by any thread with no lock, and stay as long as there is a block of their size.
        # When there is none of a size, all are merged with their neighbours.
        self._as_freed: dict[int, list[int]] = {}
        self._sizes: dict[int, int] = {}  # of blocks in use and as freed
        self._cold, self._warm = FreeBlocks(), FreeBlocks()
        self._cold.insert(start, self._size)
        # Blocks that were handed out with pages that nobody had touched yet, and the bytes of these; and those that
        # were freed since.
        self._untouched: dict[int, int] = {}
        self._freed_untouched: deque[int] = deque()
        # Where one mapping of the kernel ends and the next begins, at least; it moves pages of one at a time.
        self._seams: list[int] = []
        self._moves = True
        self.keeps = True

    @property
    def warm_bytes(self) -> int:
        """The bytes of free memory whose pages are there: resident, and not in use."""
        return self.look(int)[1]

    def look(self, read: Callable[[], int]) -> tuple[int, int]:
        """Return what ``read`` does, and :attr:`warm_bytes` then: nothing is given back between the two."""
        if self._pid != os.getpid():
            return read(), 0
        entered = self._enter()
        try:
            if entered:
                self._settle()
            nbytes = self._warm.nbytes
            for size, addresses in tuple(self._as_freed.items()):
                nbytes += size * len(addresses)
            return read(), nbytes
        finally:
            if entered:
                self._lock.release()

    def allocate(self, nbytes: int, clear: bool = False) -> int | None:
        """Return the address of ``nbytes`` at the beginning of a page, ``None`` if there is none.

        Args:
            nbytes: The size.
            clear: Its bytes are zero.
        """
        if self._pid != os.getpid():
            return None
        size = _pages(nbytes + GAP)
        warm = size
        try:
            address = self._as_freed[size].pop()
        except (KeyError, IndexError):
            if not self._enter():
                return None
            try:
                found = self._take(size)
                if found is None:
                    return None
                address, warm = found
            finally:
                self._lock.release()
        if clear:
            ctypes.memset(address, 0, min(warm, nbytes))
        return address

    def untouched_bytes(self, address: int) -> int:
        """Return how much of a block had no pages when it was handed out (bytes)."""
        return self._untouched.get(address, 0)

    def size_of(self, address: int) -> int:
        """Return the size of a block in use (bytes): what was asked for and a gap, in whole pages."""
        return self._sizes[address]

    def free(self, address: int) -> None:
        """Take back a block."""
        if address in self._untouched:
            self._freed_untouched.append(address)
        else:
            self._as_freed[self._sizes[address]].append(address)
        if not self.keeps:
            self.give_back(self._size)

    def keep(self, keeps: bool) -> None:
        """Keep what is free from now on, as in the beginning, or give it back to the system at once."""
        self.keeps = keeps
        if not keeps:
            self.give_back(self._size)

    def give_back(self, nbytes: int) -> int:
        """Give at least ``nbytes`` of free memory back to the system, or all there is. Returns how much."""
        given = 0
        if not self._enter():
            return 0
        try:
            self._settle()
            self._merge()
            while given < nbytes and self._warm.nbytes:
                size = min(_pages(nbytes - given), self._warm.largest())
                address = self._warm.take(size)
                assert address is not None
                self._cool(address, size)
                given += size
        finally:
            self._lock.release()
        return given

    def _enter(self) -> bool:
        """Lock. ``False`` in a forked child, whose blocks are its parent's, and inside another method.

        A method may be interrupted by a finalizer that allocates.
        """
        if self._pid != os.getpid() or self._lock._is_owned():  # type: ignore[attr-defined]
            return False
        return self._lock.acquire()

    def _take(self, size: int) -> tuple[int, int] | None:
        """Return the address of a block, and how many of its bytes, from the first on, have been in use before."""
        self._settle()
        warm = size
        address = self._warm.take(size)
        if address is None:
            self._merge()
            address = self._warm.take(size)
        if address is None:
            address = self._cold.take(size)
            if address is None:
                return None
            warm = self._gather(address, size)
            if warm < size:
                # The last page may be the gap alone, which nobody would touch: all of a block is there, or not.
                ctypes.memset(address + size - 1, 0, 1)
                self._untouched[address] = size - warm - PAGE
        self._as_freed.setdefault(size, [])
        self._sizes[address] = size
        return address, warm

    def _settle(self) -> None:
        """Take in what has been freed with pages that nobody may have touched."""
        while self._freed_untouched:
            address = self._freed_untouched.popleft()
            size = self._sizes[address]
            del self._untouched[address]
            if _is_resident(address, size):
                self._as_freed[size].append(address)
            else:
                del self._sizes[address]
                self._cool(address, size)

    def _merge(self) -> None:
        for size, addresses in tuple(self._as_freed.items()):
            with contextlib.suppress(IndexError):
                while True:
                    address = addresses.pop()
                    del self._sizes[address]
                    self._warm.insert(address, size)
        if len(self._as_freed) > MANY_SIZES:
            living = set(self._sizes.values())
            self._as_freed = {n: found for n, found in self._as_freed.items() if n in living}

    def _gather(self, address: int, size: int) -> int:
        """Move warm pages to the beginning of a cold block, as many as there are and as are worth it.

        Those that are not go back to the system instead, so that the block's new pages take no more memory.

        Returns:
            The bytes of those that were moved.
        """
        place, left = address, size
        while piece := min(self._warm.largest(), left):
            source = self._warm.take(piece)
            assert source is not None
            left -= piece
            cuts = [source, *self._seams_between(source, source + piece), source + piece]
            is_worth_it = self._moves and piece >= WORTH_MOVING * (len(cuts) - 1)
            if is_worth_it and self._move(cuts, place):
                self._cold.insert(source, piece)
                place += piece
            else:
                self._cool(source, piece)
        if len(self._seams) > MOST_SEAMS:
            self._tidy()
        return place - address

    def _move(self, cuts: list[int], place: int) -> bool:
        """Move the pages of the mappings between ``cuts``, which leaves them cold, and mappings as they were.

        Returns:
            Whether it could be done.
        """
        source, size = cuts[0], cuts[-1] - cuts[0]
        shift = place - source
        self._forget_seams(place, size)
        for start, end in itertools.pairwise(cuts):
            n = end - start
            moved = _libc().mremap(start, n, n, _MOVE_TO_AND_LEAVE_MAPPED, start + shift)
            if moved != start + shift:
                # An old kernel, or too many mappings: from now on new pages are taken instead.
                self._moves = False
                _map(size, at=place)
                return False
        for cut in cuts:
            self._add_seam(cut + shift)
        return True

    def _cool(self, address: int, size: int) -> None:
        """Give the pages of a block back to the system."""
        self._cold.insert(address, size)
        self._renew(address, size)

    def _renew(self, address: int, size: int) -> None:
        _map(size, at=address)  # in place of what was there, its pages and its seams
        self._forget_seams(address, size)
        self._add_seam(address)
        self._add_seam(address + size)

    def _tidy(self) -> None:
        """Make each cold block one mapping; if that is not enough, have no warm ones."""
        for address, size in self._cold.blocks():
            self._renew(address, size)
        if len(self._seams) > MOST_SEAMS // 2:
            for address, size in self._warm.blocks():
                self._warm.take_exactly(address, size)
                self._cool(address, size)

    def _add_seam(self, address: int) -> None:
        index = bisect.bisect_left(self._seams, address)
        if index == len(self._seams) or self._seams[index] != address:
            self._seams.insert(index, address)

    def _seams_between(self, start: int, end: int) -> Iterator[int]:
        first = bisect.bisect_right(self._seams, start)
        return iter(self._seams[first : bisect.bisect_left(self._seams, end)])

    def _forget_seams(self, address: int, size: int) -> None:
        first = bisect.bisect_right(self._seams, address)
        del self._seams[first : bisect.bisect_left(self._seams, address + size)]


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = libc.mremap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    libc.mremap.argtypes = [pointer, size, size, number, pointer]
    libc.mincore.argtypes = [pointer, size, pointer]
    return libc


def _map(size: int, at: int | None = None) -> int:
    """Map new memory of zeros, which takes none until it is touched."""
    flags = _PRIVATE_ANONYMOUS_NORESERVE | (0 if at is None else _FIXED)
    address = _libc().mmap(at, size, _READ_WRITE, flags, -1, 0)
    if address == _FAILED:
        raise MemoryError(f"{size} bytes of address space cannot be mapped")
    return int(address)


def _is_resident(address: int, size: int) -> bool:
    """Tell whether all pages of a block are in memory."""
    pages = bytearray(size // PAGE)  # a buffer of ctypes would be of a class of its own
    if _libc().mincore(address, size, ctypes.byref(ctypes.c_char.from_buffer(pages))):
        return False
    return bool((np.frombuffer(pages, np.uint8) & 1).all())
