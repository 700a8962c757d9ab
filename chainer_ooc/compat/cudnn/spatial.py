"""Spatial transformer: descriptor, grid generator and bilinear sampler, as Chainer calls them."""

from __future__ import annotations

import ctypes
from typing import Any

from chainer_ooc.compat.cudnn.descriptors import Descriptor, get_data_type
from chainer_ooc.compat.cudnn.library import loaded

__all__ = [
    "create_spatial_transformer_descriptor",
    "spatialTfGridGeneratorBackward",
    "spatialTfGridGeneratorForward",
    "spatialTfSamplerBackward",
    "spatialTfSamplerForward",
]


def create_spatial_transformer_descriptor(
    sampler_type: int, dtype: Any, nb_dims: int, dim_A: int
) -> Descriptor:
    """Return a spatial transformer descriptor.

    Args:
        sampler_type: ``CUDNN_SAMPLER_BILINEAR``.
        dtype: Of the images.
        nb_dims: Number of dimensions of the output, 4.
        dim_A: Address of ``nb_dims`` C ints: the output's shape (n, c, h, w).
    """
    descriptor = Descriptor("SpatialTransformer")
    # cuDNN copies the sizes, but the caller's memory need not outlive this statement.
    sizes = (ctypes.c_int * nb_dims).from_address(dim_A)
    loaded().cudnnSetSpatialTransformerNdDescriptor(
        descriptor.value, sampler_type, get_data_type(dtype), nb_dims, sizes
    )
    return descriptor


def spatialTfGridGeneratorForward(handle: int, stDesc: int, theta: int, grid: int) -> None:
    """Write the sampling grid (n, h, w, 2) of affine matrices (n, 2, 3); all are addresses."""
    loaded().cudnnSpatialTfGridGeneratorForward(handle, stDesc, theta, grid)


def spatialTfGridGeneratorBackward(handle: int, stDesc: int, dgrid: int, dtheta: int) -> None:
    """Write the gradient of the matrices (n, 2, 3) for that of the grid (n, h, w, 2)."""
    loaded().cudnnSpatialTfGridGeneratorBackward(handle, stDesc, dgrid, dtheta)


def spatialTfSamplerForward(
    handle: int,
    stDesc: int,
    alpha: int,
    xDesc: int,
    x: int,
    grid: int,
    beta: int,
    yDesc: int,
    y: int,
) -> None:
    """Sample images at a grid; addresses throughout, those of blend factors on the host."""
    loaded().cudnnSpatialTfSamplerForward(handle, stDesc, alpha, xDesc, x, grid, beta, yDesc, y)


def spatialTfSamplerBackward(
    handle: int,
    stDesc: int,
    alpha: int,
    xDesc: int,
    x: int,
    beta: int,
    dxDesc: int,
    dx: int,
    alphaDgrid: int,
    dyDesc: int,
    dy: int,
    grid: int,
    betaDgrid: int,
    dgrid: int,
) -> None:
    """Write the gradients of the sampler's images and grid; addresses as in the forward call."""
    loaded().cudnnSpatialTfSamplerBackward(
        handle, stDesc, alpha, xDesc, x, beta, dxDesc, dx,
        alphaDgrid, dyDesc, dy, grid, betaDgrid, dgrid,
    )  # fmt: skip
