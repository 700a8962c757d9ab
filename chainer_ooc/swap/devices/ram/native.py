"""The C extension, which may be missing: NumPy's allocator, the page pool, and a lock that delays signals."""

from __future__ import annotations

import atexit
import os
import threading
from typing import Any

__all__ = ["HOW_TO_GET_IT", "WITHOUT_IT", "EngineLock", "Mortal", "allocator", "ask_again"]

#: The consequence of a missing extension, for messages.
WITHOUT_IT = "NumPy's allocations are not announced, the limit is held between functions only"
#: The remedy, for messages.
HOW_TO_GET_IT = (
    "install a C compiler and Python.h (apt install gcc python3-dev), then reinstall chainer_ooc"
)
#: The module of C, ``None`` where it could not be built: allocations are not announced then.
allocator: Any
#: A recursive lock for a ``with``. While the main thread has it, signals wait, if the extension is there.
EngineLock: Any
#: A base class: ``_die()`` is called when an object dies; no signal handler runs in it, if the extension is there.
Mortal: Any


class _Mortal:
    __slots__ = ()

    def __del__(self) -> None:
        self._die()

    def _die(self) -> None:
        """Clean up when the object dies."""


try:
    if os.environ.get(
        "_CHAINER_OOC_WITHOUT_EXTENSION"
    ):  # for tests, and the processes that they start
        raise ImportError
    from chainer_ooc.swap.devices.ram import _allocator
except ImportError:
    allocator, EngineLock, Mortal = None, threading.RLock, _Mortal
else:
    allocator, EngineLock, Mortal = _allocator, _allocator.EngineLock, _allocator.Mortal
    atexit.register(_allocator.end)


def ask_again() -> None:
    """Void the levels of all threads: the next allocation of each asks for room."""
    if allocator is not None:
        allocator.ask_again()
