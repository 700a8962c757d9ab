"""Errors that are planted in the engine, to see that random programs find them."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

from chainer_ooc import state
from chainer_ooc.graph import hooks, nodes
from chainer_ooc.swap.devices.ram import RamDevice, native
from chainer_ooc.swap.tiers.swap_file import SwapFile
from chainer_ooc.swap.transfers import Transfers

__all__ = ["PLANTED"]


def keep_stale_copies() -> None:
    """What is edited in place keeps the copy that was made before."""
    Transfers.mark_dirty = lambda self, storage: None


def restore_at_wrong_offset() -> None:
    """What is a view of a larger array is restored from its beginning."""
    view = RamDevice.view

    def wrong(self: Any, owner: Any, origin: int, layout: Any) -> Any:
        return view(self, owner, origin, layout._replace(offset=0))

    RamDevice.view = wrong


def swallow_an_error() -> None:
    """An error that a function raises in backward is lost."""
    step = hooks._stock.get("backprop_step")
    if step is None:
        hooks.install()
        step = hooks._stock["backprop_step"]

    def wrong(*args: Any) -> None:
        with contextlib.suppress(Exception):
            step(*args)

    hooks._stock["backprop_step"] = wrong


def leak_blocks() -> None:
    """The space of copies is not given back."""
    assert callable(SwapFile.free)
    SwapFile.free = lambda self, offset, nbytes: None


def free_by_python() -> None:
    """NumPy frees memory by way of a callback of ctypes, which clears the exception that is on its way."""
    python = ctypes.pythonapi
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", python)
    )
    free_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    from numpy._core import multiarray

    table = ctypes.cast(pointer(multiarray._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    handler_of = ctypes.PYFUNCTYPE(ctypes.py_object)(table[305])
    install = native.allocator.install

    def wrong() -> None:
        install()
        at = (
            pointer(handler_of(), b"mem_handler") + 128
        )  # PyDataMemAllocator, behind name and version
        slots = (ctypes.c_void_p * 5).from_address(at)
        if not kept:
            native_free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
                slots[4]
            )
            kept.append(
                free_type(lambda context, address, nbytes: native_free(context, address, nbytes))
            )
            slots[4] = ctypes.cast(kept[0], ctypes.c_void_p).value

    kept: list[Any] = []
    state.native.allocator = _Replaced(native.allocator, install=wrong)


def print_on_stderr() -> None:
    """The engine says something when it closes."""
    import atexit
    import sys

    atexit.register(lambda: print("closing", file=sys.stderr))


def restore_read_only() -> None:
    """Arrays come back read-only."""
    view = RamDevice.view

    def wrong(self: Any, owner: Any, origin: int, layout: Any) -> Any:
        return view(self, owner, origin, layout._replace(writeable=False))

    RamDevice.view = wrong


def ignore_an_assignment() -> None:
    """An array that a variable is given does not reach the graph where another one was saved."""
    set_data = nodes._set_data

    def wrong(node: Any, data: Any) -> None:
        set_data(
            node,
            node.__dict__.get("_data")
            if type(node.__dict__.get("_data")).__name__ == "PackedArray"
            else data,
        )

    hooks.install()
    nodes.watch()  # else its properties replace this one
    from chainer import variable

    variable.VariableNode._data = property(nodes._get_data, wrong)


class _Replaced:
    """A module with some other functions."""

    def __init__(self, module: Any, **functions: Any) -> None:
        self.__dict__.update(functions, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


PLANTED: dict[str, Callable[[], None]] = {
    "keep stale copies": keep_stale_copies,
    "restore at the wrong offset": restore_at_wrong_offset,
    "swallow an error": swallow_an_error,
    "leak blocks": leak_blocks,
    "free by Python": free_by_python,
    "print on stderr": print_on_stderr,
    "restore read-only": restore_read_only,
    "ignore an assignment": ignore_an_assignment,
}
