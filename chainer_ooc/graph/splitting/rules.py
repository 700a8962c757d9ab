"""One rule per function that can run in pieces: what a piece is, what memory it takes, how to run it.

Rules call stock Chainer's own method with fewer images, channels or groups.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from chainer_ooc.graph.splitting import gemm
from chainer_ooc.graph.splitting.pieces import Arrays, Work, patch

__all__ = ["install"]


def install() -> None:
    """Patch Chainer's functions that can run in pieces. Later calls do nothing."""
    from chainer.functions.array import resize_images, spatial_transformer_sampler
    from chainer.functions.connection import (
        convolution_2d,
        convolution_nd,
        deconvolution_2d,
        deconvolution_nd,
    )
    from chainer.functions.normalization import local_response_normalization as lrn
    from chainer.functions.pooling import (
        average_pooling_2d,
        average_pooling_nd,
        max_pooling_nd,
        unpooling_2d,
        unpooling_nd,
        upsampling_2d,
    )

    two, several = "_forward_cpu_core", "_forward_xp_core"
    patch(convolution_2d.Convolution2DFunction, two, _convolution)
    patch(convolution_nd.ConvolutionND, several, _convolution)
    patch(deconvolution_2d.Deconvolution2DFunction, two, _deconvolution)
    patch(deconvolution_nd.DeconvolutionND, several, _deconvolution)
    patch(convolution_2d.Convolution2DGradW, two, _weight_gradient)
    patch(convolution_nd.ConvolutionNDGradW, several, _weight_gradient)
    two, several = "_forward_grouped_convolution", "_forward_grouped_convolution_xp"
    patch(convolution_2d.Convolution2DFunction, two, _grouped_convolution)
    patch(convolution_nd.ConvolutionND, several, _grouped_convolution)
    patch(deconvolution_2d.Deconvolution2DFunction, two, _grouped_deconvolution)
    patch(deconvolution_nd.DeconvolutionND, several, _grouped_deconvolution)
    patch(convolution_2d.Convolution2DGradW, two, _grouped_weight_gradient)
    patch(convolution_nd.ConvolutionNDGradW, several, _grouped_weight_gradient)
    patch(max_pooling_nd.MaxPoolingND, "forward_cpu", _max_pooling)
    patch(max_pooling_nd.MaxPoolingNDGrad, "forward_cpu", _max_pooling_gradient)
    patch(max_pooling_nd.MaxPoolingNDWithIndexes, "forward_cpu", _pooling_by_indexes)
    patch(upsampling_2d.Upsampling2D, "forward_cpu", _upsampling)
    patch(upsampling_2d.Upsampling2DGrad, "forward_cpu", _pooling_by_indexes)
    patch(average_pooling_2d.AveragePooling2D, "forward_cpu", _average_pooling)
    patch(average_pooling_2d.AveragePooling2DGrad, "forward_cpu", _average_pooling_gradient)
    patch(average_pooling_nd.AveragePoolingND, "forward_cpu", _average_pooling)
    patch(average_pooling_nd.AveragePoolingNDGrad, "forward_cpu", _average_pooling_gradient)
    patch(unpooling_2d.Unpooling2D, "forward", _unpooling)
    patch(unpooling_2d.Unpooling2DGrad, "forward", _unpooling_gradient)
    patch(unpooling_nd.UnpoolingND, "forward", _unpooling)
    patch(unpooling_nd.UnpoolingNDGrad, "forward", _unpooling_gradient)
    patch(lrn.LocalResponseNormalization, "forward_cpu", _normalization)
    patch(lrn.LocalResponseNormalizationGrad, "forward_cpu", _normalization_gradient)
    patch(resize_images.ResizeImagesGrad, "forward", _resizing_gradient)
    sampler = spatial_transformer_sampler.SpatialTransformerSampler
    patch(sampler, "forward_cpu", _sampling)
    patch(sampler, "backward_cpu", _sampling_gradient)


def _convolution(stock: Any, self: Any, x: Any, W: Any, b: Any, *xp: Any) -> Work:
    outs = _out_sizes(self, x, W.shape[2:])
    dtype = np.result_type(x, W)
    rows, depth, columns = math.prod(outs), math.prod(W.shape[1:]), len(W)
    return Work(
        len(x),
        # The padded image, its patches, the patches in order, and the result.
        _frame(self, x.shape) * x.itemsize
        + rows * (2 * depth * x.itemsize + columns * 2 * dtype.itemsize),
        len(x) * rows * columns * x.itemsize,
        lambda i, j: stock(self, x[i:j], W, b, *xp),
        product=gemm.Product("rows", rows, depth, columns, dtype),
    )


def _deconvolution(stock: Any, self: Any, x: Any, W: Any, b: Any, *xp: Any) -> Work:
    columns, depth, rows = math.prod(x.shape[2:]), len(W), math.prod(W.shape[1:])
    dtype = np.result_type(x, W)
    outs = (self.outh, self.outw) if hasattr(self, "outh") else self.outs
    stride, pad = _window(self)
    frame = zip(outs, pad, stride, strict=True)
    out = W.shape[1] * math.prod(n + 2 * p + s - 1 for n, p, s in frame) * x.itemsize
    return Work(
        len(x),
        columns * (rows * 2 * dtype.itemsize + depth * x.itemsize) + 2 * out,
        len(x) * out,
        lambda i, j: stock(self, x[i:j], W, b, *xp),
        product=gemm.Product("columns", columns, depth, rows, dtype),
    )


def _weight_gradient(stock: Any, self: Any, x: Any, gy: Any, *xp: Any) -> Work:
    taps, depth = math.prod(_kernel(self)), len(gy) * math.prod(gy.shape[2:])
    dtype = np.result_type(x, gy)
    return Work(
        x.shape[1],
        len(x) * _frame(self, x.shape) // x.shape[1] * x.itemsize + 2 * depth * taps * x.itemsize,
        gy.shape[1] * x.shape[1] * taps * dtype.itemsize + gy.nbytes,
        lambda i, j: stock(self, x[:, i:j], gy, *xp),
        axis=1,
        product=gemm.Product("columns", taps, depth, gy.shape[1], dtype),
    )


def _by_groups(
    rule: Callable[..., Work], axes: tuple[int, ...], axis: int, stock: Any, self: Any, *args: Any
) -> Work | None:
    """Return the work of a convolution whose groups are separate products.

    ``rule`` returns the work of one group. The groups lie along ``axes`` of the arguments and along
    ``axis`` of the result.
    """
    count, others = self.groups, args[len(axes) :]
    if count == 1:  # one group of a convolution that is in pieces
        return rule(stock, self, *args)
    arrays = list(zip(args, axes, strict=False))
    if any(a is not None and a.shape[n] % count for a, n in arrays):
        return None

    def part(i: int, j: int) -> list[Any]:
        node = _stripped(self)
        node.groups = j - i
        return [node, *(_cut(a, n, i, j, count) for a, n in arrays), *others]

    def run(i: int, j: int) -> Arrays:
        # A single group may still be too large.
        call = getattr(type(self), stock.__name__) if j - i == 1 else stock
        return call(*part(i, j))

    one = rule(stock, *part(0, 1))
    size, out = one.units * one.unit_bytes, count * one.out_bytes
    return Work(count, size, out, run, axis, order=one.order)


def _cut(array: Any, axis: int, start: int, stop: int, units: int) -> Any:
    if array is None:
        return None
    each = array.shape[axis] // units
    return array[(slice(None),) * axis + (slice(start * each, stop * each),)]


def _group_convolution(stock: Any, self: Any, x: Any, *args: Any) -> Work:
    work = _convolution(stock, self, x, *args)
    product = work.product and work.product._replace(side="columns")
    return work._replace(product=product, order=(1, 0, *range(2, x.ndim)))


def _group_weight_gradient(stock: Any, self: Any, x: Any, *args: Any) -> Work:
    return _weight_gradient(stock, self, x, *args)._replace(order=tuple(range(x.ndim)))


_grouped_convolution = functools.partial(_by_groups, _group_convolution, (1, 0, 0), 1)
_grouped_deconvolution = functools.partial(_by_groups, _deconvolution, (1, 0, 0), 1)
_grouped_weight_gradient = functools.partial(_by_groups, _group_weight_gradient, (1, 1), 0)


def _max_pooling(stock: Any, self: Any, inputs: Any) -> Work:
    (x,) = inputs
    outs = x.shape[1] * math.prod(_out_sizes(self, x, self.ksize))
    names = ("indexes",)

    def run(i: int, j: int) -> Arrays:
        (y,) = stock(self, (x[i:j],))
        self._in_shape = x.shape
        return y, *_taken(self, names)

    each = x.itemsize + np.dtype(np.intp).itemsize
    # The padded image, its patches, the patches in argmax's order, and both results.
    taps = 2 * math.prod(self.ksize)
    temporary = _frame(self, x.shape) * x.itemsize + outs * (taps * x.itemsize + each)
    return Work(len(x), temporary, len(x) * outs * each, run, names=names)


def _max_pooling_gradient(stock: Any, self: Any, inputs: Any) -> Work | None:
    (gy,) = inputs
    func = self.func
    indexes = func.indexes
    if type(indexes) is not np.ndarray:
        return None

    def run(i: int, j: int) -> Arrays:
        part = _stripped(func)
        part.indexes, part._in_shape = indexes[i:j], (j - i, *func._in_shape[1:])
        return stock(SimpleNamespace(func=part), (gy[i:j],))

    out = _frame(func, func._in_shape) * gy.itemsize
    each = math.prod(func.ksize) * gy.itemsize + 3 * indexes.itemsize + gy.itemsize
    return Work(len(gy), gy[0].size * each + out, len(gy) * out, run)


def _pooling_by_indexes(stock: Any, self: Any, inputs: Any) -> Work | None:
    (x,) = inputs
    func = self if hasattr(self, "indexes") else self.func
    indexes = func.indexes
    if type(indexes) is not np.ndarray:
        return None

    def run(i: int, j: int) -> Arrays:
        part = _stripped(func)
        part.indexes = indexes[i:j]
        return stock(part if func is self else SimpleNamespace(func=part), (x[i:j],))

    outs = indexes[0].size
    # The padded image, its patches, the patches in the indexes' order, the places of the indexes, and the result.
    each = 2 * math.prod(_kernel(func)) * x.itemsize + 2 * indexes.itemsize + x.itemsize
    temporary = _frame(func, x.shape) * x.itemsize + outs * each
    return Work(len(x), temporary, indexes.size * x.itemsize, run)


def _upsampling(stock: Any, self: Any, inputs: Any) -> Work | None:
    (x,) = inputs
    indexes = self.indexes
    if type(indexes) is not np.ndarray:
        return None

    def run(i: int, j: int) -> Arrays:
        part = _stripped(self)
        part.indexes = indexes[i:j]
        results = stock(part, (x[i:j],))
        self.outh, self.outw, self._in_dtype = part.outh, part.outw, part._in_dtype
        return results

    out = _frame(self, (*x.shape[:2], *_unpooled_sizes(self, x))) * x.itemsize
    each = 2 * self.kh * self.kw * x.itemsize + 2 * indexes.itemsize + x.itemsize
    return Work(len(x), x[0].size * each + out, len(x) * out, run)


def _average_pooling(stock: Any, self: Any, inputs: Any) -> Work:
    def piece(self: Any, part: Arrays) -> Arrays:
        results = stock(self, part)
        self._in_shape = inputs[0].shape
        return results

    return _sums_of_patches(piece, self, inputs)


def _unpooling_gradient(stock: Any, self: Any, inputs: Any) -> Work | None:
    if getattr(self, "_use_int_scale_forward", False):
        return None  # no patches
    return _sums_of_patches(stock, self, inputs)


def _sums_of_patches(stock: Any, self: Any, inputs: Any) -> Work:
    (x,) = inputs
    kernel = _kernel(self)
    outs = x.shape[1] * math.prod(_out_sizes(self, x, kernel))
    temporary = _frame(self, x.shape) + outs * (math.prod(kernel) + 2)
    return Work(
        len(x),
        temporary * x.itemsize,
        len(x) * outs * x.itemsize,
        lambda i, j: stock(self, (x[i:j],)),
    )


def _average_pooling_gradient(stock: Any, self: Any, inputs: Any) -> Work:
    func = getattr(self, "func", self)
    return _spread_patches(stock, self, inputs, func, func._in_shape[2:])


def _unpooling(stock: Any, self: Any, inputs: Any) -> Work | None:
    (x,) = inputs
    sizes = _unpooled_sizes(self, x)
    if hasattr(self, "kh"):
        pads = self.ph, self.pw
        repeated = [k * (n - p) for k, n, p in zip(_kernel(self), x.shape[2:], pads, strict=True)]
        strides = self.sx, self.sy  # in this order
        if sizes == repeated and strides == _kernel(self) and not any(p % 2 for p in pads):
            return None  # no patches
    return _spread_patches(stock, self, inputs, self, sizes)


def _spread_patches(stock: Any, self: Any, inputs: Any, func: Any, sizes: Sequence[int]) -> Work:
    (x,) = inputs
    out = _frame(func, (*x.shape[:2], *sizes)) * x.itemsize
    kernel = _kernel(func)
    patches = x[0].nbytes * math.prod(kernel)
    return Work(
        len(x),
        # The input in order; patches, made by repeating those of one dimension less, and then the padded result.
        x[0].nbytes + patches + max(patches // kernel[-1], out),
        len(x) * out,
        lambda i, j: stock(self, (x[i:j],)),
    )


def _normalization(stock: Any, self: Any, inputs: Any) -> Work:
    (x,) = inputs
    names = ("unit_scale", "scale")

    def run(i: int, j: int) -> Arrays:
        (y,) = stock(self, (x[i:j],))
        return y, *_taken(self, names)

    # Squares, their sums, and three results; before the last of them a product that may be a temporary.
    return Work(len(x), 5 * x[0].nbytes, 3 * x.nbytes, run, names=names)


def _normalization_gradient(stock: Any, self: Any, inputs: Any) -> Work:
    scale, unit_scale = self.scale, self.unit_scale

    def run(i: int, j: int) -> Arrays:
        part = _stripped(self)
        part.scale, part.unit_scale = scale[i:j], unit_scale[i:j]
        return stock(part, tuple(array[i:j] for array in inputs))

    # The summands, their sums, two products, and the result or the product before it.
    x = inputs[0]
    return Work(len(x), 5 * x[0].nbytes, x.nbytes, run)


def _resizing_gradient(stock: Any, self: Any, inputs: Any) -> Work:
    (gy,) = inputs
    size = math.prod(self.input_shape[1:])
    # Four shares of each element, their places, and both in the types in which bincount sums.
    each = 4 * (gy.itemsize + np.dtype(np.intp).itemsize + np.dtype(float).itemsize)
    temporary = gy[0].size * each + size * (np.dtype(float).itemsize + gy.itemsize)
    out = len(gy) * size * gy.itemsize
    return Work(len(gy), temporary, out, lambda i, j: stock(self, (gy[i:j],)))


def _sampling(stock: Any, self: Any, inputs: Any) -> Work:
    x, grid = inputs
    out = x.shape[1] * math.prod(grid.shape[2:]) * x.itemsize
    # The padded image, four neighbours of each point, one of them twice, a product, and the sum; some 16 numbers of
    # each point.
    temporary = x[0].nbytes + 7 * out + 8 * grid[0].nbytes
    return Work(len(x), temporary, len(x) * out, lambda i, j: stock(self, (x[i:j], grid[i:j])))


def _sampling_gradient(stock: Any, self: Any, inputs: Any, grad_outputs: Any) -> Work | None:
    (x, grid), (gy,) = inputs, grad_outputs
    if x.flags.fnc:
        return None  # the whole's gradient has another memory order than a piece's

    def run(i: int, j: int) -> Arrays:
        return stock(self, (x[i:j], grid[i:j]), (gy[i:j],))

    # The same, two gradients for each neighbourhood, and the padded result.
    temporary = 2 * x[0].nbytes + 8 * gy[0].nbytes + 8 * grid[0].nbytes
    return Work(len(x), temporary, x.nbytes + grid.nbytes, run)


def _taken(func: Any, names: tuple[str, ...]) -> Arrays:
    """Take the named arrays out of a function: it must not keep a piece's while the next piece is made."""
    arrays = tuple(getattr(func, name) for name in names)
    for name in names:
        setattr(func, name, None)
    return arrays


def _stripped(func: Any) -> Any:
    """Return a plain object with a function's attributes, on which a piece may set its own."""
    return SimpleNamespace(**copy.copy(func.__dict__))


def _kernel(func: Any) -> tuple[int, ...]:
    return (func.kh, func.kw) if hasattr(func, "kh") else func.ksize


def _window(func: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the strides and the paddings of a function."""
    if hasattr(func, "sy"):
        return (func.sy, func.sx), (func.ph, func.pw)
    return func.stride, func.pad


def _out_sizes(func: Any, x: Any, kernel: Any) -> list[int]:
    from chainer.utils.conv import get_conv_outsize

    stride, pad = _window(func)
    dilate = (func.dy, func.dx) if hasattr(func, "dy") else getattr(func, "dilate", None)
    dilate = dilate or (1,) * len(stride)
    numbers = zip(x.shape[2:], kernel, stride, pad, dilate, strict=True)
    return [get_conv_outsize(n, k, s, p, func.cover_all, d) for n, k, s, p, d in numbers]


def _unpooled_sizes(func: Any, x: Any) -> list[int]:
    from chainer.utils.conv import get_deconv_outsize

    outs = (func.outh, func.outw) if hasattr(func, "outh") else func.outs
    if outs is not None and None not in outs:
        return list(outs)
    numbers = zip(x.shape[2:], _kernel(func), *_window(func), strict=True)
    return [get_deconv_outsize(n, k, s, p, func.cover_all) for n, k, s, p in numbers]


def _frame(func: Any, shape: tuple[int, ...]) -> int:
    stride, pad = _window(func)
    sizes = zip(shape[2:], stride, pad, strict=True)
    return shape[1] * math.prod(n + 2 * p + s - 1 for n, s, p in sizes)
