"""The C extension: NumPy's allocator, the pool of pages, and a lock that holds signals back. It may be missing."""

from __future__ import annotations

import atexit
import os
import threading
from typing import Any

__all__ = ["HOW_TO_GET_IT", "WITHOUT_IT", "EngineLock", "allocator"]

#: What is different without the extension.
WITHOUT_IT = "NumPy's allocations are not announced, the limit is held between functions only"
#: What to do about it.
HOW_TO_GET_IT = (
    "install a C compiler and Python.h (apt install gcc python3-dev), then reinstall chainer_ooc"
)
#: The module of C, ``None`` where it could not be built: allocations are not announced then.
allocator: Any
#: A recursive lock for a ``with``. While the main thread has it, signals wait, if the extension is there.
EngineLock: Any
try:
    if os.environ.get(
        "_CHAINER_OOC_WITHOUT_EXTENSION"
    ):  # for tests, and the processes that they start
        raise ImportError
    from chainer_ooc.swap.devices.ram import _allocator
except ImportError:
    allocator, EngineLock = None, threading.RLock
else:
    allocator, EngineLock = _allocator, _allocator.EngineLock
    atexit.register(_allocator.end)
