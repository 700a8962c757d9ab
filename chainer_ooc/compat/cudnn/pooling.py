"""Maximum and average pooling over any number of spatial axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from chainer_ooc.compat.cudnn import descriptors, device
from chainer_ooc.compat.cudnn.constants import CUDNN_POOLING_MAX, CUDNN_POOLING_MAX_DETERMINISTIC
from chainer_ooc.compat.cudnn.errors import CuDNNError
from chainer_ooc.compat.cudnn.handles import get_handle
from chainer_ooc.compat.cudnn.library import loaded

__all__ = ["pooling_backward", "pooling_forward"]

_MAXIMUM = (CUDNN_POOLING_MAX, CUDNN_POOLING_MAX_DETERMINISTIC)


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _beyond(
    x: Any, y: Any, ksize: Sequence[int], stride: Sequence[int], pad: Sequence[int]
) -> list[int]:
    """Return, per spatial axis, by how much the last windows reach beyond the padded input.

    That happens with Chainer's ``cover_all``: its output is then larger than cuDNN's formula says.
    """
    return [
        max(0, (out - 1) * s + k - 2 * p - size)
        for size, out, k, s, p in zip(x.shape[2:], y.shape[2:], ksize, stride, pad, strict=True)
    ]


def _extended(x: Any, beyond: Sequence[int]) -> Any:
    """Return ``x`` with ``beyond`` elements of minus infinity at the end of each spatial axis."""
    shape = x.shape[:2] + tuple(size + more for size, more in zip(x.shape[2:], beyond, strict=True))
    extended = device.empty(shape, x.dtype)
    extended.fill(-numpy.inf)
    extended[_corner(x)] = x
    return extended


def _corner(x: Any) -> tuple[slice, ...]:
    return tuple(slice(size) for size in x.shape)


def _can_extend(error: CuDNNError, mode: int, beyond: Sequence[int]) -> bool:
    return mode in _MAXIMUM and any(beyond) and (error.bad_parameter or error.not_supported)


def _forward(
    x: Any, y: Any, ksize: tuple[int, ...], stride: tuple[int, ...], pad: tuple[int, ...], mode: int
) -> None:
    dtype = descriptors.same_dtype(x, y)
    loaded().cudnnPoolingForward(
        get_handle(),
        descriptors.pooling(ksize, stride, pad, mode).value,
        descriptors.one(dtype),
        descriptors.tensor_of(x).value,
        x.data.ptr,
        descriptors.zero(dtype),
        descriptors.tensor_of(y).value,
        y.data.ptr,
    )


def _backward(
    x: Any,
    y: Any,
    gy: Any,
    ksize: tuple[int, ...],
    stride: tuple[int, ...],
    pad: tuple[int, ...],
    mode: int,
) -> Any:
    dtype = descriptors.same_dtype(x, y, gy)
    gx = device.empty(x.shape, dtype)
    x_desc, y_desc = descriptors.tensor_of(x), descriptors.tensor_of(y)
    loaded().cudnnPoolingBackward(
        get_handle(),
        descriptors.pooling(ksize, stride, pad, mode).value,
        descriptors.one(dtype),
        y_desc.value,
        y.data.ptr,
        y_desc.value,
        gy.data.ptr,
        x_desc.value,
        x.data.ptr,
        descriptors.zero(dtype),
        x_desc.value,
        gx.data.ptr,
    )
    return gx


def pooling_forward(
    x: Any, y: Any, ksize: Sequence[int], stride: Sequence[int], pad: Sequence[int], mode: int
) -> Any:
    """Pool ``x`` into ``y``.

    Args:
        x: (n, c, d...); float16, float32 or float64.
        y: (n, c, out...), C-contiguous; overwritten. It may be larger than ``1 + (d + 2 pad -
            ksize) // stride`` (Chainer's ``cover_all``): windows then reach beyond the input.
        ksize: One value per spatial axis.
        stride: See ``ksize``.
        pad: See ``ksize``.
        mode: A ``CUDNN_POOLING_...`` value.

    Returns:
        ``y``.

    Raises:
        CuDNNError: If cuDNN cannot do it.
    """
    device.check_same_device(x, y)
    device.check_contiguous(y, "y")
    x = device.contiguous(x)
    ksize, stride, pad = _ints(ksize), _ints(stride), _ints(pad)
    try:
        _forward(x, y, ksize, stride, pad, mode)
    except CuDNNError as error:
        beyond = _beyond(x, y, ksize, stride, pad)
        if not _can_extend(error, mode, beyond):
            raise
        _forward(_extended(x, beyond), y, ksize, stride, pad, mode)
    return y


def pooling_backward(
    x: Any,
    y: Any,
    gy: Any,
    ksize: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
    mode: int,
) -> Any:
    """Return the gradient of the pooling's input.

    Args:
        x: Input and output of :func:`pooling_forward`.
        y: See ``x``.
        gy: Gradient of ``y``, of its shape.
        ksize: As in the forward computation.
        stride: See ``ksize``.
        pad: See ``ksize``.
        mode: See ``ksize``.

    Returns:
        An array of the shape and dtype of ``x``.
    """
    device.check_same_device(x, y, gy)
    x, y, gy = device.contiguous(x), device.contiguous(y), device.contiguous(gy)
    ksize, stride, pad = _ints(ksize), _ints(stride), _ints(pad)
    try:
        return _backward(x, y, gy, ksize, stride, pad, mode)
    except CuDNNError as error:
        beyond = _beyond(x, y, ksize, stride, pad)
        if not _can_extend(error, mode, beyond):
            raise
        gx = _backward(_extended(x, beyond), y, gy, ksize, stride, pad, mode)
        return device.contiguous(gx[_corner(x)])
