"""Blocks of exact size in page-locked (pinned) host memory, under a hard cap."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable

from chainer_ooc.swap.tiers.free_blocks import FreeBlocks, round_up

__all__ = ["ALIGNMENT", "PinnedSlab"]

#: Blocks begin at multiples of this (bytes), and their sizes are rounded up to it.
ALIGNMENT = 512
#: The slab grows by chunks of at least this size (bytes), and of at least a quarter of what it has.
CHUNK = 64 << 20

# Registered memory that a forked child must never unmap: another mapping may lie at its address there.
_abandoned: list[object] = []


class PinnedSlab:
    """Hand out blocks of any size from a few large chunks of pinned memory.

    CuPy's own pool of pinned memory rounds sizes up to powers of two. It allocates block by block, which
    takes milliseconds each and serializes the GPU's streams. Here a thread maps and registers a whole chunk
    before the last one is used up. All methods may be called from any thread.

    Args:
        limit: The most bytes to register.
        spare: Returns how many bytes more the slab may take now: the machine's memory may be others' by then.
        register: Page-locks memory. Takes an address and a size (bytes). Raises if that fails.
        unregister: Undoes that. Takes the address.

    Attributes:
        limit: The most bytes to register. Lowering it unregisters nothing.
        spare: As given. It is asked for each chunk, which may be smaller then.
        size: The bytes that are registered, or about to be.
        allocated: The bytes that are handed out.
    """

    def __init__(
        self,
        limit: int,
        register: Callable[[int, int], None],
        unregister: Callable[[int], None],
        spare: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        self.limit = limit
        self.spare = spare
        self.size = 0
        self.allocated = 0
        self._register = register
        self._unregister = unregister
        self._free = FreeBlocks()
        self._chunks: list[tuple[int, mmap.mmap]] = []
        self._lock = threading.Lock()
        self._growing: threading.Thread | None = None
        self._refused = False  # the system has no more memory to lock
        self._is_short = False  # nothing could be spared for a chunk ahead of need

    def allocate(self, nbytes: int) -> int | None:
        """Return the address of a block of at least ``nbytes`` bytes, ``None`` if the slab is full."""
        size = round_up(nbytes, ALIGNMENT)
        with self._lock:
            address = self._free.take(size)
        if address is None:
            self.wait()
            with self._lock:
                if self._free.largest() < size:
                    self._grow(size)
                address = self._free.take(size)
                if address is None:
                    return None
        with self._lock:
            self.allocated += size
            if self._growing is None and not self._is_short:
                self._grow_ahead()
        return address

    def ask_again(self) -> None:
        """Ask the system for memory at the next allocation even if it has refused some before."""
        self._refused = self._is_short = False

    def free(self, address: int, nbytes: int) -> None:
        """Take back the block of ``nbytes`` bytes at ``address``."""
        with self._lock:
            if self._chunks:  # else this is a forked child, and the block is the parent's
                size = round_up(nbytes, ALIGNMENT)
                self.allocated -= size
                self._free.insert(address, size)

    def wait(self) -> None:
        """Wait until the thread has made the next chunk."""
        thread = self._growing
        if thread is not None:
            thread.join()

    def after_fork(self) -> None:
        """Forget all memory in a forked child, which does not have it (``MADV_DONTFORK``)."""
        _abandoned.append(self._chunks)
        self._chunks, self._free = [], FreeBlocks()
        self.size = self.allocated = self.limit = 0
        self._lock, self._growing = threading.Lock(), None

    def close(self) -> None:
        """Give all memory back to the system. No block may be in use."""
        self.wait()
        with self._lock:
            for address, memory in self._chunks:
                self._unregister(address)
                memory.close()
            self._chunks, self._free = [], FreeBlocks()
            self.size = self.allocated = 0

    def _next_chunk(self, room: int) -> int:
        """Return the size of the next chunk to make where there is ``room`` (bytes), 0 for none."""
        if self._refused or room <= 0:
            return 0
        wanted = round_up(max(CHUNK, self.size // 4), mmap.PAGESIZE)
        return min(wanted, room // mmap.PAGESIZE * mmap.PAGESIZE)

    def _room(self) -> int:
        """Return how many bytes more may be registered now."""
        room = self.limit - self.size
        return min(room, self.spare()) if room > 0 else 0

    def _grow_ahead(self) -> None:
        """Let a thread make the next chunk if less than half of it is free."""
        if self._free.nbytes >= self._next_chunk(self.limit - self.size) // 2:
            return
        nbytes = self._next_chunk(self._room())
        if self._free.nbytes >= nbytes // 2:
            self._is_short = True
            return
        thread = threading.Thread(
            target=self._make_ahead, args=(nbytes,), name="chainer_ooc-pin", daemon=True
        )
        try:
            thread.start()
        except (
            RuntimeError
        ):  # the system allows no more threads: chunks are made when they are needed
            self._is_short = True
        else:
            self.size += nbytes
            self._growing = thread

    def _make_ahead(self, nbytes: int) -> None:
        chunk = self._make(nbytes)
        with self._lock:
            self._add(chunk, nbytes)
            self._growing = None

    def _grow(self, nbytes: int) -> None:
        """Add a chunk with a block of ``nbytes``, if the limit and the machine's memory allow it."""
        smallest = round_up(nbytes, mmap.PAGESIZE)
        room = self._room()
        for size in sorted({max(smallest, self._next_chunk(room)), smallest}, reverse=True):
            if size <= room and not self._refused:
                self.size += size
                chunk = self._make(size)
                self._add(chunk, size)
                if chunk is not None:
                    self._is_short = False
                    return
                self._refused = size == smallest  # else a smaller chunk may succeed

    def _add(self, chunk: tuple[int, mmap.mmap] | None, nbytes: int) -> None:
        if chunk is None:
            self._refused = True
            self.size -= nbytes
        else:
            self._chunks.append(chunk)
            self._free.add_region(chunk[0], nbytes)

    def _make(self, nbytes: int) -> tuple[int, mmap.mmap] | None:
        """Map and register a chunk. Return ``None`` if the system refuses."""
        try:
            memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            return None
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        # A GPU goes on writing to the parent's pages; after a fork those might be copies of them.
        memory.madvise(mmap.MADV_DONTFORK)
        try:
            self._register(address, nbytes)
        except Exception:  # CuPy's CUDARuntimeError, whatever the reason
            memory.close()
            return None
        return address, memory
