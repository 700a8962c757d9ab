"""A hook on NumPy's allocator: somebody is told of large allocations, and their pages are used again.

NumPy takes the memory of its arrays from a handler (NEP 49) that can be replaced per context, that is
per thread. Ours is NumPy's own, but for large blocks: these come from a :class:`PagePool`, after one call.
An array is freed by the handler that it came from, so that it may outlive the hook.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from chainer_ooc.swap.devices.ram.page_pool import PagePool

__all__ = ["AllocatorHook"]

# Indexes into NumPy's table of C functions (numpy/__multiarray_api.h; since 1.22).
_SET_HANDLER, _GET_HANDLER = 304, 305
_CAPSULE = b"mem_handler"

_MALLOC = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_CALLOC = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_REALLOC = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_FREE = (None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


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
        pool: Where the memory comes from, ``None`` for NumPy's own allocator.
        smallest_of_pool: Allocations of fewer bytes are NumPy's own allocator's all the same.
    """

    def __init__(
        self,
        before: Callable[[int], bool],
        smallest: int,
        pool: PagePool | None = None,
        smallest_of_pool: int = 0,
    ) -> None:
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
        default_realloc = ctypes.PYFUNCTYPE(*_REALLOC)(default.realloc)
        default_free = ctypes.PYFUNCTYPE(*_FREE)(default.free)

        pooled = range(0) if pool is None else pool.addresses

        def malloc(_: int, nbytes: int) -> int | None:
            if nbytes >= smallest and not before(nbytes):
                return None
            address = pool.allocate(nbytes) if pool and nbytes >= smallest_of_pool else None
            return default_malloc(context, nbytes) if address is None else address

        def calloc(_: int, count: int, size: int) -> int | None:
            nbytes = count * size
            if nbytes >= smallest and not before(nbytes):
                return None
            from_pool = pool and nbytes >= smallest_of_pool
            address = pool.allocate(nbytes, clear=True) if pool and from_pool else None
            return default_calloc(context, count, size) if address is None else address

        def realloc(_: int, old: int | None, nbytes: int) -> int | None:
            if pool is None or old is None or old not in pooled:
                return default_realloc(context, old, nbytes)
            new = malloc(0, nbytes)
            if new is not None:
                held = pool.size_of(old)
                ctypes.memmove(new, old, min(held, nbytes))
                pool.free(old)
            return new

        def free(_: int, address: int | None, nbytes: int) -> None:
            if pool is not None and address is not None and address in pooled:
                pool.free(address)
            else:
                default_free(context, address, nbytes)

        # Arrays are freed through these to the very end, when nothing else of Python's may be left: they are
        # never freed themselves, and give way to functions of C before the interpreter ends.
        functions = (
            ctypes.CFUNCTYPE(*_MALLOC)(malloc),
            ctypes.CFUNCTYPE(*_CALLOC)(calloc),
            ctypes.CFUNCTYPE(*_REALLOC)(realloc),
            ctypes.CFUNCTYPE(*_FREE)(free),
        )
        addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in functions]
        self._handler = _Handler(b"chainer_ooc", 1, _Allocator(context, *addresses))
        self._capsule = new_capsule(ctypes.addressof(self._handler), _CAPSULE, None)
        for immortal in (self._handler, self._capsule, *functions):
            python.Py_IncRef(ctypes.py_object(immortal))
        atexit.register(self._retire, default)

    def _retire(self, default: _Allocator) -> None:
        """Before the interpreter ends: from now on nothing is freed any more."""
        self.uninstall()
        nothing = ctypes.cast(
            ctypes.CDLL(None).getpagesize, ctypes.c_void_p
        ).value  # takes no arguments
        self._handler.allocator = _Allocator(
            default.ctx, default.malloc, default.calloc, default.realloc, nothing
        )

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
