"""The device of CuPy arrays: streams copy them to pinned host memory or the swap file and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from chainer_ooc.errors import SwapSpaceError
from chainer_ooc.swap.devices.copy_threads import PIECE, THREADS
from chainer_ooc.swap.devices.cuda.arenas import ArenaPool
from chainer_ooc.swap.devices.cuda.checksum import CudaChecksum
from chainer_ooc.swap.devices.cuda.fingerprints import PINNED, Fingerprint, Fingerprints
from chainer_ooc.swap.devices.cuda.host import DiskCopy, DiskTier, HostTier
from chainer_ooc.swap.devices.cuda.streams import CopyStreams
from chainer_ooc.swap.devices.cuda.transfers import FailedTransfer, StreamTransfer
from chainer_ooc.swap.devices.protocol import (
    Known,
    Layout,
    Location,
    Transfer,
    Verdict,
    lies_alike,
)
from chainer_ooc.swap.devices.ram import native
from chainer_ooc.swap.system import memory
from chainer_ooc.swap.system.ranks import ranks_of_this_node
from chainer_ooc.swap.tiers.pinned import PinnedSlab
from chainer_ooc.swap.tiers.swap_file import ALIGNMENT as PAGE
from chainer_ooc.swap.tiers.swap_file import SwapFile

__all__ = ["STAGING", "CudaDevice", "CupyArrays", "has_limit", "limit_of", "new_slab"]

#: The share of free memory that is left for libraries and kernels, which do not use CuPy's pool.
RESERVE = 0.05
#: The share of the machine's free memory that may be pinned where nobody has set a limit.
SHARE = 0.8
#: The most that staging blocks of a GPU take (bytes).
STAGING = THREADS * PIECE
#: The bytes per second of which fingerprints are taken on slow GPUs: faster ones have faster links, too.
FINGERPRINTED = 400e9
_HOST_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for all GPUs

# Objects that a forked child must not destroy: the driver's objects are the parent's.
_abandoned: list[object] = []


class CupyArrays:
    """Locate and make CuPy's arrays. The last array that drops its ``Memory`` frees it."""

    asks_for_room = True

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._module = cupy.cuda.memory
        # The types of memory in arenas, and in CUDA's own pools.
        self._of_functions = getattr(self._module, "CFunctionAllocatorMemory", CupyArrays)
        self._of_streams = getattr(self._module, "MemoryAsync", CupyArrays)
        self._checksum = CudaChecksum(cupy)

    def locate(self, array: Any) -> Location | None:
        """Return the place of an array; ``None`` if its memory is not CuPy's or not the GPU's."""
        if type(array) is not self._cupy.ndarray:
            return None
        memory = array.data.mem
        kind = type(memory)
        if kind is self._of_functions:
            if not native.allocator.in_arena(memory.ptr):  # another allocator's
                return None
        elif kind is self._module.PooledMemory:
            if memory.identity != "Memory":  # managed, system, foreign
                return None
        elif kind is not self._module.Memory and kind is not self._of_streams:
            return None
        return Location(memory, memory.size, memory.ptr, array.data.ptr - memory.ptr)

    def address(self, owner: Any) -> int:
        """Return the first address of an owner's memory."""
        return int(owner.ptr)

    def address_to_read(self, owner: Any) -> int:
        """Return the first address of an owner's memory, for the computing stream."""
        return int(owner.ptr)

    def allocate(self, nbytes: int, page_offset: int) -> tuple[Any, int]:
        """Return the owner of new memory and the offset of its beginning. All of it is aligned alike.

        Raises:
            MemoryError: If there is no memory.
        """
        if native.allocator is None:
            pointer = self._cupy.cuda.alloc(nbytes)
        else:
            native.allocator.be_quiet(True)
            try:
                pointer = self._cupy.cuda.alloc(nbytes)
            finally:
                native.allocator.be_quiet(False)
        return pointer.mem, pointer.ptr - pointer.mem.ptr

    def empty(self) -> Any:
        """Return an array without elements."""
        return self._cupy.ndarray((0,), "B")

    def checksum(self, owner: Any, origin: int, nbytes: int) -> int:
        """Return the checksum of ``nbytes`` bytes at byte ``origin`` of ``owner``. Wait for it."""
        return self._checksum(owner.ptr + origin, nbytes)

    def view(self, owner: Any, origin: int, layout: Layout) -> Any:
        """Return an array with ``layout`` at byte ``origin`` of ``owner``."""
        pointer = self._cupy.cuda.MemoryPointer(owner, origin + layout.offset)
        return self._cupy.ndarray(layout.shape, layout.dtype, pointer, layout.strides)


class CudaDevice:
    """The memory of one GPU, as CuPy's pool manages it.

    Two non-blocking streams copy beside the computation. :meth:`Transfer.join` makes the GPU wait for a
    copy, not the host. The host waits only for the swap file, and for pinned memory when there is none
    left. The program may compute on streams of its own: copies come after all the work that was queued on
    known streams when the memory was requested.

    Args:
        cupy: CuPy, or a double of it.
        device_id: The GPU's number.
        directory: The directory of the swap file.
        host: Pinned memory, or its limit (bytes), or ``None``: 80 % of the machine's free memory, divided
            by the ranks that share it.
        arrays: Locates and makes arrays.
        pool: Returns the pool that arrays are allocated from. Default: CuPy's default pool.
    """

    runs_behind = True

    def __init__(
        self,
        cupy: Any,
        device_id: int,
        directory: str,
        host: PinnedSlab | int | None = None,
        arrays: CupyArrays | None = None,
        pool: Callable[[], Any] | None = None,
    ) -> None:
        self.name = f"GPU {device_id}"
        self.device_id = device_id
        self.streams = CopyStreams(cupy, device_id)
        self.arrays = CupyArrays(cupy) if arrays is None else arrays
        self.asks_for_room = self.arrays.asks_for_room
        self._cupy = cupy
        self._runtime = cupy.cuda.runtime
        self.pool = cupy.get_default_memory_pool if pool is None else pool
        self._peak = 0
        with self.streams.on_device():
            self.stand_in = self.arrays.empty()
            #: The limit of the pool that the user has set (CUPY_GPU_MEMORY_LIMIT), 0 for none (bytes).
            self.own_limit = limit_of(cupy, self.pool())
            # Asked now: a GPU that has failed does not tell, and statistics need it.
            self._memory_bytes = int(self._runtime.memGetInfo()[1])
            self._gpus = max(self._runtime.getDeviceCount(), 1)
        slab = host if isinstance(host, PinnedSlab) else new_slab(cupy, host, STAGING)
        self._owns_slab = slab is not host
        # Staging blocks count against the limit, unless they would take more than a quarter of it.
        piece = min(PIECE, max(slab.limit // (4 * THREADS) // PAGE, 16) * PAGE)
        #: Pinned memory for pieces on their way to the swap file or back (bytes).
        self.staging_bytes = THREADS * piece
        slab.limit = max(slab.limit - self.staging_bytes, 0)
        self.fingerprints = Fingerprints(cupy, self.streams, new_slab(cupy, PINNED))
        self.disk = DiskTier(self.streams, new_slab(cupy, self.staging_bytes), piece, directory)
        self.host = HostTier(slab, self.streams)

    def may_move(self) -> bool:
        """Return whether no CUDA graph is being captured of a stream on which the program computes."""
        return not self.streams.captured()

    def locate(self, array: Any) -> Location | None:
        """Return the place of an array, ``None`` if it must stay as it is."""
        return self.arrays.locate(array)

    def view(self, owner: Any, origin: int, layout: Layout) -> Any:
        """Return an array with ``layout`` at byte ``origin`` of ``owner``."""
        return self.arrays.view(owner, origin, layout)

    def copy_out(self, owner: Any, origin: int, nbytes: int) -> Transfer:
        """Begin to copy a storage to pinned memory, or to the swap file if there is no more of that.

        Raises:
            SwapSpaceError: If the swap file cannot take the storage either.
        """
        address = self.arrays.address(owner) + origin
        with self.streams.on_device():
            after = self.streams.computed()
            copy = self.host.allocate(nbytes)
            if copy is None:
                try:
                    on_disk = self.disk.allocate(nbytes)
                except SwapSpaceError as error:
                    raise SwapSpaceError(
                        error.errno,
                        f"{error.strerror} (and host_limit leaves {self.host.slab.limit} bytes of page-locked "
                        f"memory, {self.host.slab.allocated} in use)",
                        error.filename,
                    ) from error
                return self.disk.write(on_disk, address, after, owner)
            try:
                begin, copy.written = self.streams.copy_out(copy.address, address, nbytes, after)
            except OSError as error:
                return FailedTransfer(copy, error)
        return StreamTransfer(self.streams, copy, begin, copy.written, owner)

    def copy_in(self, copy: Any, nbytes: int, page_offset: int) -> tuple[Any, int, Transfer]:
        """Allocate memory on the current stream and begin to copy a storage into it.

        Raises:
            MemoryError: If the pool has no memory for the storage.
        """
        with self.streams.on_device():
            owner, origin = self.arrays.allocate(nbytes, page_offset)
            self.note_allocation()
            address = self.arrays.address(owner) + origin
            after = self.streams.allocated()
            if isinstance(copy, DiskCopy):
                return owner, origin, self.disk.read(copy, address, after, owner)
            after.append(copy.written)
            try:
                begin, copy.read = self.streams.copy_in(address, copy.address, nbytes, after)
            except OSError as error:
                return owner, origin, FailedTransfer(copy, error)
        return owner, origin, StreamTransfer(self.streams, copy, begin, copy.read, owner)

    def take_buffer(
        self, array: Any, layout: Layout, nbytes: int, page_offset: int
    ) -> tuple[Any, int]:
        """Use the buffer of ``array`` as the storage's memory if its strides match; else copy."""
        location = self.arrays.locate(array)
        if location is not None and lies_alike(array, location, layout, nbytes):
            return location.owner, 0
        return self.duplicate(array, layout, nbytes, page_offset)

    def duplicate(
        self, array: Any, layout: Layout, nbytes: int, page_offset: int
    ) -> tuple[Any, int]:
        """Copy ``array`` into new memory with that layout. Return the storage's owner and origin."""
        with self.streams.on_device():
            owner, origin = self.arrays.allocate(nbytes, page_offset)
            self.arrays.view(owner, origin, layout)[...] = array
        return owner, origin

    def checksum(self, owner: Any, origin: int, nbytes: int) -> int:
        """Return a checksum of a storage's bytes, computed on the current stream. The host waits for it."""
        with self.streams.on_device():
            return self.arrays.checksum(owner, origin, nbytes)

    def fingerprint(self, owner: Any, origin: int, nbytes: int) -> Fingerprint | None:
        """Begin to take a fingerprint of a storage's bytes; ``None`` if there is no memory for it.

        While a graph is captured it would be taken whenever that runs: ``None``, too.
        """
        with self.streams.on_device():
            if not self.may_move():
                return None
            return self.fingerprints.take(self.arrays.address_to_read(owner) + origin, nbytes)

    def compare(self, pairs: Sequence[tuple[Any, Any]]) -> Verdict:
        """Begin to compare pairs of fingerprints."""
        with self.streams.on_device():
            return self.fingerprints.compare(pairs) if self.may_move() else Known(False)

    def matches(self, fingerprint: Fingerprint, owner: Any, origin: int, nbytes: int) -> Verdict:
        """Begin to find out whether a storage's bytes have a fingerprint."""
        with self.streams.on_device():
            address = self.arrays.address_to_read(owner) + origin
            return self.fingerprints.matches(fingerprint, address, nbytes)

    @property
    def on_one_stream(self) -> bool:
        """Whether the program has computed on one stream only, as far as is known."""
        return self.streams.are_one

    def fingerprint_bandwidth(self) -> float:
        """Return the bytes per second that any GPU reads at least."""
        return FINGERPRINTED

    def before_release(self) -> None:
        """Order the computing streams, if there are several: one may reuse another's memory."""
        self.streams.order_computing()

    def used_bytes(self) -> int:
        """Return the bytes of the pool that arrays and workspaces occupy."""
        with self.streams.on_device():
            return int(self.pool().used_bytes())

    def set_cached_limit(self, nbytes: int) -> None:
        """Do nothing: CuPy's pool has a limit of its own."""

    def mark(self) -> Any:
        """Return an event after all work that was queued until now."""
        return self.streams.mark()

    def seconds(self, earlier: Any, later: Any) -> float:
        """Return the time on the GPU between two events (seconds). Wait for them."""
        return self.streams.seconds(earlier, later)

    def tiers(self) -> list[tuple[str, int | None, bool]]:
        """Return pinned memory, with one stream each way, and the swap file."""
        return [("page-locked memory", self.host.slab.limit, False), ("swap file", None, True)]

    def taken_bytes(self) -> int:
        """Return the GPU memory that the current GPU's pool holds, free blocks included (bytes). Never wait."""
        return int(self.pool().total_bytes())

    def note_allocation(self) -> None:
        """Note an allocation on the current stream, for the peak and for the order of copies."""
        self.streams.note_current()
        self._peak = max(self._peak, self.taken_bytes())

    def order_streams(self, streams: Sequence[int]) -> bool:
        """Make the computing streams wait for each other. Return whether all of ``streams`` are among them."""
        self.streams.order_computing()
        return self.streams.know(streams)

    def peak_bytes(self) -> int:
        """Return the most GPU memory that the pool has held, its cached free blocks included (bytes)."""
        with self.streams.on_device():
            self.note_allocation()
            if isinstance(pool := self.pool(), ArenaPool):
                self._peak = max(self._peak, pool.peak_bytes())
        return self._peak

    def capacity(self) -> int:
        """Return the pool's memory plus the free memory, less a reserve, per rank that shares the GPU (bytes)."""
        with self.streams.on_device():
            free = self._runtime.memGetInfo()[0]
            nbytes = self.taken_bytes() + int(free * (1 - RESERVE)) // self._ranks()
        return min(nbytes, self.own_limit) if self.own_limit else nbytes

    def total_bytes(self) -> int:
        """Return this process's share of the GPU's memory (bytes)."""
        return self._memory_bytes // self._ranks()

    def trim(self, desperate: bool = False) -> None:
        """Do nothing: CuPy's pool returns free blocks itself when it needs to, and that stops the GPU.

        With arenas, what it still holds from before is of use to nobody. What arenas keep for CUDA graphs goes only if
        nothing else is left, as CuPy's pool gives that back when it runs out of memory.
        """
        if isinstance(pool := self.pool(), ArenaPool):
            with self.streams.on_device():
                pool.free_outside()
                if desperate:
                    pool.forget_graphs()

    def move_to(self, directory: str) -> None:
        """Make the next swap file in another directory. Copies in the old file stay readable."""
        if directory != self.disk.file.directory:
            self.disk.file = SwapFile(directory)

    def after_fork(self) -> None:
        """Destroy nothing of the parent's in a forked child, which has no GPU."""
        _abandoned.append((self.streams, self.host, self.disk, self.fingerprints))
        self.fingerprints.after_fork()
        self.host.slab.after_fork()
        self.disk.staging.after_fork()

    def close(self) -> None:
        """Wait for the copies, end the threads and free all space outside the GPU."""
        self.streams.synchronize()
        self.disk.close()
        self.fingerprints.close()
        if self._owns_slab:
            self.host.slab.close()

    def _ranks(self) -> int:
        """Return the number of ranks that share this GPU, if they are dealt out to the machine's GPUs in turn."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if visible and "," not in visible:  # the launcher gave this rank its own GPU
            return 1
        return -(-ranks_of_this_node() // self._gpus)


def has_limit(cupy: Any, pool: Any) -> bool:
    """Return whether a pool can be limited. What CUDA's own pools call a limit is what they keep when it is free."""
    unlimited: type[Any] | None = getattr(cupy.cuda, "MemoryAsyncPool", None)
    return unlimited is None or not isinstance(pool, unlimited)


def limit_of(cupy: Any, pool: Any) -> int:
    """Return the limit of a pool (bytes), 0 for none."""
    return int(pool.get_limit()) if has_limit(cupy, pool) else 0


def new_slab(cupy: Any, limit: int | None, reserve: int = 0) -> PinnedSlab:
    """Return the pinned memory of all GPUs of the process. It takes no memory that the machine does not have.

    Args:
        cupy: CuPy, or a double of it.
        limit: Its limit (bytes); ``None``: 80 % of the machine's free memory, divided by the ranks that
            share it. The other 20 % stay free then, whoever takes memory until a chunk is made.
        reserve: The free memory that it leaves (bytes) if that is more.
    """
    if limit is None:
        available = memory.available_bytes()
        usable = int(available * SHARE)
        limit, reserve = usable // ranks_of_this_node(), max(available - usable, reserve)

    def spare() -> int:
        return max(memory.available_bytes() - reserve, 0) // ranks_of_this_node()

    runtime = cupy.cuda.runtime
    device_id = runtime.getDevice()

    def register(address: int, nbytes: int) -> None:
        with cupy.cuda.Device(device_id):  # also called in the thread that grows the slab
            runtime.hostRegister(address, nbytes, _HOST_REGISTER_PORTABLE)

    return PinnedSlab(limit, register, runtime.hostUnregister, spare)
