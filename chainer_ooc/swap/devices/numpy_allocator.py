"""A hook on NumPy's allocator: somebody is told of each large allocation before it is made.

NumPy takes the memory of its arrays from a handler (NEP 49) that can be replaced per context, that is
per thread. Ours is NumPy's own with one call put before ``malloc`` and ``calloc``; ``free`` and
``realloc`` are NumPy's. So arrays that were allocated through it may outlive it.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["AllocatorHook"]

# Indexes into NumPy's table of C functions (numpy/__multiarray_api.h; since 1.22).
_SET_HANDLER, _GET_HANDLER = 304, 305
_CAPSULE = b"mem_handler"

_MALLOC = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_CALLOC = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)


class _Allocator(ctypes.Structure):
    """``PyDataMemAllocator`` of numpy/ndarraytypes.h."""

    _fields_ = (
        ("ctx", ctypes.c_void_p),
        ("malloc", ctypes.c_void_p),
        ("calloc", ctypes.c_void_p),
        ("realloc", ctypes.c_void_p),
        ("free", ctypes.c_void_p),
    )


class _Handler(ctypes.Structure):
    """``PyDataMem_Handler`` of numpy/ndarraytypes.h."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("allocator", _Allocator),
    )


class AllocatorHook:
    """Calls ``before(nbytes)`` before NumPy allocates ``nbytes`` >= ``smallest`` bytes in a thread.

    Args:
        before: Returns ``True`` to let the allocation be made, ``False`` to have it fail with a
            ``MemoryError``. It must not raise.
        smallest: Allocations of fewer bytes are made without asking.
    """

    def __init__(self, before: Callable[[int], bool], smallest: int) -> None:
        python = ctypes.pythonapi
        pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
            ("PyCapsule_GetPointer", python)
        )
        new_capsule = ctypes.PYFUNCTYPE(
            ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
        )(("PyCapsule_New", python))
        table = ctypes.cast(pointer(_array_api(), None), ctypes.POINTER(ctypes.c_void_p))
        self._set = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[_SET_HANDLER])
        self._get = ctypes.PYFUNCTYPE(ctypes.py_object)(table[_GET_HANDLER])
        self._default = self._get()
        default = _Handler.from_address(pointer(self._default, _CAPSULE)).allocator
        context = default.ctx
        default_malloc = ctypes.PYFUNCTYPE(*_MALLOC)(default.malloc)
        default_calloc = ctypes.PYFUNCTYPE(*_CALLOC)(default.calloc)

        def malloc(_: int, nbytes: int) -> int | None:
            if nbytes < smallest or before(nbytes):
                return default_malloc(context, nbytes)
            return None

        def calloc(_: int, count: int, size: int) -> int | None:
            if count * size < smallest or before(count * size):
                return default_calloc(context, count, size)
            return None

        # C holds pointers to these; they live as long as the hook, and the hook to the end.
        self._functions = (ctypes.CFUNCTYPE(*_MALLOC)(malloc), ctypes.CFUNCTYPE(*_CALLOC)(calloc))
        addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in self._functions]
        self._handler = _Handler(
            b"chainer_ooc", 1, _Allocator(context, *addresses, default.realloc, default.free)
        )
        self._capsule = new_capsule(ctypes.addressof(self._handler), _CAPSULE, None)
        atexit.register(self.uninstall)

    def install(self) -> None:
        """Hook the calling thread's allocations."""
        if self._get() is not self._capsule:
            self._set(self._capsule)

    def uninstall(self) -> None:
        """Let the calling thread's allocations go to NumPy's own handler again."""
        if self._get() is self._capsule:
            self._set(self._default)


def _array_api() -> Any:
    try:
        from numpy._core import multiarray
    except ImportError:  # NumPy 1
        from numpy.core import multiarray  # type: ignore[no-redef]
    return multiarray._ARRAY_API


assert np.dtype(np.uintp).itemsize == ctypes.sizeof(ctypes.c_size_t)
