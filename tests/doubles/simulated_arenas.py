"""CUDA's virtual memory, and what of CuPy calls C, for a simulated GPU: page arenas run on it as on the driver.

The C extension is given functions of Python in the place of the driver's. Addresses that nothing is mapped to are no
memory of the GPU. To unmap a page is an access of the host: it races with all work on that page which the host does not
know to be done. What is mapped anew is overwritten.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_ooc.swap.devices.ram import native
from tests.doubles.simulated_memory import POISON, MemoryPointer
from tests.doubles.simulated_streams import CUDARuntimeError, Event, Stream
from tests.doubles.vector_clocks import Access

if TYPE_CHECKING:
    from tests.doubles.simulated_cuda import SimulatedCuda

__all__ = ["PAGE", "Arenas"]

#: The granularity of the simulated driver (bytes).
PAGE = 16 << 10
_SIZE, _INT, _POINTER = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
_NOT_READY, _OUT_OF_MEMORY, _FAILED = 600, 2, 999


class Arenas:
    """The driver's virtual memory of a machine. It is there for the extension until the next one is.

    Args:
        machine: The machine, whose ``cuda`` gets CuPy's ``CFunctionAllocator``.

    Attributes:
        current_stream: A capsule with the C function that returns the current stream.
    """

    def __init__(self, machine: SimulatedCuda) -> None:
        self.machine = machine
        self._pages: dict[int, int] = {}  # physical pages and their GPUs
        self._mapped: dict[int, int] = {}  # addresses and their pages
        self._events: dict[int, Event] = {}
        self._spaces: list[Any] = []
        self._last = 0
        self._dead: deque[Callable[[], object]] = deque()
        functions: dict[str, tuple[Any, Callable[..., int]]] = {
            "cuDeviceGetAttribute": (self._type(_POINTER, _INT, _INT), self._attribute),
            "cuMemGetAllocationGranularity": (
                self._type(_POINTER, _POINTER, _INT),
                self._granularity,
            ),
            "cuMemAddressReserve": (
                self._type(_POINTER, _SIZE, _SIZE, ctypes.c_ulonglong, ctypes.c_ulonglong),
                self._reserve,
            ),
            "cuMemCreate": (
                self._type(_POINTER, _SIZE, _POINTER, ctypes.c_ulonglong),
                self._create,
            ),
            "cuMemRelease": (self._type(ctypes.c_ulonglong), self._release),
            "cuMemMap": (
                self._type(
                    ctypes.c_ulonglong, _SIZE, _SIZE, ctypes.c_ulonglong, ctypes.c_ulonglong
                ),
                self._map,
            ),
            "cuMemUnmap": (self._type(ctypes.c_ulonglong, _SIZE), self._unmap),
            "cuMemSetAccess": (
                self._type(ctypes.c_ulonglong, _SIZE, _POINTER, _SIZE),
                self._set_access,
            ),
            "cuEventCreate": (self._type(_POINTER, ctypes.c_uint), self._event_create),
            "cuEventRecord": (self._type(_SIZE, _SIZE), self._event_record),
            "cuEventQuery": (self._type(_SIZE), self._event_query),
            "cuEventSynchronize": (self._type(_SIZE), self._event_synchronize),
            "cuCtxGetCurrent": (self._type(_POINTER), self._get_context),
            "cuCtxSetCurrent": (self._type(_SIZE), self._set_context),
            "cuCtxSynchronize": (self._type(), self._synchronize),
            "cuStreamIsCapturing": (self._type(_SIZE, _POINTER), self._is_capturing),
            "cuThreadExchangeStreamCaptureMode": (self._type(_POINTER), self._exchange_mode),
        }
        self._functions = {name: kind(call) for name, (kind, call) in functions.items()}
        native.allocator.set_driver(
            {name: ctypes.cast(call, _POINTER).value for name, call in self._functions.items()}
        )
        self._stream = ctypes.CFUNCTYPE(ctypes.c_ssize_t)(lambda: machine.get_current_stream().ptr)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [_POINTER, ctypes.c_char_p, _POINTER]
        self._name = b"intptr_t (void)"
        self.current_stream = new(ctypes.cast(self._stream, _POINTER), self._name, None)
        machine.cuda.CFunctionAllocator = self._allocator
        machine.cuda.memory.CFunctionAllocatorMemory = CFunctionAllocatorMemory

    @staticmethod
    def _type(*arguments: Any) -> Any:
        return ctypes.CFUNCTYPE(_INT, *arguments)

    def _allocator(self, param: int, malloc: int, free: int, owner: object) -> CFunctionAllocator:
        return CFunctionAllocator(self, malloc, free)

    def free_dead(self) -> None:
        """Free what has died. Whoever frees must not have the machine's lock: who allocates needs both."""
        while self._dead and not self.machine.lock.is_mine:
            try:
                self._dead.popleft()()
            except IndexError:
                return

    def bury(self, job: Callable[[], object]) -> None:
        """Free a block, now or soon: memory may die in the midst of anything."""
        self._dead.append(job)
        self.free_dead()

    # The driver.

    def _attribute(self, value: int, attribute: int, device: int) -> int:
        ctypes.c_int.from_address(value).value = attribute == 102
        return 0

    def _granularity(self, size: int, properties: int, option: int) -> int:
        ctypes.c_size_t.from_address(size).value = PAGE
        return 0

    def _reserve(self, start: int, size: int, alignment: int, wanted: int, flags: int) -> int:
        space = mmap.mmap(-1, size + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._spaces.append(space)
        address = ctypes.addressof(ctypes.c_char.from_buffer(space))
        ctypes.c_ulonglong.from_address(start).value = -(-address // PAGE) * PAGE
        return 0

    def _fails(self, name: str) -> bool:
        try:
            self.machine.fail_if_told(name, CUDARuntimeError)
        except CUDARuntimeError:
            return True
        return False

    def _create(self, made: int, size: int, properties: int, flags: int) -> int:
        self.machine.check_no_capture("cuMemCreate")
        device = ctypes.c_int.from_address(properties + 12).value
        with self.machine.lock:
            of_device = sum(one == device for one in self._pages.values())
            if (
                self._fails("cuMemCreate")
                or (of_device + 1) * PAGE > self.machine.gpus[device].total
            ):
                return _OUT_OF_MEMORY
            self._last += 1
            self._pages[self._last] = device
            ctypes.c_ulonglong.from_address(made).value = self._last
        return 0

    def _is_capturing(self, stream: int | None, status: int) -> int:
        # The double's streams are non-blocking.
        ctypes.c_int.from_address(status).value = (stream or 0) in self.machine.capturing
        return 0

    def _exchange_mode(self, mode: int) -> int:
        place = ctypes.c_int.from_address(mode)
        self.machine.capture_mode, place.value = place.value, self.machine.capture_mode
        return 0

    def _release(self, page: int) -> int:
        self.machine.check_no_capture("cuMemRelease")
        with self.machine.lock:
            assert page not in self._mapped.values()
            del self._pages[page]
        return 0

    def _map(self, start: int, size: int, offset: int, page: int, flags: int) -> int:
        self.machine.check_no_capture("cuMemMap")
        with self.machine.lock:
            if self._fails("cuMemMap"):
                return _FAILED
            if (
                start in self._mapped
                or page in self._mapped.values()
                or size != PAGE
                or start % PAGE
            ):
                self.machine.races.append(
                    f"page {page} is mapped twice, or to {start:#x}, where one is"
                )
                return _FAILED
            self._mapped[start] = page
            ctypes.memset(start, POISON, PAGE)
        return 0

    def _set_access(self, start: int, size: int, access: int, count: int) -> int:
        self.machine.check_no_capture("cuMemSetAccess")
        with self.machine.lock:
            if self._fails("cuMemSetAccess"):
                return _FAILED
            for address in range(start, start + size, PAGE):
                self.machine.gpus[self._pages[self._mapped[address]]].regions[address] = PAGE
        return 0

    def _unmap(self, start: int, size: int) -> int:
        self.machine.check_no_capture("cuMemUnmap")
        machine = self.machine
        with machine.lock:
            page = self._mapped.pop(start)
            assert size == PAGE
            machine.gpus[self._pages[page]].regions.pop(start, None)
            access = Access("cuMemUnmap", "the host", 1, True, start, start + PAGE)
            machine.note(access, machine.host_clock)
            machine.accesses.forget(start, start + PAGE)
            machine.count("cuMemUnmap")
        return 0

    def _event_create(self, event: int, flags: int) -> int:
        with self.machine.lock:
            self._last += 1
            self._events[self._last] = Event(self.machine, disable_timing=True)
            ctypes.c_size_t.from_address(event).value = self._last
        return 0

    def _event_record(self, event: int, stream: int) -> int:
        Stream(self.machine, stream, -1).record(self._events[event])
        return 0

    def _event_query(self, event: int) -> int:
        return 0 if self._events[event].done else _NOT_READY

    def _event_synchronize(self, event: int) -> int:
        self._events[event].synchronize()
        return 0

    def _get_context(self, context: int) -> int:
        ctypes.c_size_t.from_address(context).value = self.machine.current_device() + 1
        return 0

    def _set_context(self, context: int) -> int:
        self.machine._local.device = context - 1
        return 0

    def _synchronize(self) -> int:
        self.machine.count("cuCtxSynchronize")
        self.machine.check_no_capture("cuCtxSynchronize")
        self.machine.synchronize(self.machine.current_device())
        return 0


class CFunctionAllocatorMemory:
    """Memory from C functions; it is freed when nobody refers to it. CuPy's are unknown to the garbage collector."""

    def __init__(self, address: int, size: int, device_id: int) -> None:
        self.ptr, self.size, self.device_id = address, size, device_id
        self._token = np.empty(0)


class CFunctionAllocator:
    """``cupy.cuda.CFunctionAllocator``: NULL is an address as any."""

    def __init__(self, arenas: Arenas, malloc: int, free: int) -> None:
        self._arenas = arenas
        self._malloc = ctypes.PYFUNCTYPE(_SIZE, _POINTER, _SIZE, _INT)(malloc)
        self._free = ctypes.PYFUNCTYPE(None, _POINTER, _SIZE, _INT)(free)

    def malloc(self, size: int) -> MemoryPointer:
        """Return memory on the current GPU and stream."""
        arenas, machine, free = self._arenas, self._arenas.machine, self._free
        arenas.free_dead()
        machine.count("malloc")
        device, queue = machine.current_device(), machine.get_current_stream().queue
        address = 0
        if size:
            was_enabled = gc.isenabled()
            gc.disable()  # the driver's functions are called under the arena's lock, and are of Python here
            try:
                address = self._malloc(None, size, device)
            finally:
                if was_enabled:
                    gc.enable()
        memory = CFunctionAllocatorMemory(address, size, device)
        if address:
            machine.kernel("the first use of new memory", [], [(address, size)], queue=queue)

            def poison() -> None:
                ctypes.memset(address, POISON, size)

            def give_back() -> None:
                name = "what uses the memory after it was freed"
                machine.kernel(name, [], [(address, size)], poison, queue)
                free(None, address, device)

            weakref.finalize(memory._token, arenas.bury, give_back).atexit = False
        return MemoryPointer(memory, 0)
