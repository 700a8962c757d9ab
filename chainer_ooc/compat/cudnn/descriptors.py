"""cuDNN descriptors: made once per content, shared, destroyed when nothing uses them any more."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy

from chainer_ooc.compat.cudnn.constants import (
    CUDNN_CROSS_CORRELATION,
    CUDNN_DATA_DOUBLE,
    CUDNN_DATA_FLOAT,
    CUDNN_DATA_HALF,
    CUDNN_NOT_PROPAGATE_NAN,
    CUDNN_TENSOR_NCHW,
    CUDNN_TENSOR_NHWC,
)
from chainer_ooc.compat.cudnn.library import loaded

__all__ = [
    "Descriptor",
    "activation",
    "convolution",
    "filter_of",
    "get_data_type",
    "matrix",
    "one",
    "pooling",
    "tensor",
    "tensor_of",
    "zero",
]

#: How many descriptors of a kind are kept (a few hundred bytes of host memory each).
_CACHE = 4096

_DATA_TYPES = {"f": CUDNN_DATA_FLOAT, "d": CUDNN_DATA_DOUBLE, "e": CUDNN_DATA_HALF}

# cuDNN reads the blend factors alpha and beta as doubles for double tensors, as floats for all
# others.
_ONE = (ctypes.c_float(1), ctypes.c_double(1))
_ZERO = (ctypes.c_float(0), ctypes.c_double(0))
_ONE_ADDRESS, _ZERO_ADDRESS = (
    {kind: ctypes.addressof(values[kind == CUDNN_DATA_DOUBLE]) for kind in _DATA_TYPES.values()}
    for values in (_ONE, _ZERO)
)


def one(dtype: numpy.dtype) -> int:
    """Return the address of a blend factor 1 for tensors of ``dtype``."""
    return _ONE_ADDRESS[get_data_type(dtype)]


def zero(dtype: numpy.dtype) -> int:
    """Return the address of a blend factor 0 for tensors of ``dtype``."""
    return _ZERO_ADDRESS[get_data_type(dtype)]


def get_data_type(dtype: Any) -> int:
    """Return the ``cudnnDataType_t`` of a NumPy dtype.

    Raises:
        TypeError: If it is not float16, float32 or float64.
    """
    dtype = numpy.dtype(dtype)
    data_type = _DATA_TYPES.get(dtype.char)
    if data_type is None:
        raise TypeError(f"cuDNN is used for float16, float32 and float64 here, not for {dtype}")
    return data_type


class Descriptor:
    """Owns one cuDNN descriptor.

    cuDNN reads descriptors while a function runs on the host, so one may go as soon as the call has
    returned.

    Args:
        kind: The part of the names of its functions between ``cudnnCreate`` and ``Descriptor``.

    Attributes:
        value: The address of the descriptor.
    """

    __slots__ = ("__weakref__", "_destroy", "value")

    def __init__(self, kind: str) -> None:
        library = loaded()
        self._destroy = getattr(library, f"cudnnDestroy{kind}Descriptor")
        self.value: int = library.create(f"cudnnCreate{kind}Descriptor")

    def __del__(self) -> None:
        value = getattr(self, "value", 0)
        if value:
            self.value = 0
            self._destroy(value)


def _ints(values: Sequence[int]) -> ctypes.Array[ctypes.c_int]:
    return (ctypes.c_int * len(values))(*values)


def _packed_strides(shape: Sequence[int]) -> list[int]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return strides


@lru_cache(maxsize=_CACHE)
def tensor(char: str, shape: tuple[int, ...], layout: int = CUDNN_TENSOR_NCHW) -> Descriptor:
    """Return the descriptor of a C-contiguous array.

    Args:
        char: The dtype's character: ``e``, ``f`` or ``d``.
        shape: The array's shape as it lies in memory; up to three dimensions are extended by ones.
        layout: What the axes mean: (n, c, spatial...) or, for ``CUDNN_TENSOR_NHWC``, (n,
            spatial..., c).
    """
    dims = list(shape) + [1] * (4 - len(shape))
    strides = _packed_strides(dims)
    if layout == CUDNN_TENSOR_NHWC:
        # cuDNN names the axes in the order n, c, spatial whatever the layout; the strides tell.
        dims = [dims[0], dims[-1], *dims[1:-1]]
        strides = [strides[0], strides[-1], *strides[1:-1]]
    descriptor = Descriptor("Tensor")
    loaded().cudnnSetTensorNdDescriptor(
        descriptor.value, get_data_type(char), len(dims), _ints(dims), _ints(strides)
    )
    return descriptor


def tensor_of(array: Any, layout: int = CUDNN_TENSOR_NCHW) -> Descriptor:
    """Return the descriptor of a C-contiguous array."""
    return tensor(array.dtype.char, array.shape, layout)


def matrix(array: Any) -> Descriptor:
    """Return a descriptor for element-wise work on an array: its first axis by all the others."""
    rows = array.shape[0] if array.ndim else 1
    return tensor(array.dtype.char, (rows, math.prod(array.shape[1:])))


@lru_cache(maxsize=_CACHE)
def filter_(char: str, shape: tuple[int, ...], layout: int) -> Descriptor:
    dims = [shape[0], shape[-1], *shape[1:-1]] if layout == CUDNN_TENSOR_NHWC else list(shape)
    descriptor = Descriptor("Filter")
    loaded().cudnnSetFilterNdDescriptor(
        descriptor.value, get_data_type(char), layout, len(dims), _ints(dims)
    )
    return descriptor


def filter_of(array: Any, layout: int = CUDNN_TENSOR_NCHW) -> Descriptor:
    """Return the filter descriptor of a C-contiguous array: (out, in, k...) or (out, k..., in)."""
    return filter_(array.dtype.char, array.shape, layout)


@lru_cache(maxsize=_CACHE)
def convolution(
    char: str,
    pad: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    math_type: int,
) -> Descriptor:
    """Return a cross-correlation descriptor; float16 data is summed in float32."""
    library = loaded()
    descriptor = Descriptor("Convolution")
    library.cudnnSetConvolutionNdDescriptor(
        descriptor.value,
        len(pad),
        _ints(pad),
        _ints(stride),
        _ints(dilation),
        CUDNN_CROSS_CORRELATION,
        CUDNN_DATA_DOUBLE if char == "d" else CUDNN_DATA_FLOAT,
    )
    library.cudnnSetConvolutionGroupCount(descriptor.value, groups)
    library.cudnnSetConvolutionMathType(descriptor.value, math_type)
    return descriptor


@lru_cache(maxsize=_CACHE)
def pooling(
    ksize: tuple[int, ...], stride: tuple[int, ...], pad: tuple[int, ...], mode: int
) -> Descriptor:
    """Return a pooling descriptor; ``mode`` is a ``CUDNN_POOLING_...`` value."""
    descriptor = Descriptor("Pooling")
    loaded().cudnnSetPoolingNdDescriptor(
        descriptor.value,
        mode,
        CUDNN_NOT_PROPAGATE_NAN,
        len(ksize),
        _ints(ksize),
        _ints(pad),
        _ints(stride),
    )
    return descriptor


@lru_cache(maxsize=_CACHE)
def activation(mode: int, coef: float) -> Descriptor:
    """Return an activation descriptor; ``coef``: ceiling of clipped ReLU, alpha of ELU."""
    descriptor = Descriptor("Activation")
    loaded().cudnnSetActivationDescriptor(descriptor.value, mode, CUDNN_NOT_PROPAGATE_NAN, coef)
    return descriptor


def same_dtype(*arrays: Any) -> numpy.dtype:
    """Return the one dtype of all arrays.

    Raises:
        TypeError: If they differ.
    """
    dtype: numpy.dtype = arrays[0].dtype
    for array in arrays[1:]:
        if array.dtype != dtype:
            raise TypeError(f"cuDNN needs arrays of one dtype here, got {dtype} and {array.dtype}")
    return dtype
