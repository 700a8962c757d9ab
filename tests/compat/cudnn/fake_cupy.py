"""A stand-in for CuPy on NumPy memory: what the cuDNN modules and Chainer's GPU code need of it,
without a GPU.

Arrays are real NumPy arrays of a subclass whose ``data.ptr`` is their address, so a function called
through the C ABI can read and write them. Every address that is handed out is known to
:data:`memory` until its owner dies; the fake cuDNN library asks there whether what it is given is
alive and large enough.
"""

from __future__ import annotations

import sys
import types
import weakref
from typing import Any

import numpy


class OutOfMemoryError(MemoryError):
    pass


class CUDARuntimeError(RuntimeError):
    pass


class Memory:
    """The live blocks by address, and what allocations are refused."""

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}
        self.refuse_above: int | None = None  # bytes
        self.allocated: list[int] = []  # sizes given out by alloc, in order
        self.freed_cache = 0

    def add(self, owner: numpy.ndarray) -> None:
        address = owner.__array_interface__["data"][0]
        if owner.nbytes and address not in self.blocks:
            self.blocks[address] = owner.nbytes
            weakref.finalize(owner, self.blocks.pop, address, None)

    def check(self, address: int, size: int, what: str) -> None:
        for start, length in self.blocks.items():
            if start <= address and address + size <= start + length:
                return
        raise AssertionError(f"{what}: {size} bytes at {address:#x} are not in one live allocation")


memory = Memory()


class MemoryPointer:
    device_id = 0

    def __init__(self, ptr: int, owner: Any = None) -> None:
        self.ptr = ptr
        self._owner = owner


class ndarray(numpy.ndarray):
    @property
    def data(self) -> MemoryPointer:  # type: ignore[override]
        base: Any = self
        while isinstance(base.base, numpy.ndarray):
            base = base.base
        memory.add(base)
        return MemoryPointer(self.__array_interface__["data"][0], base)

    @property
    def device(self) -> Device:  # type: ignore[override]
        return Device(0)

    def get(self, *_args: Any, **_kwargs: Any) -> numpy.ndarray:
        return numpy.array(self)


def _ours(array: Any) -> ndarray:
    return numpy.asarray(array).view(ndarray)


def empty(shape: Any, dtype: Any = float) -> ndarray:
    result = numpy.empty(shape, dtype)
    if result.dtype.kind == "f":
        result.fill(numpy.nan)  # nobody may rely on what is there
    else:
        result.fill(77)
    return result.view(ndarray)


def alloc(size: int) -> MemoryPointer:
    if memory.refuse_above is not None and size > memory.refuse_above:
        raise OutOfMemoryError(f"{size} bytes refused")
    memory.allocated.append(size)
    block = numpy.full(size, 77, numpy.uint8)
    memory.add(block)
    return MemoryPointer(block.ctypes.data if size else 0, block)


class Device:
    current = 0
    compute_capability = "90"

    def __init__(self, device: int | None = None) -> None:
        self.id = Device.current if device is None else int(device)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_error: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return self.id

    def use(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Stream:
    """Streams have addresses; everything runs at once."""

    current: Stream

    def __init__(self, ptr: int = 0, **_kwargs: Any) -> None:
        self.ptr = ptr

    def __enter__(self) -> Stream:
        self._previous, Stream.current = Stream.current, self
        return self

    def __exit__(self, *_error: Any) -> None:
        Stream.current = self._previous


Stream.null = Stream(0)
Stream.current = Stream.null


class _Pool:
    def free_all_blocks(self) -> None:
        memory.freed_cache += 1


class _CuPy(types.ModuleType):
    """Names that are not defined here are NumPy's, returning this module's arrays."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(numpy, name)
        if not callable(value) or isinstance(value, type):
            return value

        def function(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return result.view(ndarray) if type(result) is numpy.ndarray else result

        return function


def modules() -> dict[str, types.ModuleType]:
    """Return the modules to be put into :data:`sys.modules`."""
    cupy = _CuPy("cupy")
    cuda = types.ModuleType("cupy.cuda")
    runtime = types.ModuleType("cupy.cuda.runtime")
    memory_module = types.ModuleType("cupy.cuda.memory")
    cupy.__version__ = "14.2.0"
    cupy.__path__ = cuda.__path__ = []
    cupy.cuda, cupy.ndarray, cupy.empty = cuda, ndarray, empty
    cupy.asarray = lambda array, *args, **kwargs: _ours(numpy.asarray(array, *args, **kwargs))
    cupy.array = lambda array, *args, **kwargs: _ours(numpy.array(array, *args, **kwargs))
    cupy.ascontiguousarray = lambda array: _contiguous(array)
    cupy.zeros = lambda shape, dtype=float: _ours(numpy.zeros(shape, dtype))
    cupy.get_default_memory_pool = _Pool
    cuda.runtime, cuda.memory, cuda.Device, cuda.Stream = runtime, memory_module, Device, Stream
    cuda.alloc = alloc
    cuda.get_allocator = lambda: alloc
    cuda.get_current_stream = lambda: Stream.current
    cuda.is_available = lambda: True
    runtime.getDevice = lambda: Device.current
    runtime.getDeviceCount = lambda: 1
    runtime.runtimeGetVersion = lambda: 12090
    runtime.CUDARuntimeError = CUDARuntimeError
    memory_module.OutOfMemoryError = OutOfMemoryError
    return {m.__name__: m for m in (cupy, cuda, runtime, memory_module)}


def _contiguous(array: Any) -> Any:
    if array.flags.c_contiguous:
        return array
    return _ours(numpy.ascontiguousarray(array))


def install() -> dict[str, types.ModuleType | None]:
    """Put the modules in place and return what was there, for :func:`restore`."""
    previous: dict[str, types.ModuleType | None] = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.partition(".")[0] in ("cupy", "cupyx", "cupy_backends")
    }
    sys.modules.update(modules())
    return previous


def restore(previous: dict[str, Any]) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in ("cupy", "cupyx", "cupy_backends"):
            del sys.modules[name]
    sys.modules.update(previous)
