"""Recurrent networks (ReLU, tanh, LSTM, GRU; one or both directions) with cuDNN's v8 calls.

Chainer's sequences are packed: step after step, each step's batch no larger than the one before.
That is cuDNN's sequence-major packed layout, with the sequences in descending order of length.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from chainer_ooc.compat.cudnn import descriptors, device
from chainer_ooc.compat.cudnn.constants import (
    CUDNN_BIDIRECTIONAL,
    CUDNN_FWD_MODE_INFERENCE,
    CUDNN_FWD_MODE_TRAINING,
    CUDNN_LINEAR_INPUT,
    CUDNN_LSTM,
    CUDNN_RNN_DATA_LAYOUT_SEQ_MAJOR_PACKED,
    CUDNN_WGRAD_MODE_ADD,
)
from chainer_ooc.compat.cudnn.descriptors import Descriptor
from chainer_ooc.compat.cudnn.dropout import DropoutStates
from chainer_ooc.compat.cudnn.handles import get_handle
from chainer_ooc.compat.cudnn.library import loaded
from chainer_ooc.compat.cudnn.rnn_weights import RNNDescriptor, create_rnn_descriptor

__all__ = [
    "rnn_backward_data",
    "rnn_backward_weights",
    "rnn_forward_inference",
    "rnn_forward_training",
]


@dataclass
class _Call:
    """What the four computations on one batch of sequences share."""

    handle: int
    rnn: RNNDescriptor
    x: Descriptor
    y: Descriptor
    h: Descriptor
    lengths: Any  # on the device
    outputs: int  # numbers per step
    mode: int
    workspace: int
    reserve: int


def _data_descriptor(dtype: numpy.dtype, lengths: Sequence[int], size: int) -> Descriptor:
    descriptor = Descriptor("RNNData")
    loaded().cudnnSetRNNDataDescriptor(
        descriptor.value,
        descriptors.get_data_type(dtype),
        CUDNN_RNN_DATA_LAYOUT_SEQ_MAJOR_PACKED,
        max(lengths),
        len(lengths),
        size,
        (ctypes.c_int * len(lengths))(*lengths),
        None,
    )
    return descriptor


def _call(
    states: DropoutStates,
    direction_mode: int,
    rnn_mode: int,
    hx: Any,
    xs: Any,
    lengths: Sequence[int],
    forward_mode: int,
) -> _Call:
    """Describe a computation.

    Args:
        states: The dropout between layers.
        direction_mode: Direction and kind of cell.
        rnn_mode: See ``direction_mode``.
        hx: (layers x directions, batch, hidden).
        xs: (sum of lengths, input).
        lengths: The batch's size at each step, not increasing.
        forward_mode: ``CUDNN_FWD_MODE_...``.
    """
    batches = [int(n) for n in lengths]
    if not batches or batches[0] != hx.shape[1] or sum(batches) != xs.shape[0]:
        raise ValueError(
            f"the steps' batch sizes {batches} do not fit hx of shape {hx.shape} "
            f"and xs of shape {xs.shape}"
        )
    if any(later > earlier for earlier, later in itertools.pairwise(batches)):
        raise ValueError(f"the steps' batch sizes must not increase: {batches}")
    steps = [sum(batch > item for batch in batches) for item in range(batches[0])]
    dtype = descriptors.same_dtype(hx, xs)
    directions = 2 if direction_mode == CUDNN_BIDIRECTIONAL else 1
    hidden = hx.shape[2]
    # Not cached: it takes over the dropout ratio of this moment.
    rnn = create_rnn_descriptor(
        hidden, hx.shape[0] // directions, states._desc, CUDNN_LINEAR_INPUT,
        direction_mode, rnn_mode, descriptors.get_data_type(dtype),
    )  # fmt: skip
    rnn.configure(xs.shape[1])
    outputs = hidden * directions
    x = _data_descriptor(dtype, steps, xs.shape[1])
    handle = get_handle()
    workspace, reserve = ctypes.c_size_t(), ctypes.c_size_t()
    loaded().cudnnGetRNNTempSpaceSizes(
        handle, rnn.value, forward_mode, x.value, ctypes.byref(workspace), ctypes.byref(reserve)
    )
    return _Call(
        handle,
        rnn,
        x,
        _data_descriptor(dtype, steps, outputs),
        descriptors.tensor_of(hx),
        device.to_device(numpy.array(steps, dtype=numpy.int32)),
        outputs,
        rnn_mode,
        workspace.value,
        reserve.value,
    )


def _forward(
    call: _Call, forward_mode: int, hx: Any, cx: Any | None, w: Any, xs: Any
) -> tuple[Any | None, Any, Any | None, Any]:
    lstm = call.mode == CUDNN_LSTM
    ys = device.empty((xs.shape[0], call.outputs), xs.dtype)
    hy = device.empty(hx.shape, hx.dtype)
    cy = device.empty(hx.shape, hx.dtype) if lstm else None
    workspace = device.allocate(call.workspace)
    training = forward_mode == CUDNN_FWD_MODE_TRAINING
    reserve = device.empty((call.reserve,), numpy.dtype("b")) if training else None
    loaded().cudnnRNNForward(
        call.handle, call.rnn.value, forward_mode, call.lengths.data.ptr,
        call.x.value, xs.data.ptr, call.y.value, ys.data.ptr,
        call.h.value, hx.data.ptr, hy.data.ptr,
        call.h.value, _address(cx), _address(cy),
        w.nbytes, w.data.ptr, call.workspace, workspace.ptr,
        call.reserve if training else 0, _address(reserve),
    )  # fmt: skip
    return reserve, hy, cy, ys


def _address(array: Any | None) -> int | None:
    return None if array is None else array.data.ptr


def _contiguous(*arrays: Any) -> list[Any]:
    device.check_same_device(*arrays)
    return [None if array is None else device.contiguous(array) for array in arrays]


def rnn_forward_inference(
    states: DropoutStates,
    direction_mode: int,
    rnn_mode: int,
    hx: Any,
    cx: Any | None,
    w: Any,
    xs: Any,
    lengths: Sequence[int],
) -> tuple[Any, Any | None, Any]:
    """Run a network without keeping anything for backward.

    Args:
        states: The dropout between layers.
        direction_mode: ``CUDNN_UNIDIRECTIONAL`` or ``CUDNN_BIDIRECTIONAL``; the kind of cell.
        rnn_mode: See ``direction_mode``.
        hx: (layers x directions, batch, hidden); ``cx`` for LSTM only.
        cx: See ``hx``.
        w: All weights, packed (size, 1, 1).
        xs: (sum of lengths, input), step after step.
        lengths: The batch's size at each step, not increasing.

    Returns:
        ``(hy, cy, ys)``: of the shape of ``hx``, the same or ``None``, and (sum of lengths,
        directions x hidden).
    """
    hx, cx, w, xs = _contiguous(hx, cx, w, xs)
    mode = CUDNN_FWD_MODE_INFERENCE
    call = _call(states, direction_mode, rnn_mode, hx, xs, lengths, mode)
    _, hy, cy, ys = _forward(call, mode, hx, cx, w, xs)
    return hy, cy, ys


def rnn_forward_training(
    states: DropoutStates,
    direction_mode: int,
    rnn_mode: int,
    hx: Any,
    cx: Any | None,
    w: Any,
    xs: Any,
    lengths: Sequence[int],
) -> tuple[Any, Any, Any | None, Any]:
    """Run a network and keep what backward needs: ``(reserve_space, hy, cy, ys)``.

    For the arguments see :func:`rnn_forward_inference`; ``reserve_space`` is an array of bytes.
    """
    hx, cx, w, xs = _contiguous(hx, cx, w, xs)
    mode = CUDNN_FWD_MODE_TRAINING
    call = _call(states, direction_mode, rnn_mode, hx, xs, lengths, mode)
    reserve, hy, cy, ys = _forward(call, mode, hx, cx, w, xs)
    return reserve, hy, cy, ys


def rnn_backward_data(
    states: DropoutStates,
    direction_mode: int,
    rnn_mode: int,
    hx: Any,
    cx: Any | None,
    w: Any,
    xs: Any,
    ys: Any,
    reserve_space: Any,
    dhy: Any,
    dcy: Any | None,
    dys: Any,
    lengths: Sequence[int],
) -> tuple[Any, Any | None, Any]:
    """Return the gradients ``(dhx, dcx, dxs)``; ``dcx`` is ``None`` except for LSTM.

    Args:
        states: As in :func:`rnn_forward_training`.
        direction_mode: See ``states``.
        rnn_mode: See ``states``.
        hx: See ``states``.
        cx: See ``states``.
        w: See ``states``.
        xs: See ``states``.
        lengths: See ``states``.
        ys: What it returned; the latter is changed for :func:`rnn_backward_weights`.
        reserve_space: See ``ys``.
        dhy: Gradients of its results.
        dcy: See ``dhy``.
        dys: See ``dhy``.
    """
    hx, cx, w, xs, ys, dhy, dcy, dys = _contiguous(hx, cx, w, xs, ys, dhy, dcy, dys)
    mode = CUDNN_FWD_MODE_TRAINING
    call = _call(states, direction_mode, rnn_mode, hx, xs, lengths, mode)
    lstm = rnn_mode == CUDNN_LSTM
    dxs = device.empty(xs.shape, xs.dtype)
    dhx = device.empty(hx.shape, hx.dtype)
    dcx = device.empty(hx.shape, hx.dtype) if lstm else None
    workspace = device.allocate(call.workspace)
    loaded().cudnnRNNBackwardData_v8(
        call.handle, call.rnn.value, call.lengths.data.ptr,
        call.y.value, ys.data.ptr, dys.data.ptr, call.x.value, dxs.data.ptr,
        call.h.value, hx.data.ptr, dhy.data.ptr, dhx.data.ptr,
        call.h.value, _address(cx), _address(dcy), _address(dcx),
        w.nbytes, w.data.ptr, call.workspace, workspace.ptr,
        reserve_space.nbytes, reserve_space.data.ptr,
    )  # fmt: skip
    return dhx, dcx, dxs


def rnn_backward_weights(
    states: DropoutStates,
    direction_mode: int,
    rnn_mode: int,
    xs: Any,
    hx: Any,
    ys: Any,
    w: Any,
    reserve_space: Any,
    lengths: Sequence[int],
) -> Any:
    """Return the gradient of ``w``, of its shape; to be called after :func:`rnn_backward_data`.

    For the arguments see there.
    """
    xs, hx, ys, w = _contiguous(xs, hx, ys, w)
    mode = CUDNN_FWD_MODE_TRAINING
    call = _call(states, direction_mode, rnn_mode, hx, xs, lengths, mode)
    dw = device.zeros(w.shape, w.dtype)  # cuDNN adds to it
    workspace = device.allocate(call.workspace)
    loaded().cudnnRNNBackwardWeights_v8(
        call.handle, call.rnn.value, CUDNN_WGRAD_MODE_ADD, call.lengths.data.ptr,
        call.x.value, xs.data.ptr, call.h.value, hx.data.ptr, call.y.value, ys.data.ptr,
        dw.nbytes, dw.data.ptr, call.workspace, workspace.ptr,
        reserve_space.nbytes, reserve_space.data.ptr,
    )  # fmt: skip
    return dw
