"""cuDNN handles: one per thread and device, on CuPy's current stream."""

from __future__ import annotations

import threading

from chainer_ooc.compat.cudnn import device
from chainer_ooc.compat.cudnn.errors import CuDNNError
from chainer_ooc.compat.cudnn.library import loaded

__all__ = ["get_handle"]

_lock = threading.Lock()

#: Handles of threads that have ended, per device. Creating one takes milliseconds and device
#: memory.
_idle: dict[int, list[int]] = {}


class _Lease:
    """The handles that one thread uses, per device; they become idle when the thread ends."""

    def __init__(self) -> None:
        self.handles: dict[int, int] = {}

    # Bound early: at the interpreter's exit the module's names may be gone before this.
    def __del__(self, idle: dict[int, list[int]] = _idle) -> None:
        # Nothing is destroyed, not even at exit: CUDA may be gone, and the process's end frees it.
        for index, handle in self.handles.items():
            idle.setdefault(index, []).append(handle)


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.lease = _Lease()


_thread = _PerThread()


def _obtain(index: int) -> int:
    with _lock:
        idle = _idle.get(index)
        if idle:
            return idle.pop()
    library = loaded()
    try:
        return library.create("cudnnCreate")
    except CuDNNError:
        # A handle's memory does not come from CuPy's pool.
        device.make_room()
        return library.create("cudnnCreate")


def get_handle() -> int:
    """Return this thread's handle for the current device, set to CuPy's current stream.

    The stream is set at every call: another stream may have got the address of one that is gone.
    """
    index = device.current_device()
    handles = _thread.lease.handles
    handle = handles.get(index)
    if handle is None:
        handle = handles[index] = _obtain(index)
    loaded().cudnnSetStream(handle, device.current_stream())
    return handle
