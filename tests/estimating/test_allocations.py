"""The peak of what Chainer's functions allocate, forward and backward, is what NumPy tells tracemalloc."""

from __future__ import annotations

import tracemalloc

import chainer
import chainer.functions as F
import numpy as np
import pytest

from chainer_ooc.estimating.ledger import Ledger
from chainer_ooc.estimating.shape_array import new
from chainer_ooc.estimating.without_data import without_data

IMAGES = (8, 16, 48, 48)

FUNCTIONS = {
    "convolution": (lambda x, w: F.convolution_2d(x, w, pad=1), IMAGES, (8, 16, 3, 3)),
    "convolution strided": (lambda x, w: F.convolution_2d(x, w, stride=2), IMAGES, (8, 16, 5, 5)),
    "convolution dilated": (lambda x, w: F.convolution_2d(x, w, dilate=2), IMAGES, (8, 16, 3, 3)),
    "convolution in groups": (lambda x, w: F.convolution_2d(x, w, groups=4), IMAGES, (16, 4, 3, 3)),
    "convolution 3d": (lambda x, w: F.convolution_nd(x, w, pad=1), (2, 4, 12, 12, 12), (8, 4, 3, 3, 3)),
    "deconvolution": (lambda x, w: F.deconvolution_2d(x, w, stride=2), IMAGES, (16, 8, 3, 3)),
    "linear": (lambda x, w: F.linear(x, w), IMAGES, (64, 16 * 48 * 48)),
    "batch normalization": (lambda x, g: F.batch_normalization(x, g, g), IMAGES, (16,)),
    "max pooling": (lambda x: F.max_pooling_2d(x, 3, 2), IMAGES),
    "average pooling": (lambda x: F.average_pooling_2d(x, 2), IMAGES),
    "normalization": (lambda x: F.local_response_normalization(x), IMAGES),
    "dropout": (lambda x: F.dropout(F.relu(x)), IMAGES),
    "concat": (lambda x, y: F.concat((x, F.sigmoid(y))), IMAGES, IMAGES),
    "softmax": (lambda x: F.log_softmax(x), (512, 1000)),
    "matmul": (lambda x, y: F.matmul(x, y, transb=True), (8, 64, 96), (8, 80, 96)),
    "lstm": (lambda c, x: F.lstm(c, x)[1], (64, 256), (64, 1024)),
    "sum": (lambda x: F.sum(F.exp(x) * x, axis=(0, 2)), IMAGES),
    "resize": (lambda x: F.resize_images(x, (64, 64)), IMAGES),
}  # fmt: skip

#: NumPy may compute the last operation of an expression into an operand that nobody refers to any more: one array
#: less at the peak. It does where it finds the interpreter's loop on the call stack: not where that is made of tail
#: calls, as in some builds of Python 3.14.
REUSED = {"normalization", "concat"}


def step(function, arrays, ones):
    """Forward and backward."""
    leaves = [chainer.Variable(a) for a in arrays]
    y = F.identity(function(*[F.identity(x) for x in leaves]))
    y.grad = ones(y)
    y.backward()


def peak(function):
    """The most bytes that a call takes, those of Python's own objects and ufuncs' buffers included."""
    function()  # what is made once
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    function()
    most = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return most


@pytest.fixture(scope="module")
def reuses():
    """Whether NumPy does."""
    array = np.ones(1 << 20, np.float32)
    arrays = peak(lambda: array * array + array) / array.nbytes
    assert arrays == pytest.approx(round(arrays), rel=0.01)
    return {1: True, 2: False}[round(arrays)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_peak(name, reuses):
    function, *shapes = FUNCTIONS[name]
    arrays = [np.random.rand(*shape).astype(np.float32) for shape in shapes]
    measured = peak(lambda: step(function, arrays, lambda y: np.ones_like(y.array)))
    if name in REUSED and reuses:
        measured += arrays[0].nbytes

    ledger = Ledger()
    with without_data(ledger):
        arrays = [new(shape, np.float32, ledger) for shape in shapes]
        before = ledger.live_bytes
        step(function, arrays, lambda y: np.ones_like(y.array))
    foreseen = ledger.peak_bytes - before
    assert foreseen == pytest.approx(measured, rel=0.01, abs=128 << 10)
