"""The C extension: NumPy's allocator, the pool of pages, and a lock that holds signals back. It may be missing."""

from __future__ import annotations

import atexit
import threading
from typing import Any

__all__ = ["EngineLock", "allocator"]

#: The module of C, ``None`` where it could not be built: allocations are not announced then.
allocator: Any
#: A recursive lock for a ``with``. While the main thread has it, signals wait, if the extension is there.
EngineLock: Any
try:
    from chainer_ooc.swap.devices.ram import _allocator
except ImportError:
    allocator, EngineLock = None, threading.RLock
else:
    allocator, EngineLock = _allocator, _allocator.EngineLock
    atexit.register(_allocator.end)
