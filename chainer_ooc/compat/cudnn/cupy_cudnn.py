"""What the import hook registers as ``cupy.cudnn``: CuPy 13's functions that Chainer calls."""

from __future__ import annotations

from typing import Any

from chainer_ooc.compat.cudnn import cupy_cuda_cudnn as _libcudnn  # loads cuDNN, or fails
from chainer_ooc.compat.cudnn import descriptors as _descriptors
from chainer_ooc.compat.cudnn import device as _device
from chainer_ooc.compat.cudnn.activation import (
    activation_backward,
    activation_forward,
    softmax_backward,
    softmax_forward,
)
from chainer_ooc.compat.cudnn.convolution import (
    convolution_backward_data,
    convolution_backward_filter,
    convolution_forward,
)
from chainer_ooc.compat.cudnn.descriptors import Descriptor, get_data_type
from chainer_ooc.compat.cudnn.dropout import DropoutStates
from chainer_ooc.compat.cudnn.handles import get_handle
from chainer_ooc.compat.cudnn.math_mode import (
    get_math_mode,
    is_tensor_core_available,
    set_math_mode,
)
from chainer_ooc.compat.cudnn.normalization import (
    batch_normalization_backward,
    batch_normalization_forward_inference,
    batch_normalization_forward_training,
    batch_normalization_forward_training_ex,
)
from chainer_ooc.compat.cudnn.pooling import pooling_backward, pooling_forward
from chainer_ooc.compat.cudnn.rnn import (
    rnn_backward_data,
    rnn_backward_weights,
    rnn_forward_inference,
    rnn_forward_training,
)
from chainer_ooc.compat.cudnn.rnn_weights import (
    create_rnn_descriptor,
    get_rnn_lin_layer_bias_params,
    get_rnn_lin_layer_matrix_params,
    rnn_enabled,
)
from chainer_ooc.compat.cudnn.spatial import create_spatial_transformer_descriptor
from chainer_ooc.compat.cudnn.workspace import get_max_workspace_size, set_max_workspace_size

__all__ = [
    "DropoutStates",
    "activation_backward",
    "activation_forward",
    "batch_normalization_backward",
    "batch_normalization_forward_inference",
    "batch_normalization_forward_training",
    "batch_normalization_forward_training_ex",
    "convolution_backward_data",
    "convolution_backward_filter",
    "convolution_forward",
    "create_filter_descriptor",
    "create_rnn_descriptor",
    "create_spatial_transformer_descriptor",
    "create_tensor_descriptor",
    "create_tensor_nd_descriptor",
    "get_data_type",
    "get_handle",
    "get_math_mode",
    "get_max_workspace_size",
    "get_rnn_lin_layer_bias_params",
    "get_rnn_lin_layer_matrix_params",
    "is_tensor_core_available",
    "pooling_backward",
    "pooling_forward",
    "rnn_backward_data",
    "rnn_backward_weights",
    "rnn_enabled",
    "rnn_forward_inference",
    "rnn_forward_training",
    "set_math_mode",
    "set_max_workspace_size",
    "softmax_backward",
    "softmax_forward",
]


def create_tensor_descriptor(arr: Any, format: int = _libcudnn.CUDNN_TENSOR_NCHW) -> Descriptor:
    """Return the descriptor of a C-contiguous array; keep it while its ``value`` is used.

    Args:
        arr: The array, in the layout that ``format`` says.
        format: ``CUDNN_TENSOR_NCHW`` or ``CUDNN_TENSOR_NHWC``.

    Raises:
        ValueError: If the array is not C-contiguous.
        TypeError: If its dtype is not float16, float32 or float64.
    """
    _device.check_contiguous(arr, "the array")
    return _descriptors.tensor_of(arr, format)


def create_tensor_nd_descriptor(arr: Any) -> Descriptor:
    """Return the descriptor of a C-contiguous array of any number of dimensions."""
    return create_tensor_descriptor(arr)


def create_filter_descriptor(arr: Any, format: int = _libcudnn.CUDNN_TENSOR_NCHW) -> Descriptor:
    """Return the filter descriptor of a C-contiguous array: (out, in, k...) or (out, k..., in)."""
    _device.check_contiguous(arr, "the array")
    return _descriptors.filter_of(arr, format)
