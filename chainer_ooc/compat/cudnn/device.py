"""The part of CuPy that the cuDNN modules use: where arrays, workspaces and streams come from."""

from __future__ import annotations

import contextlib
from typing import Any

import cupy
import numpy
from cupy.cuda import alloc as _alloc
from cupy.cuda import runtime
from cupy.cuda.memory import OutOfMemoryError

from chainer_ooc.compat.cudnn.errors import CuDNNError

__all__ = [
    "CuDNNOutOfMemoryError",
    "OutOfMemoryError",
    "allocate",
    "available",
    "compute_capability",
    "contiguous",
    "cuda_major_version",
    "current_device",
    "current_stream",
    "empty",
    "make_room",
    "ndarray",
]

ndarray = cupy.ndarray

#: ``(shape, dtype) -> array``: an uninitialized C-contiguous array on the current device, from
#: CuPy's pool.
empty = cupy.empty

#: ``array -> array``: the array itself when it is C-contiguous, else a copy that is.
contiguous = cupy.ascontiguousarray

#: ``() -> int``: the current device's number.
current_device = runtime.getDevice

_capabilities: dict[int, int] = {}

#: What cuDNN may want for itself, beside CuPy's pool: handles, kernels that it loads (bytes).
_BESIDE_THE_POOL = 64 << 20


class CuDNNOutOfMemoryError(CuDNNError, OutOfMemoryError):
    """cuDNN found no memory on the device for what it allocates itself."""


def allocate(size: int) -> Any:
    """Return ``size`` bytes from CuPy's allocator on the current stream; ``.ptr`` is the address.

    Drop the result to give them back. Workspaces come from here so that they count against the
    pool's limit and an allocator that can free memory gets the chance to.

    Raises:
        OutOfMemoryError: If the allocator has nothing left.
    """
    return _alloc(size)


def available() -> bool:
    """Return whether CUDA has a device to work on."""
    try:
        return bool(runtime.getDeviceCount())
    except runtime.CUDARuntimeError:  # no driver, or one that is too old
        return False


def cuda_major_version() -> int:
    """Return the major version of the CUDA runtime that CuPy was built for."""
    return int(runtime.runtimeGetVersion()) // 1000


def current_stream() -> int:
    """Return the address of CuPy's current stream in this thread (0: the null stream)."""
    return int(cupy.cuda.get_current_stream().ptr)


def compute_capability(device: int) -> int:
    """Return a device's compute capability as a number: 80 for 8.0."""
    capability = _capabilities.get(device)
    if capability is None:
        capability = _capabilities[device] = int(cupy.cuda.Device(device).compute_capability)
    return capability


def make_room() -> None:
    """Give memory back to CUDA, for what cuDNN allocates itself.

    CuPy's pool may hold all there is. Its allocator is asked for a block first, so that one that can
    free memory does; then the pool's free blocks go back.
    """
    with contextlib.suppress(OutOfMemoryError):
        allocate(_BESIDE_THE_POOL)  # dropped at once
    cupy.get_default_memory_pool().free_all_blocks()
    free_all_blocks = getattr(cupy.cuda.get_allocator(), "free_all_blocks", None)
    if free_all_blocks is not None:  # out-of-core mode's own
        free_all_blocks(graphs=False)


def check_same_device(*arrays: Any) -> int:
    """Return the device that all arrays are on, which must be the current one.

    Raises:
        ValueError: If it is not. A cuDNN handle belongs to one device.
    """
    device = current_device()
    for array in arrays:
        if array is not None and array.data.device_id != device:
            raise ValueError(
                f"an array is on device {array.data.device_id} but the current device is {device}; "
                f"wrap the call: with cupy.cuda.Device({array.data.device_id}): ..."
            )
    return device


def check_contiguous(array: Any, name: str) -> None:
    """Raise ``ValueError`` when an array that cuDNN is to write is not C-contiguous."""
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be C-contiguous, its shape is {array.shape} and its strides "
            f"are {array.strides}; pass cupy.empty({array.shape}, ...)"
        )


def parameter_dtype(dtype: numpy.dtype) -> numpy.dtype:
    """Return the dtype of scales and statistics: float64 for float64 data, else float32."""
    return numpy.dtype("d" if dtype.char == "d" else "f")


def to_device(array: numpy.ndarray) -> Any:
    """Return a copy of a host array on the current device, complete when this returns."""
    return cupy.asarray(array)


def zeros(shape: tuple[int, ...], dtype: numpy.dtype) -> Any:
    """Return an array of zeros on the current device."""
    return cupy.zeros(shape, dtype)
