"""Recurrent networks: the setting, the descriptor, and where each weight lies.

Chainer knows the calls of older cuDNN versions, where a layer's input size comes from a tensor
descriptor. Here a descriptor is therefore configured once that is known, in
:func:`getRNNParamsSize`.
"""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from typing import Any

import numpy

from chainer_ooc.compat.cudnn import descriptors, math_mode
from chainer_ooc.compat.cudnn.constants import (
    CUDNN_DATA_DOUBLE,
    CUDNN_DATA_FLOAT,
    CUDNN_RNN_ALGO_STANDARD,
    CUDNN_RNN_DOUBLE_BIAS,
    CUDNN_RNN_PADDED_IO_DISABLED,
)
from chainer_ooc.compat.cudnn.descriptors import Descriptor
from chainer_ooc.compat.cudnn.library import loaded

__all__ = [
    "VARIABLE",
    "RNNDescriptor",
    "create_rnn_descriptor",
    "getRNNParamsSize",
    "get_rnn_lin_layer_bias_params",
    "get_rnn_lin_layer_matrix_params",
    "rnn_enabled",
]

#: Set to 1, Chainer's n-step networks run on cuDNN; they do not by default.
VARIABLE = "CHAINER_OOC_CUDNN_RNN"


def rnn_enabled() -> bool:
    """Return whether Chainer's n-step networks are to run on cuDNN: ``CHAINER_OOC_CUDNN_RNN=1``.

    Raises:
        ValueError: If the variable is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "").strip() or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE}={value!r} is not understood: use 1 (cuDNN) or 0 (without)")
    return value == "1"


#: All descriptors by address, for the calls that only get the address.
_by_address: weakref.WeakValueDictionary[int, RNNDescriptor] = weakref.WeakValueDictionary()


class RNNDescriptor(Descriptor):
    """A recurrent network's descriptor, to be configured with the size of its input.

    Args:
        hidden_size: Units of a layer and direction, number of layers.
        num_layers: See ``hidden_size``.
        dropout: Descriptor of the dropout between layers.
        input_mode: ``CUDNN_LINEAR_INPUT`` or ``CUDNN_SKIP_INPUT``; a direction; a kind of cell.
        direction: See ``input_mode``.
        mode: See ``input_mode``.
        dtype: Of all arrays.
        algo: ``CUDNN_RNN_ALGO_...``.
    """

    __slots__ = ("_configuration", "_dropout", "_dtype", "input_size")

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        dropout: Descriptor,
        input_mode: int,
        direction: int,
        mode: int,
        dtype: numpy.dtype,
        algo: int,
    ) -> None:
        super().__init__("RNN")
        self._dropout = dropout  # cuDNN keeps its address
        self._dtype = dtype
        self._configuration = (hidden_size, num_layers, input_mode, direction, mode, algo)
        self.input_size: int | None = None
        _by_address[self.value] = self

    def configure(self, input_size: int) -> None:
        """Tell cuDNN all about the network, given how many numbers a step of a sequence has."""
        hidden_size, num_layers, input_mode, direction, mode, algo = self._configuration
        dtype = self._dtype
        loaded().cudnnSetRNNDescriptor_v8(
            self.value,
            algo,
            mode,
            CUDNN_RNN_DOUBLE_BIAS,
            direction,
            input_mode,
            descriptors.get_data_type(dtype),
            CUDNN_DATA_DOUBLE if dtype.char == "d" else CUDNN_DATA_FLOAT,
            math_mode.math_type_for(dtype, math_mode.configured_tensor_core()),
            input_size,
            hidden_size,
            hidden_size,  # no projection
            num_layers,
            self._dropout.value,
            CUDNN_RNN_PADDED_IO_DISABLED,
        )
        self.input_size = input_size


def create_rnn_descriptor(
    hidden_size: int,
    num_layers: int,
    dropout_desc: Descriptor,
    input_mode: int,
    direction: int,
    mode: int,
    data_type: int,
    algo: int | None = None,
) -> RNNDescriptor:
    """Return a recurrent network's descriptor; for the arguments see :class:`RNNDescriptor`.

    ``data_type`` is a ``CUDNN_DATA_...`` value, ``algo`` is ``None`` for the standard one.
    """
    dtype = next(d for d in map(numpy.dtype, "efd") if descriptors.get_data_type(d) == data_type)
    algo = CUDNN_RNN_ALGO_STANDARD if algo is None else algo
    return RNNDescriptor(
        hidden_size, num_layers, dropout_desc, input_mode, direction, mode, dtype, algo
    )


def _dimensions(tensor: int, count: int) -> list[int]:
    """Return the first ``count`` dimensions of a tensor descriptor."""
    dims, strides = (ctypes.c_int * count)(), (ctypes.c_int * count)()
    data_type, found = ctypes.c_int(), ctypes.c_int()
    loaded().cudnnGetTensorNdDescriptor(
        tensor, count, ctypes.byref(data_type), ctypes.byref(found), dims, strides
    )
    return list(dims[: found.value])


def getRNNParamsSize(handle: int, rnnDesc: int, xDesc: int, dataType: int) -> int:
    """Return the bytes that a network's weights take.

    Args:
        handle: A cuDNN handle.
        rnnDesc: Address of a :func:`create_rnn_descriptor`.
        xDesc: Address of the tensor descriptor of one step: (batch, input size, 1).
        dataType: Ignored: the descriptor has it.
    """
    rnn = _by_address[rnnDesc]
    rnn.configure(_dimensions(xDesc, 4)[1])
    return loaded().size("cudnnGetRNNWeightSpaceSize", handle, rnnDesc)


def _weight_part(
    handle: int, rnn: RNNDescriptor, layer: int, w: Any, index: int, bias: bool
) -> Any:
    """Return the elements of ``w`` that hold one matrix or one bias vector, as a view."""
    matrix_desc, bias_desc = Descriptor("Tensor"), Descriptor("Tensor")
    matrix, vector = ctypes.c_void_p(), ctypes.c_void_p()
    loaded().cudnnGetRNNWeightParams(
        handle,
        rnn.value,
        layer,
        w.nbytes,
        w.data.ptr,
        index,
        matrix_desc.value,
        ctypes.byref(matrix),
        bias_desc.value,
        ctypes.byref(vector),
    )
    address = (vector if bias else matrix).value
    if address is None:
        raise ValueError(f"layer {layer} has no {'bias' if bias else 'matrix'} {index}")
    size = math.prod(_dimensions((bias_desc if bias else matrix_desc).value, 3))
    start = (address - w.data.ptr) // w.itemsize
    return w[start : start + size]


def get_rnn_lin_layer_matrix_params(
    handle: int,
    rnn_desc: RNNDescriptor,
    layer: int,
    x_desc: Descriptor,
    w_desc: Descriptor,
    w: Any,
    lin_layer_id: int,
) -> Any:
    """Return a view of one matrix of the weights.

    Args:
        handle: A cuDNN handle.
        rnn_desc: Configured by :func:`getRNNParamsSize`.
        layer: Layer x directions + direction.
        x_desc: Ignored: the descriptor has what they say.
        w_desc: See ``x_desc``.
        w: All weights, or their gradients: (size, 1, 1).
        lin_layer_id: Which matrix of the cell, inputs first.
    """
    return _weight_part(handle, rnn_desc, layer, w, lin_layer_id, bias=False)


def get_rnn_lin_layer_bias_params(
    handle: int,
    rnn_desc: RNNDescriptor,
    layer: int,
    x_desc: Descriptor,
    w_desc: Descriptor,
    w: Any,
    lin_layer_id: int,
) -> Any:
    """Return a view of one bias vector; see :func:`get_rnn_lin_layer_matrix_params`."""
    return _weight_part(handle, rnn_desc, layer, w, lin_layer_id, bias=True)
