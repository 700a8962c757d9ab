"""A stand-in for the part of CuPy that the CUDA device uses: its own code runs, and is checked, with no GPU.

:class:`SimulatedCuda` is given to :class:`~chainer_ooc.swap.devices.cuda.device.CudaDevice` in the place of
``cupy``. It is stricter than hardware, which hides most mistakes most of the time:

* Work on a stream is put off. It runs when the rules force it, or at random, by the seed.
* Each copy and kernel has a vector clock. Two accesses to the same bytes of which one writes and that no
  event, and no wait of the host, puts in order are a race, whether or not it showed this time. ``races``
  names the two and the edge that is missing.
* Freed memory is overwritten at once, as the next owner might: in the order of the stream that it was
  allocated on.

The rules, and where they are from:

* Streams run in order; between them there is no order but through events, and none with the legacy default
  stream for those made non-blocking (CUDA C++ Programming Guide, "Streams" and "Implicit Synchronization";
  CUDA Runtime API, "Stream synchronization behavior"). Streams that are made blocking have one with it on
  hardware; here they have none.
* Each GPU has a default stream of its own, each thread one per GPU with the per-thread kind: the same number
  (0, 2) names another queue when another GPU is current, or in another thread (Programming Guide,
  "Multi-Device System", "Default Stream"; CuPy, ``cupy/cuda/stream.pyx``).
* An event stands for what its stream had been given when it was recorded; to wait for one that was never
  recorded is to wait for nothing; waiting captures the event as it is then (CUDA Runtime API,
  ``cudaEventRecord``, ``cudaStreamWaitEvent``). It must be recorded on a stream of the GPU that it was made
  for; waiting, and copying, on a stream of another GPU than the current one is allowed (Programming Guide,
  "Multi-Device System", "Stream and Event Behavior").
* The time between two events can be had when both have ended and were made to take times
  (``cudaEventElapsedTime``: ``cudaErrorNotReady``, ``cudaErrorInvalidResourceHandle``).
* A stream or event that is destroyed does its work first (``cudaStreamDestroy``, ``cudaEventDestroy``), and
  the driver may give its number to the next stream.
* Asynchronous copies of the host's memory need it page-locked (``cudaMemcpyAsync``, ``cudaHostRegister``);
  memory is page-locked once (``cudaErrorHostMemoryAlreadyRegistered``).
* A freed block is at once on the free list of the stream (with the per-thread kind, of the thread) that it
  was allocated on, whatever other streams do with it; blocks are split and merged, sizes rounded up to 512
  bytes; when there is none that fits, whole regions are given back, then ``OutOfMemoryError`` is raised; a
  limit counts free blocks too (CuPy, ``cupy/cuda/memory.pyx``: ``SingleDeviceMemoryPool``). To give a
  region back waits for the device (``cudaFree``; Programming Guide, "Implicit Synchronization").
* An event has a finalizer, which destroys it (``cupy/cuda/stream.pyx``: ``Event.__del__``). Of a cycle of references
  the collector calls all finalizers first, in any order (PEP 442): others then find the event destroyed.
* Memory is freed when the last array of it dies, and is unknown to the cyclic garbage collector
  (``cupy/cuda/memory.pyx``: ``PooledMemory``).
* Inside ``using_allocator`` that thread has an allocator of its own, and the common one cannot be changed
  (``cupy/cuda/memory.pyx``: ``set_allocator``).

``tests/swap/cuda/rules.py`` has a test of each as far as it can be observed: the simulated GPU passes them,
and where there is a GPU, ``tests/gpu`` runs them on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from chainer_ooc.swap.devices.cuda.checksum import NAME, SLOT, checksum_on_host
from chainer_ooc.swap.devices.cuda.fingerprints import COMPARISON
from tests.doubles.simulated_memory import (
    POISON,
    Array,
    Gpu,
    Memory,
    MemoryPointer,
    OutOfMemoryError,
    Pool,
    PooledMemory,
)
from tests.doubles.simulated_streams import CUDARuntimeError, Event, Schedule
from tests.doubles.vector_clocks import Access

__all__ = ["POISON", "CUDARuntimeError", "OutOfMemoryError", "SimulatedCuda"]

_HOST = "the host"
_WORDS = ctypes.c_uint64 * (SLOT // 8)


class SimulatedCuda(Schedule):
    """Stands for the module ``cupy``, on a machine with simulated GPUs.

    Args:
        seed: Decides when work runs.
        total: Memory of each GPU (bytes).
        devices: How many GPUs there are.
        per_thread: The default stream is the per-thread one (``CUPY_CUDA_PER_THREAD_DEFAULT_STREAM=1``).

    Attributes:
        fail: By the name of a function (``"malloc"``, ``"memcpyAsync"``, ``"hostRegister"``, ``"Event"``): the
            numbers of the calls from now on that are to fail, 0 for the next.
        gpus: The GPUs.
        pinned: What is page-locked: address and size (bytes).
    """

    def __init__(
        self, seed: int = 0, total: int = 64 << 20, devices: int = 1, per_thread: bool = False
    ) -> None:
        super().__init__(seed, devices, per_thread)
        self.fail: dict[str, list[int]] = {}
        self.adopted_bytes: Callable[[], int] = lambda: 0
        self.is_device_memory: Callable[[int], bool] = self._is_of_a_gpu
        self.pinned: dict[int, int] = {}
        self.gpus = [Gpu(total) for _ in range(devices)]
        self.ndarray = type("ndarray", (Array,), {"machine": self})
        self._pool_type = type("MemoryPool", (Pool,), {"machine": self})
        self._pool = self._pool_type()
        self._allocator: Callable[[int], Any] = self._pool.malloc
        self._make_modules()

    def _make_modules(self) -> None:
        runtime = types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            memcpyHostToDevice=1,
            memcpyDeviceToHost=2,
            eventQuery=self.event_query,
            streamQuery=self.stream_query,
            streamIsCapturing=self.is_capturing,
            deviceSynchronize=self._device_synchronize,
            getDevice=self.current_device,
            getDeviceCount=lambda: len(self.gpus),
            hostRegister=self._host_register,
            hostUnregister=self._host_unregister,
            memcpyAsync=self._memcpy_async,
            memGetInfo=self._mem_get_info,
        )
        memory = types.SimpleNamespace(
            PooledMemory=PooledMemory, Memory=Memory, OutOfMemoryError=OutOfMemoryError
        )
        self.cuda = types.SimpleNamespace(
            runtime=runtime,
            memory=memory,
            MemoryPointer=MemoryPointer,
            MemoryPool=self._pool_type,
            Memory=lambda nbytes: Memory(nbytes, self),
            Stream=self.new_stream,
            ExternalStream=self.external_type,
            Event=self._make_event,
            get_elapsed_time=lambda start, end: start.milliseconds_to(end),
            Device=self.device,
            alloc=lambda nbytes: self._get_allocator()(nbytes),
            get_allocator=self._get_allocator,
            set_allocator=self._set_allocator,
            using_allocator=self._using_allocator,
            get_current_stream=self.get_current_stream,
            is_available=lambda: True,
        )

    # What CuPy has at its top.

    def get_default_memory_pool(self) -> Pool:
        """Return the pool that is there from the beginning."""
        return self._pool

    @staticmethod
    def asnumpy(array: Any) -> np.ndarray:
        """Return an array's elements in the host's memory."""
        return array if isinstance(array, np.ndarray) else array.get()

    def RawKernel(self, code: str, name: str) -> Callable[..., None]:
        """Return one of the two kernels that there are, of which NumPy computes the results."""
        assert f"void {name}(" in code
        kernel = {NAME: self._sum, COMPARISON: self._compare}[name]

        def launch(grid: tuple[int], block: tuple[int], arguments: Any) -> None:
            self.count(name)
            self.check_no_capture(name)
            kernel(*map(int, arguments))

        return launch

    def _sum(self, address: int, nbytes: int, slot: int) -> None:
        def run() -> None:
            memory: Any = (ctypes.c_char * nbytes).from_address(address)
            assert not any(_WORDS.from_address(slot)[1:]), (
                "the slot was not filled with zeros, or two kernels use it"
            )
            found = checksum_on_host(np.frombuffer(memory, np.uint8)) - nbytes
            _WORDS.from_address(slot)[0] = found % (1 << 64)

        self.kernel("a checksum", [(address, nbytes)] * (nbytes > 0), [(slot, SLOT)], run)

    def _compare(self, *arguments: int) -> None:
        *slots, flag, goes_on = arguments

        def run() -> None:
            words = [ctypes.c_uint64.from_address(slot).value for slot in slots]
            before = ctypes.c_uint32.from_address(flag).value if goes_on else 1
            ctypes.c_uint32.from_address(flag).value = before and words[::2] == words[1::2]

        reads = [(slot, 8) for slot in dict.fromkeys(slots)] + [(flag, 4)] * goes_on
        self.kernel("a comparison", reads, [(flag, 4)], run)

    # Allocators.

    def _get_allocator(self) -> Any:
        return getattr(self._local, "allocator", None) or self._allocator

    def _set_allocator(self, allocator: Any) -> None:
        if getattr(self._local, "allocator", None) is not None:
            raise ValueError("the allocator cannot be changed inside using_allocator")
        self._allocator = self._malloc if allocator is None else allocator

    def _malloc(self, nbytes: int) -> MemoryPointer:
        return MemoryPointer(Memory(-(-nbytes // 512) * 512, self), 0)

    @contextlib.contextmanager
    def _using_allocator(self, allocator: Any) -> Iterator[None]:
        outer, self._local.allocator = getattr(self._local, "allocator", None), allocator
        try:
            yield
        finally:
            self._local.allocator = outer

    # The runtime.

    def _make_event(self, disable_timing: bool = False) -> Event:
        with self.lock:
            self.fail_if_told("Event", CUDARuntimeError)
        return Event(self, disable_timing)

    def fail_if_told(self, name: str, error: type[Exception]) -> None:
        """Count a call, and raise if it is to fail."""
        self.count(name)
        numbers = self.fail.get(name, [])
        fails = 0 in numbers
        self.fail[name] = [number - 1 for number in numbers if number]
        if fails:
            raise error(f"{name} was told to fail")

    def _is_of_a_gpu(self, address: int) -> bool:
        return any(gpu.owns(address) for gpu in self.gpus)

    def _device_synchronize(self) -> None:
        self.count("deviceSynchronize")
        self.check_no_capture("deviceSynchronize")
        self.synchronize(self.current_device())

    def _mem_get_info(self) -> tuple[int, int]:
        gpu = self.gpus[self.current_device()]
        return gpu.total - sum(gpu.regions.values()), gpu.total

    def _host_register(self, address: int, nbytes: int, flags: int) -> None:
        with self.lock:
            self.fail_if_told("hostRegister", CUDARuntimeError)
            assert address % mmap.PAGESIZE == nbytes % mmap.PAGESIZE == 0
            if any(a < address + nbytes and address < a + n for a, n in self.pinned.items()):
                raise CUDARuntimeError("cudaErrorHostMemoryAlreadyRegistered")
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
            self.check_working()
            self.check_no_capture("memcpyAsync")
            self.fail_if_told("memcpyAsync", CUDARuntimeError)
            host, device = (target, source) if kind == 2 else (source, target)
            self._must_be_pinned(host, nbytes)
            if not self.is_device_memory(device):
                raise CUDARuntimeError(f"cudaErrorInvalidValue: {device:#x} is not the GPU's")

            def copy() -> None:
                self._must_be_pinned(host, nbytes)
                if self.is_device_memory(device):  # else it is among the races already
                    ctypes.memmove(target, source, nbytes)

            name = "the copy out" if kind == 2 else "the copy in"
            queue = self.queue_of(stream)
            self.kernel(name, [(source, nbytes)], [(target, nbytes)], copy, queue)

    def _must_be_pinned(self, host: int, nbytes: int) -> None:
        if not any(a <= host and host + nbytes <= a + n for a, n in self.pinned.items()):
            raise CUDARuntimeError(f"cudaErrorInvalidValue: {host:#x} is not page-locked")
