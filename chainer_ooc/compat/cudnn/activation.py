"""Element-wise activations and softmax."""

from __future__ import annotations

import math
from typing import Any

from chainer_ooc.compat.cudnn import descriptors, device
from chainer_ooc.compat.cudnn.constants import CUDNN_SOFTMAX_MODE_CHANNEL
from chainer_ooc.compat.cudnn.descriptors import Descriptor
from chainer_ooc.compat.cudnn.handles import get_handle
from chainer_ooc.compat.cudnn.library import loaded

__all__ = ["activation_backward", "activation_forward", "softmax_backward", "softmax_forward"]


def activation_forward(x: Any, mode: int, coef: float = 0.0) -> Any:
    """Return the activation of ``x``, a new array of its shape and dtype.

    Args:
        x: Any shape; float16, float32 or float64.
        mode: A ``CUDNN_ACTIVATION_...`` value.
        coef: The ceiling of clipped ReLU, the alpha of ELU.
    """
    device.check_same_device(x)
    x = device.contiguous(x)
    y = device.empty(x.shape, x.dtype)
    desc = descriptors.matrix(x).value
    loaded().cudnnActivationForward(
        get_handle(),
        descriptors.activation(mode, float(coef)).value,
        descriptors.one(x.dtype),
        desc,
        x.data.ptr,
        descriptors.zero(x.dtype),
        desc,
        y.data.ptr,
    )
    return y


def activation_backward(x: Any, y: Any, gy: Any, mode: int, coef: float = 0.0) -> Any:
    """Return the gradient of an activation's input.

    Args:
        x: Input and output of :func:`activation_forward`.
        y: See ``x``.
        gy: Gradient of ``y``, of its shape and dtype.
        mode: As in the forward computation.
        coef: See ``mode``.
    """
    device.check_same_device(x, y, gy)
    dtype = descriptors.same_dtype(x, y, gy)
    x, y, gy = device.contiguous(x), device.contiguous(y), device.contiguous(gy)
    gx = device.empty(x.shape, dtype)
    desc = descriptors.matrix(x).value
    loaded().cudnnActivationBackward(
        get_handle(),
        descriptors.activation(mode, float(coef)).value,
        descriptors.one(dtype),
        desc,
        y.data.ptr,
        desc,
        gy.data.ptr,
        desc,
        x.data.ptr,
        descriptors.zero(dtype),
        desc,
        gx.data.ptr,
    )
    return gx


def _around(array: Any, axis: int) -> Descriptor:
    """Return a descriptor with ``axis`` as channels: (what is before it, it, what is after it)."""
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"axis {axis} does not exist in an array of {array.ndim} dimensions")
    axis %= array.ndim
    shape = array.shape
    return descriptors.tensor(
        array.dtype.char, (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))
    )


def softmax_forward(x: Any, axis: int, algorithm: int) -> Any:
    """Return the (log-)softmax of ``x`` along ``axis``, a new array of its shape and dtype.

    Args:
        x: Any shape; float16, float32 or float64.
        axis: The axis whose values sum to one.
        algorithm: ``CUDNN_SOFTMAX_FAST``, ``CUDNN_SOFTMAX_ACCURATE`` or ``CUDNN_SOFTMAX_LOG``.
    """
    device.check_same_device(x)
    x = device.contiguous(x)
    y = device.empty(x.shape, x.dtype)
    desc = _around(x, axis).value
    loaded().cudnnSoftmaxForward(
        get_handle(),
        algorithm,
        CUDNN_SOFTMAX_MODE_CHANNEL,
        descriptors.one(x.dtype),
        desc,
        x.data.ptr,
        descriptors.zero(x.dtype),
        desc,
        y.data.ptr,
    )
    return y


def softmax_backward(y: Any, gy: Any, axis: int, algorithm: int) -> Any:
    """Return the gradient of a (log-)softmax's input.

    Args:
        y: Output of :func:`softmax_forward`.
        gy: Gradient of ``y``, of its shape and dtype.
        axis: As in the forward computation.
        algorithm: See ``axis``.
    """
    device.check_same_device(y, gy)
    dtype = descriptors.same_dtype(y, gy)
    y, gy = device.contiguous(y), device.contiguous(gy)
    gx = device.empty(y.shape, dtype)
    desc = _around(y, axis).value
    loaded().cudnnSoftmaxBackward(
        get_handle(),
        algorithm,
        CUDNN_SOFTMAX_MODE_CHANNEL,
        descriptors.one(dtype),
        desc,
        y.data.ptr,
        desc,
        gy.data.ptr,
        descriptors.zero(dtype),
        desc,
        gx.data.ptr,
    )
    return gx
