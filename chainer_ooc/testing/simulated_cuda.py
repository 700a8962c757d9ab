"""A stand-in for the part of CuPy that the CUDA device uses: its own code runs, and is checked, with no GPU.

:class:`SimulatedCuda` is given to :class:`~chainer_ooc.swap.devices.cuda.CudaDevice` in the place of
``cupy``. It is stricter than hardware, which hides most mistakes most of the time:

* Work on a stream is put off. It runs when the rules force it, or at random, by the seed.
* Each copy and kernel has a vector clock. Two accesses to the same bytes of which one writes and that no
  event, and no wait of the host, puts in order are a race, whether or not it showed this time. :attr:`races`
  names the two and the edge that is missing.
* Freed memory is overwritten at once, as the next owner might: in the order of the stream that it was
  allocated on.

The rules, and where they are from:

* Streams run in order; between them there is no order but through events, and none with the legacy default
  stream for those made non-blocking (CUDA C++ Programming Guide, "Streams"; CUDA Runtime API, "Stream
  synchronization behavior").
* An event stands for what its stream had been given when it was recorded; to wait for one that was never
  recorded is to wait for nothing; waiting captures the event as it is then (CUDA Runtime API,
  ``cudaEventRecord``, ``cudaStreamWaitEvent``).
* Asynchronous copies of the host's memory need it page-locked (``cudaMemcpyAsync``, ``cudaHostRegister``).
* A freed block is at once on the free list of the stream that it was allocated on, split and merged; when
  there is none that fits, whole regions are given back, then ``OutOfMemoryError`` is raised; a limit counts
  free blocks too (CuPy, ``cupy/cuda/memory.pyx``). To give a region back waits for the device
  (``cudaFree``; Programming Guide, "Implicit Synchronization").

``tests/gpu`` checks that the real runtime keeps each of them as far as it can be observed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import random
import threading
import types
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from chainer_ooc.swap.free_blocks import FreeBlocks
from chainer_ooc.testing.vector_clocks import Access, Accesses, Clock, merge

__all__ = ["CUDARuntimeError", "OutOfMemoryError", "SimulatedCuda"]

POISON = 0xE5
_UNIT = 512
_HOST = "the host"


class CUDARuntimeError(RuntimeError):
    """What the runtime's calls raise."""


class OutOfMemoryError(MemoryError):
    """What the pool raises."""


class _Lock:
    """A lock that a thread may take again, and what must not happen inside: the collector's work."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._deferred: deque[Callable[[], object]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *args: object) -> None:
        while self._depth == 1 and self._deferred:
            self._deferred.popleft()()
        self._depth -= 1
        self._lock.release()

    def defer(self, job: Callable[[], object]) -> None:
        """Run a job now, or when the calling thread has left: memory may die in the midst of anything."""
        with self:
            self._deferred.append(job)


class _Memory:
    """Memory allocated without a pool (``cupy.cuda.Memory``)."""

    def __init__(self, size: int = 0) -> None:
        self.ptr, self.size, self.device_id = 0, size, 0


class _PooledMemory:
    """A block of the pool; it goes back when nobody refers to it.

    CuPy's are unknown to the cyclic garbage collector, which else would finalize them with a dying storage
    that passes them on. Here the block goes back with an object that it does not know, an array.
    """

    identity = "Memory"

    def __init__(self, pool: _Pool, address: int, size: int, stream: _Stream) -> None:
        self.ptr, self.size, self.device_id = address, size, pool.device_id
        self._token = np.empty(0)
        pool.blocks[address] = weakref.ref(self._token, lambda _: pool.free(address, size, stream))


class _MemoryPointer:
    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id


class _Stream:
    """A queue of work that is put off."""

    def __init__(self, machine: SimulatedCuda, name: str, pointer: int, device_id: int) -> None:
        self.ptr, self.name, self.device_id = pointer, name, device_id
        self.clock: Clock = {}
        self.items: deque[Callable[[], None] | tuple[_Stream, int]] = deque()
        self.executed = 0
        self._machine = machine

    def record(self, event: Any = None) -> Any:
        event = self._machine.cuda.Event() if event is None else event
        with self._machine.lock:
            merge(self.clock, self._machine.host_clock)
            self._machine._tick(self)
            event._clock = dict(self.clock)
            event._place = (self, self._machine._enqueue(self, lambda: None))
        return event

    def wait_event(self, event: Any) -> None:
        machine = self._machine
        with machine.lock:
            machine.count("wait_event")
            if event._place is not None:
                merge(self.clock, machine.host_clock)
                merge(self.clock, event._clock)
                machine._enqueue(self, event._place)

    def synchronize(self) -> None:
        with self._machine.lock:
            self._machine._run(self, self.executed + len(self.items) - 1)
            merge(self._machine.host_clock, self.clock)

    @property
    def done(self) -> bool:
        return not self.items

    def __enter__(self) -> _Stream:
        self._machine._current_streams().append(self)
        return self

    def __exit__(self, *args: object) -> None:
        self._machine._current_streams().pop()


class _Event:
    def __init__(self, machine: SimulatedCuda) -> None:
        self._machine = machine
        self._clock: Clock = {}
        self._place: tuple[_Stream, int] | None = None

    @property
    def done(self) -> bool:
        machine = self._machine
        with machine.lock:
            machine._progress()
            if self._place is None or self._place[0].executed > self._place[1]:
                merge(machine.host_clock, self._clock)
                return True
            return False

    def synchronize(self) -> None:
        with self._machine.lock:
            self._machine.count("synchronize")
            if self._place is not None:
                self._machine._run(*self._place)
            merge(self._machine.host_clock, self._clock)


class _Pool:
    """The memory of one GPU: its regions (``cudaMalloc``), and free blocks for each stream."""

    def __init__(self, machine: SimulatedCuda, device_id: int, total: int) -> None:
        self.device_id, self.total, self.limit = device_id, total, 0
        self._memory = mmap.mmap(-1, total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.regions: dict[int, tuple[int, int]] = {}  # address: size, stream
        self.blocks: dict[int, weakref.ref[Any]] = {}
        self.used = 0
        self._space = FreeBlocks()
        self._space.insert(self.start, total)
        self._arenas: dict[int, FreeBlocks] = {}
        self._machine = machine

    def malloc(self, nbytes: int) -> _MemoryPointer:
        machine = self._machine
        with machine.lock:
            machine._fail_if_told("malloc", OutOfMemoryError)
            if nbytes == 0:
                return _MemoryPointer(_Memory(), 0)
            size = -(-nbytes // _UNIT) * _UNIT
            stream = machine.get_current_stream()
            arena = self._arenas.setdefault(stream.ptr, FreeBlocks())
            address = arena.take(size)
            if address is None:
                address = self._new_region(size, stream)
            self.used += size
            machine.kernel("the first use of new memory", [], [(address, size)], stream=stream)
            return _MemoryPointer(_PooledMemory(self, address, size, stream), 0)

    def free(self, address: int, size: int, stream: _Stream) -> None:
        machine = self._machine

        def poison() -> None:
            ctypes.memset(address, POISON, size)

        def insert() -> None:
            self.used -= size
            what = "what uses the memory after it was freed"
            machine.kernel(what, [], [(address, size)], poison, stream)
            self._arenas[stream.ptr].insert(address, size)

        machine.lock.defer(insert)

    def total_bytes(self) -> int:
        return sum(size for size, _ in self.regions.values())

    def used_bytes(self) -> int:
        return self.used + self._machine.adopted_bytes()

    def set_limit(self, size: int) -> None:
        self.limit = size

    def get_limit(self) -> int:
        return self.limit

    def free_all_blocks(self) -> None:
        for address, (size, stream) in list(self.regions.items()):
            if self._arenas[stream].take_exactly(address, size):
                self._machine.synchronize()
                del self.regions[address]
                self._space.insert(address, size)

    def owner_of(self, address: int) -> bool:
        return any(a <= address < a + size for a, (size, _) in self.regions.items())

    def _new_region(self, size: int, stream: _Stream) -> int:
        limit = self.limit or self.total
        if self.total_bytes() + size > limit or self._space.largest() < size:
            self.free_all_blocks()
        if self.total_bytes() + size > limit or self._space.largest() < size:
            raise OutOfMemoryError(f"{size} bytes, {self.total_bytes()} taken, limit {limit}")
        address = self._space.take(size)
        assert address is not None
        self.regions[address] = size, stream.ptr
        self._arenas[stream.ptr].add_region(address, size)
        taken = self._arenas[stream.ptr].take_exactly(address, size)
        assert taken
        return address


class _Array:
    """A dense or strided array in simulated memory: a layout, no arithmetic."""

    def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.nbytes = int(np.prod(self.shape, dtype=int)) * self.dtype.itemsize
        self.strides = strides or np.empty(0, self.dtype).reshape(0).strides
        if strides is None:
            sizes = [int(np.prod(self.shape[i + 1 :], dtype=int)) for i in range(len(self.shape))]
            self.strides = tuple(size * self.dtype.itemsize for size in sizes)
        self.data = self._machine.cuda.alloc(self.nbytes) if memptr is None else memptr
        self.flags = types.SimpleNamespace()

    _machine: SimulatedCuda

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
        view, stream = self.view(), self._machine.get_current_stream()
        self._machine.kernel(
            "a read of the result", [self.span], [], lambda: result.append(view().copy())
        )
        stream.synchronize()
        return result[0]

    def fill(self, value: Any) -> None:
        """Write on the current stream."""
        view = self.view()
        self._machine.kernel("a fill", [], [self.span], lambda: view().fill(value))

    def add(self, value: Any) -> None:
        """Read and write on the current stream."""
        view = self.view()
        self._machine.kernel(
            "an addition", [self.span], [self.span], lambda: np.add(view(), value, view())
        )


class SimulatedCuda:
    """Stands for the module ``cupy``, on a machine with simulated GPUs.

    Args:
        seed: Decides when work runs.
        total: Memory of each GPU (bytes).
        devices: How many GPUs there are.

    Attributes:
        races: What was found, in words.
        calls: How often functions were called, by name.
        label: Names what lies at an address, for :attr:`races`; ``None`` if it does not know.
        fail: By the name of a function (``"malloc"``, ``"memcpyAsync"``, ``"hostRegister"``): the numbers of
            the calls from now on that are to fail, 0 for the next.
    """

    def __init__(self, seed: int = 0, total: int = 64 << 20, devices: int = 1) -> None:
        self.lock = _Lock()
        self.races: list[str] = []
        self.calls: Counter[str] = Counter()
        self.label: Callable[[int], str | None] = lambda address: None
        self.fail: dict[str, list[int]] = {}
        self.host_clock: Clock = {}
        self.eager = False
        self.adopted_bytes: Callable[[], int] = lambda: 0
        self.is_device_memory: Callable[[int], bool] = self._is_of_a_pool
        self.accesses = Accesses()
        self.pinned: dict[int, int] = {}
        self._random = random.Random(seed)
        self._eagerness = self._random.choice((0.0, 0.0, 0.1, 0.6))
        self._local = threading.local()
        self._null = [
            _Stream(self, "the computing stream" + (f" of GPU {i}" if i else ""), 0, i)
            for i in range(devices)
        ]
        # A stream that its owner has destroyed still does what it was given.
        self._streams: weakref.WeakValueDictionary[int, _Stream] = weakref.WeakValueDictionary()
        self._busy: dict[_Stream, None] = {}
        self._made = 0
        self._pools = [_Pool(self, i, total) for i in range(devices)]
        self._allocator: Callable[[int], Any] = self._stock_malloc
        self.ndarray = type("ndarray", (_Array,), {"_machine": self})
        self._make_modules()

    def _make_modules(self) -> None:
        runtime = types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            memcpyHostToDevice=1,
            memcpyDeviceToHost=2,
            getDevice=self._get_device,
            getDeviceCount=lambda: len(self._pools),
            hostRegister=self._host_register,
            hostUnregister=self._host_unregister,
            memcpyAsync=self._memcpy_async,
            memGetInfo=self._mem_get_info,
        )
        memory = types.SimpleNamespace(
            PooledMemory=_PooledMemory, Memory=_Memory, OutOfMemoryError=OutOfMemoryError
        )
        self.cuda = types.SimpleNamespace(
            runtime=runtime,
            memory=memory,
            MemoryPointer=_MemoryPointer,
            Stream=self._new_stream,
            Event=lambda disable_timing=False: _Event(self),
            Device=self._device,
            alloc=lambda nbytes: self._allocator(nbytes),
            get_allocator=lambda: self._allocator,
            set_allocator=self._set_allocator,
            get_current_stream=self.get_current_stream,
            is_available=lambda: True,
        )

    # What CuPy has at its top.

    def get_default_memory_pool(self) -> _Pool:
        """Return the pool of the current GPU."""
        return self._pools[self._get_device()]

    def get_current_stream(self) -> _Stream:
        """Return the calling thread's current stream."""
        streams = self._current_streams()
        return streams[-1] if streams else self._null[self._get_device()]

    # For tests.

    def kernel(
        self,
        name: str,
        reads: Sequence[tuple[int, int]],
        writes: Sequence[tuple[int, int]],
        run: Callable[[], object] = lambda: None,
        stream: _Stream | None = None,
    ) -> None:
        """Put work on a stream.

        Args:
            name: For :attr:`races`.
            reads: Addresses and sizes of what it reads.
            writes: Of what it writes.
            run: Does it.
            stream: The current one if left out.
        """
        stream = stream or self.get_current_stream()
        with self.lock:
            self._progress()
            merge(stream.clock, self.host_clock)
            index = self._tick(stream)
            for spans, is_write in ((reads, False), (writes, True)):
                for address, size in spans:
                    access = Access(name, stream.name, index, is_write, address, address + size)
                    self.note(access, stream.clock)
            self._enqueue(stream, run)

    def note(self, access: Access, clock: Clock) -> None:
        """Count an access, and every earlier one that it races with among :attr:`races`."""
        for other in self.accesses.add(access, clock):
            label = self.label(access.start) or self.label(other.start) or "memory"
            verb = "writes" if access.is_write else "reads"
            was = "writes" if other.is_write else "reads"
            self.races.append(
                f"{access.name} {verb} {label} on {access.actor} while {other.name} {was} it on {other.actor}: "
                f"{access.actor} does not wait for {other.actor}"
            )

    def check(self) -> None:
        """Run all that is put off, and raise an ``AssertionError`` if there were races."""
        self.synchronize()
        assert not self.races, "\n".join(self.races)

    def synchronize(self) -> None:
        """Wait for the devices."""
        with self.lock:
            for stream in (*self._null, *self._streams.values(), *self._busy):
                stream.synchronize()

    def count(self, name: str) -> None:
        """Count a call."""
        self.calls[name] += 1

    # Streams.

    def _new_stream(self, non_blocking: bool = False) -> _Stream:
        with self.lock:
            self._made += 1
            name = f"{'non-blocking ' if non_blocking else ''}stream {self._made}"
            stream = _Stream(self, name, 0x1000 + self._made, self._get_device())
            self._streams[stream.ptr] = stream
            return stream

    def _current_streams(self) -> list[_Stream]:
        return self._local.__dict__.setdefault("streams", [])

    def _tick(self, stream: _Stream) -> int:
        stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
        return stream.clock[stream.name]

    def _enqueue(self, stream: _Stream, item: Any) -> int:
        stream.items.append(item)
        self._busy[stream] = None
        index = stream.executed + len(stream.items) - 1
        if self.eager and stream in self._null:
            self._run(stream, index)
        return index

    def _run(self, stream: _Stream, index: int) -> None:
        """Run what a stream was given up to a place, and what that waits for."""
        while stream.executed <= index:
            item = stream.items.popleft()
            stream.executed += 1
            if isinstance(item, tuple):
                self._run(*item)
            else:
                item()
        if not stream.items:
            self._busy.pop(stream, None)

    def _progress(self) -> None:
        """Let time pass, or not."""
        while self._random.random() < self._eagerness:
            if not self._busy:
                return
            stream = self._random.choice(list(self._busy))
            item = stream.items[0]
            if not isinstance(item, tuple) or item[0].executed > item[1]:
                self._run(stream, stream.executed)

    def _is_of_a_pool(self, address: int) -> bool:
        return any(pool.owner_of(address) for pool in self._pools)

    # The runtime.

    def _get_device(self) -> int:
        return int(getattr(self._local, "device", 0))

    @contextlib.contextmanager
    def _device(self, device_id: int) -> Iterator[None]:
        outer, self._local.device = self._get_device(), device_id
        try:
            yield
        finally:
            self._local.device = outer

    def _set_allocator(self, allocator: Any) -> None:
        self._allocator = allocator

    def _stock_malloc(self, nbytes: int) -> _MemoryPointer:
        return self.get_default_memory_pool().malloc(nbytes)

    def _mem_get_info(self) -> tuple[int, int]:
        pool = self.get_default_memory_pool()
        return pool.total - pool.total_bytes(), pool.total

    def _fail_if_told(self, name: str, error: type[Exception]) -> None:
        self.count(name)
        numbers = self.fail.get(name, [])
        fails = 0 in numbers
        self.fail[name] = [number - 1 for number in numbers if number]
        if fails:
            raise error(f"{name} was told to fail")

    def _host_register(self, address: int, nbytes: int, flags: int) -> None:
        with self.lock:
            self._fail_if_told("hostRegister", CUDARuntimeError)
            assert address % mmap.PAGESIZE == nbytes % mmap.PAGESIZE == 0
            self.pinned[address] = nbytes
            ctypes.memset(address, POISON, nbytes)

    def _host_unregister(self, address: int) -> None:
        with self.lock:
            start, stop = address, address + self.pinned.pop(address)
            access = Access("hostUnregister", _HOST, 1, True, start, stop)
            self.note(access, self.host_clock)
            self.accesses.forget(start, stop)

    def _memcpy_async(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        with self.lock:
            self._fail_if_told("memcpyAsync", CUDARuntimeError)
            on = self._streams[stream]
            host, device = (target, source) if kind == 2 else (source, target)
            self._must_be_pinned(host, nbytes)
            if not self.is_device_memory(device):
                raise CUDARuntimeError(f"cudaErrorInvalidValue: {device:#x} is not the GPU's")

            def copy() -> None:
                self._must_be_pinned(host, nbytes)
                if self.is_device_memory(device):  # else it is among the races already
                    ctypes.memmove(target, source, nbytes)

            name = "the copy out" if kind == 2 else "the copy in"
            self.kernel(name, [(source, nbytes)], [(target, nbytes)], copy, on)

    def _must_be_pinned(self, host: int, nbytes: int) -> None:
        if not any(a <= host and host + nbytes <= a + n for a, n in self.pinned.items()):
            raise CUDARuntimeError(f"cudaErrorInvalidValue: {host:#x} is not page-locked")
