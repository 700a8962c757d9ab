"""Batch normalization in all of cuDNN's modes."""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy

from chainer_ooc.compat.cudnn import descriptors, device
from chainer_ooc.compat.cudnn.constants import (
    CUDNN_BATCHNORM_OPS_BN,
    CUDNN_BATCHNORM_PER_ACTIVATION,
    CUDNN_BATCHNORM_SPATIAL,
    CUDNN_BATCHNORM_SPATIAL_PERSISTENT,
    CUDNN_ERRQUERY_BLOCKING,
    CUDNN_TENSOR_NCHW,
    CUDNN_TENSOR_NHWC,
)
from chainer_ooc.compat.cudnn.descriptors import Descriptor
from chainer_ooc.compat.cudnn.handles import get_handle
from chainer_ooc.compat.cudnn.library import loaded

__all__ = [
    "batch_normalization_backward",
    "batch_normalization_forward_inference",
    "batch_normalization_forward_training",
    "batch_normalization_forward_training_ex",
]

_MODES = (
    CUDNN_BATCHNORM_PER_ACTIVATION,
    CUDNN_BATCHNORM_SPATIAL,
    CUDNN_BATCHNORM_SPATIAL_PERSISTENT,
)


@dataclass(frozen=True)
class _Shape:
    """What cuDNN is told about one batch normalization."""

    char: str
    shape: tuple[int, ...]
    layout: int
    mode: int

    def tensor(self) -> Descriptor:
        return descriptors.tensor(self.char, self.shape, self.layout)

    def parameters(self) -> Descriptor:
        """Scale, shift, mean and variance: (1, c, 1, 1), float32 for float16 data."""
        channels = self.shape[-1 if self.layout == CUDNN_TENSOR_NHWC else 1]
        char = device.parameter_dtype(numpy.dtype(self.char)).char
        return descriptors.tensor(char, (1, channels, 1, 1))


def _shape_of(x: Any, gamma: Any, is_for_conv2d: bool, mode: int, d_layout: int) -> _Shape:
    if mode not in _MODES:
        raise ValueError(
            f"cudnn_mode must be one of the CUDNN_BATCHNORM_... values {_MODES}, not {mode}"
        )
    if is_for_conv2d:
        if x.ndim != 4:
            raise ValueError(f"is_for_conv2d needs x of four dimensions, its shape is {x.shape}")
        shape, layout = x.shape, d_layout
        channels = shape[-1 if layout == CUDNN_TENSOR_NHWC else 1]
    else:
        # The last axis is normalized over all the others.
        channels = x.shape[-1]
        shape, layout = (x.size // channels if channels else 0, channels), CUDNN_TENSOR_NCHW
    if gamma.size != channels:
        raise ValueError(
            f"gamma has {gamma.size} elements but x of shape {x.shape} has {channels} channels"
        )
    return _Shape(x.dtype.char, shape, layout, mode)


@lru_cache(maxsize=4096)
def _sizes(_device: int, shape: _Shape) -> tuple[int, int, int]:
    """Return bytes: forward workspace, reserve (kept for backward), backward workspace."""
    library, handle = loaded(), get_handle()
    x, parameters = shape.tensor().value, shape.parameters().value
    mode, ops = shape.mode, CUDNN_BATCHNORM_OPS_BN
    return (
        library.size(
            "cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize",
            handle, mode, ops, x, None, x, parameters, None,
        ),
        library.size(
            "cudnnGetBatchNormalizationTrainingExReserveSpaceSize", handle, mode, ops, None, x
        ),
        library.size(
            "cudnnGetBatchNormalizationBackwardExWorkspaceSize",
            handle, mode, ops, x, None, x, None, x, parameters, None,
        ),
    )  # fmt: skip


def _as(dtype: numpy.dtype, array: Any) -> Any:
    return device.contiguous(array.astype(dtype, copy=False))


def _warn_about_overflow(handle: int, mode: int) -> None:
    """Wait for the result and say when the persistent kernels' integer sums overflowed."""
    if mode != CUDNN_BATCHNORM_SPATIAL_PERSISTENT:
        return
    status = ctypes.c_int()
    loaded().cudnnQueryRuntimeError(handle, ctypes.byref(status), CUDNN_ERRQUERY_BLOCKING, None)
    if status.value:
        warnings.warn(
            f"batch normalization overflowed in cuDNN's persistent mode (status {status.value}); "
            "set chainer.config.cudnn_fast_batch_normalization = False",
            RuntimeWarning,
            stacklevel=4,
        )


def _forward_training(
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any | None,
    running_var: Any | None,
    mean: Any | None,
    inv_std: Any | None,
    eps: float,
    decay: float,
    is_for_conv2d: bool,
    cudnn_mode: int,
    debug: bool,
    d_layout: int,
    keep_reserve: bool,
) -> tuple[Any, Any, Any, Any]:
    index = device.check_same_device(x, gamma, beta, running_mean, running_var)
    shape = _shape_of(x, gamma, is_for_conv2d, cudnn_mode, d_layout)
    dtype = device.parameter_dtype(x.dtype)
    x = device.contiguous(x)
    gamma_, beta_ = _as(dtype, gamma), _as(dtype, beta)
    averages = [
        (array, _as(dtype, array)) for array in (running_mean, running_var) if array is not None
    ]
    if len(averages) == 1:
        raise ValueError("give both running_mean and running_var, or neither")
    average_pointers = [working.data.ptr for _, working in averages] or [None, None]
    saved = [device.empty(gamma.shape, dtype) if a is None else a for a in (mean, inv_std)]
    for array, name in zip(saved, ("mean", "inv_std"), strict=True):
        device.check_contiguous(array, name)
        if array.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} for x of {x.dtype}, not {array.dtype}")
    y = device.empty(x.shape, x.dtype)
    one, zero = descriptors.one(x.dtype), descriptors.zero(x.dtype)
    x_desc, parameters = shape.tensor().value, shape.parameters().value
    statistics = (1.0 - decay, *average_pointers, eps, saved[0].data.ptr, saved[1].data.ptr)
    handle, library = get_handle(), loaded()
    reserve = None
    if keep_reserve:
        workspace_size, reserve_size, _ = _sizes(index, shape)
        reserve = device.empty((reserve_size,), numpy.dtype("b"))
        workspace = device.allocate(workspace_size)
        library.cudnnBatchNormalizationForwardTrainingEx(
            handle, cudnn_mode, CUDNN_BATCHNORM_OPS_BN, one, zero,
            x_desc, x.data.ptr, None, None, x_desc, y.data.ptr,
            parameters, gamma_.data.ptr, beta_.data.ptr, *statistics,
            None, workspace.ptr, workspace_size, reserve.data.ptr, reserve_size,
        )  # fmt: skip
    else:
        library.cudnnBatchNormalizationForwardTraining(
            handle, cudnn_mode, one, zero, x_desc, x.data.ptr, x_desc, y.data.ptr,
            parameters, gamma_.data.ptr, beta_.data.ptr, *statistics,
        )  # fmt: skip
    if debug:
        _warn_about_overflow(handle, cudnn_mode)
    for array, working in averages:
        if working is not array:
            array[...] = working
    return reserve, y, saved[0], saved[1]


def batch_normalization_forward_training(
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any | None,
    running_var: Any | None,
    mean: Any | None,
    inv_std: Any | None,
    eps: float,
    decay: float,
    is_for_conv2d: bool,
    cudnn_mode: int,
    debug: bool,
    *,
    d_layout: int = CUDNN_TENSOR_NCHW,
) -> Any:
    """Normalize ``x`` by its own statistics and update the running ones in place.

    Args:
        x: (n, c, h, w) or, for ``CUDNN_TENSOR_NHWC``, (n, h, w, c) when ``is_for_conv2d``, else
            (..., c).
        gamma: (c,), any float dtype.
        beta: See ``gamma``.
        running_mean: (c,), any float dtype, or both ``None``; updated with the unbiased variance.
        running_var: See ``running_mean``.
        mean: (c,) arrays to write the batch's mean and ``1 / sqrt(var + eps)`` to, float32 (float64
            for float64 data), or ``None`` for new ones.
        inv_std: See ``mean``.
        eps: Added to the variance.
        decay: Weight of the old running statistics.
        is_for_conv2d: Whether the channels are those of images.
        cudnn_mode: A ``CUDNN_BATCHNORM_...`` value.
        debug: Wait for the result and warn when the persistent mode overflowed.
        d_layout: ``CUDNN_TENSOR_NCHW`` or ``CUDNN_TENSOR_NHWC``.

    Returns:
        ``(y, mean, inv_std)``, or only ``y`` when ``mean`` was given.
    """
    _, y, saved_mean, saved_inv_std = _forward_training(
        x, gamma, beta, running_mean, running_var, mean, inv_std, eps, decay, is_for_conv2d,
        cudnn_mode, debug, d_layout, keep_reserve=False,
    )  # fmt: skip
    return (y, saved_mean, saved_inv_std) if mean is None else y


def batch_normalization_forward_training_ex(
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any | None,
    running_var: Any | None,
    mean: Any | None,
    inv_std: Any | None,
    eps: float,
    decay: float,
    is_for_conv2d: bool,
    cudnn_mode: int,
    debug: bool,
    *,
    d_layout: int = CUDNN_TENSOR_NCHW,
) -> tuple[Any, ...]:
    """Like :func:`batch_normalization_forward_training`, and keep what makes backward faster.

    Returns:
        ``(reserve_space, y, mean, inv_std)``, or ``(reserve_space, y)`` when ``mean`` was given.
        ``reserve_space`` is an array of bytes for :func:`batch_normalization_backward`.
    """
    result = _forward_training(
        x, gamma, beta, running_mean, running_var, mean, inv_std, eps, decay, is_for_conv2d,
        cudnn_mode, debug, d_layout, keep_reserve=True,
    )  # fmt: skip
    return result if mean is None else result[:2]


def batch_normalization_forward_inference(
    x: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    var: Any,
    eps: float,
    is_for_conv2d: bool,
    cudnn_mode: int,
    *,
    d_layout: int = CUDNN_TENSOR_NCHW,
) -> Any:
    """Return ``x`` normalized by the given statistics, a new array of its shape and dtype.

    For the arguments see :func:`batch_normalization_forward_training`.
    """
    device.check_same_device(x, gamma, beta, mean, var)
    shape = _shape_of(x, gamma, is_for_conv2d, cudnn_mode, d_layout)
    dtype = device.parameter_dtype(x.dtype)
    x = device.contiguous(x)
    gamma, beta, mean, var = (_as(dtype, array) for array in (gamma, beta, mean, var))
    y = device.empty(x.shape, x.dtype)
    desc = shape.tensor().value
    loaded().cudnnBatchNormalizationForwardInference(
        get_handle(), cudnn_mode, descriptors.one(x.dtype), descriptors.zero(x.dtype),
        desc, x.data.ptr, desc, y.data.ptr, shape.parameters().value,
        gamma.data.ptr, beta.data.ptr, mean.data.ptr, var.data.ptr, eps,
    )  # fmt: skip
    return y


def batch_normalization_backward(
    x: Any,
    gamma: Any,
    gy: Any,
    mean: Any,
    inv_std: Any,
    eps: float,
    is_for_conv2d: bool,
    cudnn_mode: int,
    debug: bool,
    *,
    d_layout: int = CUDNN_TENSOR_NCHW,
    reserve_space: Any | None = None,
) -> tuple[Any, Any, Any]:
    """Return the gradients of ``x``, ``gamma`` and ``beta``.

    Args:
        x: As in the forward computation.
        gamma: See ``x``.
        eps: See ``x``.
        is_for_conv2d: See ``x``.
        cudnn_mode: See ``x``.
        debug: See ``x``.
        d_layout: See ``x``.
        gy: Gradient of its output.
        mean: What it returned.
        inv_std: See ``mean``.
        reserve_space: What :func:`batch_normalization_forward_training_ex` returned, or ``None``
            after :func:`batch_normalization_forward_training`.

    Returns:
        ``(gx, ggamma, gbeta)`` in the dtypes of ``x`` and ``gamma``.
    """
    index = device.check_same_device(x, gamma, gy, mean, inv_std, reserve_space)
    shape = _shape_of(x, gamma, is_for_conv2d, cudnn_mode, d_layout)
    dtype = device.parameter_dtype(x.dtype)
    x = device.contiguous(x)
    gy = _as(x.dtype, gy)
    gamma_, mean, inv_std = (_as(dtype, array) for array in (gamma, mean, inv_std))
    gx = device.empty(x.shape, x.dtype)
    ggamma, gbeta = device.empty(gamma.shape, dtype), device.empty(gamma.shape, dtype)
    one, zero = descriptors.one(x.dtype), descriptors.zero(x.dtype)
    desc, parameters = shape.tensor().value, shape.parameters().value
    handle, library = get_handle(), loaded()
    if reserve_space is not None:
        workspace_size = _sizes(index, shape)[2]
        workspace = device.allocate(workspace_size)
        library.cudnnBatchNormalizationBackwardEx(
            handle, cudnn_mode, CUDNN_BATCHNORM_OPS_BN, one, zero, one, zero,
            desc, x.data.ptr, None, None, desc, gy.data.ptr, None, None, desc, gx.data.ptr,
            parameters, gamma_.data.ptr, None, ggamma.data.ptr, gbeta.data.ptr,
            eps, mean.data.ptr, inv_std.data.ptr, None,
            workspace.ptr, workspace_size, reserve_space.data.ptr, reserve_space.nbytes,
        )  # fmt: skip
    else:
        library.cudnnBatchNormalizationBackward(
            handle, cudnn_mode, one, zero, one, zero,
            desc, x.data.ptr, desc, gy.data.ptr, desc, gx.data.ptr,
            parameters, gamma_.data.ptr, ggamma.data.ptr, gbeta.data.ptr,
            eps, mean.data.ptr, inv_std.data.ptr,
        )  # fmt: skip
    if debug:
        _warn_about_overflow(handle, cudnn_mode)
    return gx, ggamma.astype(gamma.dtype, copy=False), gbeta.astype(gamma.dtype, copy=False)
