"""What functions keep for backward and take while they run with cuDNN, where that differs from NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from chainer_ooc.estimating import shape_array
from chainer_ooc.estimating.errors import EstimateError

__all__ = ["keep_as_cudnn", "runs_again", "takes_workspace", "workspace_limit"]


def keep_as_cudnn(function: Any) -> None:
    """Make a function that ran on NumPy's code keep the arrays that it would keep with cuDNN.

    Poolings keep their input and output; NumPy's max pooling keeps the indexes of the maxima instead.
    """
    from chainer.functions.pooling import pooling_2d, pooling_nd

    if isinstance(function, pooling_2d.Pooling2D | pooling_nd._PoolingND):
        function._input_indexes_to_retain = (0,)
        function._output_indexes_to_retain = (0,)
        indexes = function.__dict__.get("indexes")
        if isinstance(indexes, np.ndarray):
            axes = shape_array.layout_axes(indexes)
            function.indexes = shape_array.new(
                indexes.shape, indexes.dtype, shape_array._detached, axes
            )


def workspace_limit() -> int:
    """Return the most workspace that a convolution takes with the cuDNN modules as they are set now (bytes).

    Raises:
        EstimateError: If the environment's setting is not understood: Chainer would run without cuDNN.
    """
    try:
        from chainer_ooc.compat.cudnn import workspace
    except ImportError as error:
        raise EstimateError(str(error)) from error
    return workspace.get_max_workspace_size()


def takes_workspace(label: str) -> bool:
    """Return whether cuDNN takes a workspace for a function."""
    return "onvolution" in label or "RNN" in label or "LSTM" in label or "GRU" in label


def runs_again(function: Any) -> bool:
    """Return whether a function that can run again on NumPy's code can do so with cuDNN and cuBLAS, too.

    Their products may have other bits each time, unless ``chainer.config.cudnn_deterministic``. cuDNN's batch
    normalization has no statistics to normalize with once more.
    """
    import chainer
    from chainer.functions.connection import (
        convolution_2d,
        convolution_nd,
        deconvolution_2d,
        deconvolution_nd,
        linear,
    )
    from chainer.functions.normalization import batch_normalization

    products = (
        *(convolution_2d.Convolution2DFunction, deconvolution_2d.Deconvolution2DFunction),
        *(convolution_nd.ConvolutionND, deconvolution_nd.DeconvolutionND, linear.LinearFunction),
    )
    if isinstance(function, products):
        return bool(chainer.config.cudnn_deterministic)
    return not isinstance(function, batch_normalization.BatchNormalization)
