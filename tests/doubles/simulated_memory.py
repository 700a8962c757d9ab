"""Memory of a simulated GPU: CuPy's pools, blocks and arrays."""

from __future__ import annotations

import ctypes
import mmap
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_ooc.swap.tiers.free_blocks import FreeBlocks

if TYPE_CHECKING:
    from tests.doubles.simulated_cuda import SimulatedCuda

__all__ = [
    "POISON",
    "Array",
    "Gpu",
    "Memory",
    "MemoryPointer",
    "OutOfMemoryError",
    "Pool",
    "PooledMemory",
]

#: What freed memory is filled with.
POISON = 0xE5
_UNIT = 512


class OutOfMemoryError(MemoryError):
    """What the pool raises."""


class Gpu:
    """The memory of one GPU.

    Args:
        total: Its size (bytes).
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = FreeBlocks()
        self._memory = mmap.mmap(-1, total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.free.insert(ctypes.addressof(ctypes.c_char.from_buffer(self._memory)), total)
        #: What pools have taken of it (``cudaMalloc``): address and size.
        self.regions: dict[int, int] = {}

    def owns(self, address: int) -> bool:
        """Tell whether an address is in memory that a pool has taken."""
        return any(start <= address < start + size for start, size in tuple(self.regions.items()))


class Memory:
    """Memory allocated without a pool (``cupy.cuda.Memory``). To free it waits for the GPU."""

    def __init__(self, size: int = 0, machine: SimulatedCuda | None = None) -> None:
        self.ptr, self.size, self.device_id = 0, size, 0
        if machine is None:
            return
        self.device_id = device_id = machine.current_device()
        gpu = machine.gpus[device_id]
        with machine.lock:
            address = gpu.free.take(size)
            if address is None:
                raise OutOfMemoryError(f"{size} bytes")
            self.ptr = address
            gpu.regions[address] = size
        self._token = np.empty(0)

        def give_back(address: int = address) -> None:
            machine.synchronize(device_id)
            del gpu.regions[address]
            gpu.free.insert(address, size)
            machine.accesses.forget(address, address + size)

        weakref.finalize(self._token, machine.lock.defer, give_back)


class PooledMemory:
    """A block of the pool; it goes back when nobody refers to it.

    CuPy's are unknown to the cyclic garbage collector, which else would finalize them with a dying storage
    that passes them on. Here the block goes back with an object that it does not know, an array.
    """

    identity = "Memory"

    def __init__(self, address: int, size: int, device_id: int, free: Callable[[], None]) -> None:
        self.ptr, self.size, self.device_id = address, size, device_id
        self._token = np.empty(0)
        weakref.finalize(self._token, free).atexit = False


class MemoryPointer:
    """A place in memory."""

    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id


class _DevicePool:
    """What a pool has of one GPU: regions, and their free blocks by the stream that they were allocated on."""

    def __init__(self) -> None:
        self.limit = self.used = self.total = 0
        self.regions: dict[int, tuple[int, int]] = {}  # address: size, arena
        self.arenas: dict[int, FreeBlocks] = {}


class Pool:
    """``cupy.cuda.MemoryPool``: one object for all GPUs, which deals with the current one."""

    machine: SimulatedCuda

    def __init__(self) -> None:
        self._pools = [_DevicePool() for _ in self.machine.gpus]

    def malloc(self, nbytes: int) -> MemoryPointer:
        """Take a free block of the current stream, or a new region.

        Raises:
            OutOfMemoryError: If there is none, and none is left when all free regions have been given back.
        """
        machine, pool = self.machine, self._pool
        with machine.lock:
            machine.fail_if_told("malloc", OutOfMemoryError)
            if nbytes == 0:
                return MemoryPointer(Memory(), 0)
            size = -(-nbytes // _UNIT) * _UNIT
            stream, device_id = machine.get_current_stream(), machine.current_device()
            arena, queue = machine.arena_of(stream), stream.queue
            address = pool.arenas.setdefault(arena, FreeBlocks()).take(size)
            if address is None:
                address = self._new_region(size, arena)
            pool.used += size
            machine.kernel("the first use of new memory", [], [(address, size)], queue=queue)

        def poison() -> None:
            ctypes.memset(address, POISON, size)

        def insert() -> None:
            pool.used -= size
            name = "what uses the memory after it was freed"
            machine.kernel(name, [], [(address, size)], poison, queue)
            pool.arenas[arena].insert(address, size)

        free = lambda: machine.lock.defer(insert)  # noqa: E731
        return MemoryPointer(PooledMemory(address, size, device_id, free), 0)

    def used_bytes(self) -> int:
        """Return what is in use (bytes)."""
        return self._pool.used + self.machine.adopted_bytes()

    def total_bytes(self) -> int:
        """Return what has been taken of the GPU (bytes)."""
        return self._pool.total

    def set_limit(self, size: int) -> None:
        """Set the most that is taken of the GPU (bytes), 0 for all."""
        self._pool.limit = size

    def get_limit(self) -> int:
        """Return it."""
        return self._pool.limit

    def free_all_blocks(self) -> None:
        """Give regions back that are free as a whole. That waits for the GPU."""
        machine, pool = self.machine, self._pool
        gpu = machine.gpus[machine.current_device()]
        with machine.lock:
            for address, (size, arena) in list(pool.regions.items()):
                if pool.arenas[arena].take_exactly(address, size):
                    machine.synchronize(machine.current_device())
                    del pool.regions[address], gpu.regions[address]
                    pool.total -= size
                    gpu.free.insert(address, size)

    @property
    def _pool(self) -> _DevicePool:
        return self._pools[self.machine.current_device()]

    def _new_region(self, size: int, arena: int) -> int:
        pool, gpu = self._pool, self.machine.gpus[self.machine.current_device()]
        limit = pool.limit or gpu.total

        def fits() -> bool:
            return pool.total + size <= limit and gpu.free.largest() >= size

        if not fits():
            self.free_all_blocks()
        if not fits():
            raise OutOfMemoryError(f"{size} bytes, {pool.total} taken, limit {limit}")
        address = gpu.free.take(size)
        assert address is not None
        gpu.regions[address] = size
        pool.regions[address] = size, arena
        pool.total += size
        pool.arenas[arena].add_region(address, size)
        taken = pool.arenas[arena].take_exactly(address, size)
        assert taken
        return address


class Array:
    """A dense or strided array in simulated memory: a layout, and the little arithmetic that tests need."""

    machine: SimulatedCuda

    def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.nbytes = int(np.prod(self.shape, dtype=int)) * self.dtype.itemsize
        if strides is None:
            sizes = [int(np.prod(self.shape[i + 1 :], dtype=int)) for i in range(len(self.shape))]
            strides = [size * self.dtype.itemsize for size in sizes]
        self.strides = tuple(strides)
        self.data = self.machine.cuda.alloc(self.nbytes) if memptr is None else memptr
        self.flags = types.SimpleNamespace()

    @property
    def span(self) -> tuple[int, int]:
        """Address and size of the bytes from the first to the last element."""
        steps = zip(self.shape, self.strides, strict=True)
        return self.data.ptr, sum((n - 1) * s for n, s in steps) + self.dtype.itemsize

    def view(self) -> Callable[[], np.ndarray]:
        """What makes NumPy's view of the elements. For kernels: it does not hold the memory, as they do not."""
        (address, size), shape, dtype, strides = self.span, self.shape, self.dtype, self.strides

        def make() -> np.ndarray:
            memory: Any = (ctypes.c_char * size).from_address(address)
            return np.ndarray(shape, dtype, memory, 0, strides)

        return make

    def get(self) -> np.ndarray:
        """Read on the current stream and wait."""
        result: list[np.ndarray] = []
        view = self.view()

        def read() -> None:
            result.append(view().copy())

        self.machine.kernel("a read of the result", [self.span], [], read)
        self.machine.get_current_stream().synchronize()
        return result[0]

    def fill(self, value: Any) -> None:
        """Write on the current stream."""
        view = self.view()
        self.machine.kernel("a fill", [], [self.span], lambda: view().fill(value))

    def add(self, value: Any) -> None:
        """Read and write on the current stream."""
        view = self.view()
        self.machine.kernel(
            "an addition", [self.span], [self.span], lambda: np.add(view(), value, view())
        )

    def __setitem__(self, key: Any, other: Array) -> None:
        """Copy the elements of another array to all of its own, on the current stream."""
        assert key is ...
        target, source = self.view(), other.view()
        self.machine.kernel(
            "a copy", [other.span], [self.span], lambda: np.copyto(target(), source())
        )
