"""Convolution: forward, backward to the data (also deconvolution), backward to the filter."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy

from chainer_ooc.compat.cudnn import algorithms, descriptors, device, math_mode, workspace
from chainer_ooc.compat.cudnn.algorithms import Direction, Plan
from chainer_ooc.compat.cudnn.constants import CUDNN_TENSOR_NCHW, CUDNN_TENSOR_NHWC
from chainer_ooc.compat.cudnn.handles import get_handle
from chainer_ooc.compat.cudnn.library import loaded

__all__ = ["convolution_backward_data", "convolution_backward_filter", "convolution_forward"]


@lru_cache(maxsize=4096)
def _plan(
    direction: Direction,
    _device: int,
    char: str,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    y_shape: tuple[int, ...],
    pad: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    d_layout: int,
    w_layout: int,
    math_type: int,
    deterministic: bool,
    limit: int,
) -> Plan:
    """Return the plan for a convolution from x to y with filter w, kept per content and device."""
    dtype = numpy.dtype(char)
    x = descriptors.tensor(char, x_shape, d_layout)
    w = descriptors.filter_(char, w_shape, w_layout)
    y = descriptors.tensor(char, y_shape, d_layout)
    first, second, output = {
        algorithms.FORWARD: (x, w, y),
        algorithms.BACKWARD_DATA: (w, y, x),
        algorithms.BACKWARD_FILTER: (x, y, w),
    }[direction]
    return Plan(
        direction,
        dtype,
        first,
        second,
        output,
        partial(descriptors.convolution, char, pad, stride, dilation, groups),
        math_type,
        deterministic,
        limit,
        f"{dtype}, x {x_shape}, W {w_shape}, y {y_shape}, pad {pad}, "
        f"stride {stride}, dilation {dilation}, groups {groups}, "
        f"{'NHWC' if d_layout == CUDNN_TENSOR_NHWC else 'NCHW'}",
    )


def _config_deterministic() -> bool:
    """Return ``chainer.config.cudnn_deterministic``; Chainer does not pass it to every call."""
    chainer = sys.modules.get("chainer")
    return bool(chainer is not None and chainer.config.cudnn_deterministic)


def _checked_parameters(
    ndim: int, pad: Sequence[int], stride: Sequence[int], dilation: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    if dilation is None:
        dilation = (1,) * len(pad)
    for name, value in (("pad", pad), ("stride", stride), ("dilation", dilation)):
        if len(value) != ndim:
            raise ValueError(
                f"{name} must have {ndim} values for {ndim} spatial axes, got {tuple(value)}"
            )
    # Chainer may give NumPy integers.
    return tuple(map(int, pad)), tuple(map(int, stride)), tuple(map(int, dilation))


def _compute(
    direction: Direction,
    x: Any,
    w: Any,
    y: Any,
    pad: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] | None,
    groups: int,
    deterministic: bool,
    auto_tune: bool,
    tensor_core: str,
    d_layout: int,
    w_layout: int,
) -> int:
    """Run one direction (``x`` is always the convolution's input side) and return the handle."""
    index = device.check_same_device(x, w, y)
    dtype = descriptors.same_dtype(x, w, y)
    parameters = _checked_parameters(x.ndim - 2, pad, stride, dilation)
    plan = _plan(
        direction,
        index,
        dtype.char,
        x.shape,
        w.shape,
        y.shape,
        *parameters,
        int(groups),
        d_layout,
        w_layout,
        math_mode.math_type_for(dtype, tensor_core),
        bool(deterministic),
        workspace.get_max_workspace_size(),
    )
    first, second, output = {
        algorithms.FORWARD: (x, w, y),
        algorithms.BACKWARD_DATA: (w, y, x),
        algorithms.BACKWARD_FILTER: (x, y, w),
    }[direction]
    handle = get_handle()
    algorithm = algorithms.run(
        plan,
        handle,
        descriptors.one(dtype),
        descriptors.zero(dtype),
        first.data.ptr,
        second.data.ptr,
        output.data.ptr,
        # What runs fastest differs from run to run, so a deterministic run asks the heuristics.
        bool(auto_tune) and not deterministic,
    )
    algorithms.note(output, algorithm)
    return handle


def _add_bias(handle: int, b: Any, y: Any, d_layout: int) -> None:
    device.check_same_device(b)
    dtype = descriptors.same_dtype(y, b)
    shape = [1] * y.ndim
    shape[-1 if d_layout == CUDNN_TENSOR_NHWC else 1] = b.size
    b = device.contiguous(b)
    one = descriptors.one(dtype)
    loaded().cudnnAddTensor(
        handle,
        one,
        descriptors.tensor(dtype.char, tuple(shape), d_layout).value,
        b.data.ptr,
        one,
        descriptors.tensor_of(y, d_layout).value,
        y.data.ptr,
    )


def convolution_forward(
    x: Any,
    W: Any,
    b: Any | None,
    y: Any,
    pad: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] | None,
    groups: int,
    *,
    auto_tune: bool,
    tensor_core: str,
    d_layout: int = CUDNN_TENSOR_NCHW,
    w_layout: int = CUDNN_TENSOR_NCHW,
) -> None:
    """Compute ``y = conv(x, W) + b`` (cross-correlation) into ``y``.

    Args:
        x: (n, c_in, d...) or, for ``CUDNN_TENSOR_NHWC``, (n, d..., c_in); float16, float32 or
            float64.
        W: (c_out, c_in / groups, k...) or (c_out, k..., c_in / groups).
        b: (c_out,) or ``None``.
        y: (n, c_out, out...) or (n, out..., c_out), C-contiguous; overwritten.
        pad: One value per spatial axis.
        stride: See ``pad``.
        dilation: See ``pad``.
        groups: Number of groups of channels.
        auto_tune: Time cuDNN's algorithms at the first call with these shapes, and keep the
            fastest.
        tensor_core: ``"auto"``, ``"always"`` or ``"never"``, see :func:`.math_mode.math_type_for`.
        d_layout: ``CUDNN_TENSOR_NCHW`` or ``CUDNN_TENSOR_NHWC``.
        w_layout: See ``d_layout``.

    Raises:
        CuDNNError: If cuDNN cannot do it.
        OutOfMemoryError: If there is no memory even for the smallest workspace.
    """
    device.check_contiguous(y, "y")
    handle = _compute(
        algorithms.FORWARD,
        device.contiguous(x),
        device.contiguous(W),
        y,
        pad,
        stride,
        dilation,
        groups,
        # All forward algorithms are deterministic, but the timed choice among them is not.
        bool(auto_tune) and _config_deterministic(),
        auto_tune,
        tensor_core,
        d_layout,
        w_layout,
    )
    if b is not None:
        _add_bias(handle, b, y, d_layout)


def convolution_backward_data(
    W: Any,
    x: Any,
    b: Any | None,
    y: Any,
    pad: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] | None,
    groups: int,
    *,
    deterministic: bool,
    auto_tune: bool,
    tensor_core: str,
    d_layout: int = CUDNN_TENSOR_NCHW,
    w_layout: int = CUDNN_TENSOR_NCHW,
) -> None:
    """Compute the transposed convolution of ``x`` into ``y``, plus ``b``.

    ``x`` has the shape of the convolution's output and ``y`` that of its input; for the rest see
    :func:`convolution_forward`.

    Args:
        W: (c_x, c_y / groups, k...) or (c_x, k..., c_y / groups).
        x: (n, c_x, out...).
        b: (c_y,) or ``None``.
        y: (n, c_y, d...), C-contiguous; overwritten.
        pad: As in the forward computation.
        stride: See ``pad``.
        dilation: See ``pad``.
        groups: See ``pad``.
        auto_tune: See ``pad``.
        tensor_core: See ``pad``.
        d_layout: See ``pad``.
        w_layout: See ``pad``.
        deterministic: Use only algorithms that give the same bits at every run.
    """
    device.check_contiguous(y, "y")
    handle = _compute(
        algorithms.BACKWARD_DATA,
        y,
        device.contiguous(W),
        device.contiguous(x),
        pad,
        stride,
        dilation,
        groups,
        deterministic,
        auto_tune,
        tensor_core,
        d_layout,
        w_layout,
    )
    if b is not None:
        _add_bias(handle, b, y, d_layout)


def convolution_backward_filter(
    x: Any,
    gy: Any,
    gW: Any,
    pad: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] | None,
    groups: int,
    *,
    deterministic: bool,
    auto_tune: bool,
    tensor_core: str,
    d_layout: int = CUDNN_TENSOR_NCHW,
    w_layout: int = CUDNN_TENSOR_NCHW,
) -> None:
    """Compute the filter's gradient into ``gW``.

    Args:
        x: (n, c_in, d...), the convolution's input.
        gy: (n, c_out, out...), the gradient of its output.
        gW: (c_out, c_in / groups, k...), C-contiguous; overwritten.
        pad: As in the forward computation.
        stride: See ``pad``.
        dilation: See ``pad``.
        groups: See ``pad``.
        auto_tune: See ``pad``.
        tensor_core: See ``pad``.
        d_layout: See ``pad``.
        w_layout: See ``pad``.
        deterministic: Use only algorithms that give the same bits at every run.
    """
    device.check_contiguous(gW, "gW")
    _compute(
        algorithms.BACKWARD_FILTER,
        device.contiguous(x),
        gW,
        device.contiguous(gy),
        pad,
        stride,
        dilation,
        groups,
        deterministic,
        auto_tune,
        tensor_core,
        d_layout,
        w_layout,
    )
