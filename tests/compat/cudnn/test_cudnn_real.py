"""The real library where it is installed: what it does without a GPU."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import itertools
import os
import subprocess
import sys

import cudnn_headers
import numpy
import pytest

pytestmark = pytest.mark.skipif(
    cudnn_headers.directory() is None, reason="needs an nvidia-cudnn-cu* wheel"
)


@pytest.fixture(scope="module")
def real():
    """The library and the modules that use it, which need no CuPy."""
    from chainer_ooc.compat.cudnn import descriptors, library

    for cuda in (12, 13):
        try:
            library._library = library.load(cuda)
            break
        except library.LibraryNotFoundError as error:
            problem = error
    else:
        pytest.skip(str(problem))
    yield library._library, descriptors
    caches = (descriptors.tensor, descriptors.filter_, descriptors.convolution, descriptors.pooling)
    for cache in caches:
        cache.cache_clear()
    gc.collect()
    library._library = None


def ints(*values):
    return (ctypes.c_int * len(values))(*values)


def output_shape(function, descriptors, ndim):
    """Call one of the functions that say what shape comes out."""
    result = ints(*[0] * ndim)
    function.argtypes = [ctypes.c_void_p] * len(descriptors) + [ctypes.c_int, ctypes.c_void_p]
    assert function(*[d.value for d in descriptors], ndim, result) == 0
    return tuple(result)


def test_it_is_cudnn_9(real):
    library, _ = real
    assert library.version // 10000 == 9 and library.cuda_version // 1000 in (12, 13)


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize(
    ("stride", "pad", "dilation", "groups"),
    list(itertools.product([(1, 1), (2, 3)], [(0, 0), (1, 2)], [(1, 1), (2, 1)], [1, 2])),
)
def test_convolution_shapes(real, layout, stride, pad, dilation, groups):
    library, descriptors = real
    x, w = (5, 8, 13, 17), (6, 8 // groups, 3, 2)
    raw = [(s[0], *s[2:], s[1]) if layout else s for s in (x, w)]
    found = output_shape(
        library._dll.cudnnGetConvolutionNdForwardOutputDim,
        [
            descriptors.convolution("f", pad, stride, dilation, groups, 3),
            descriptors.tensor("f", raw[0], layout),
            descriptors.filter_("f", raw[1], layout),
        ],
        4,
    )
    expected = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, p, s, d in zip(x[2:], w[2:], pad, stride, dilation, strict=True)
    )
    assert found == (5, 6, *expected)


def test_pooling_shapes(real):
    library, descriptors = real
    found = output_shape(
        library._dll.cudnnGetPoolingNdForwardOutputDim,
        [
            descriptors.pooling((3, 2, 1), (2, 1, 3), (1, 0, 0), 1),
            descriptors.tensor("d", (2, 3, 7, 6, 8)),
        ],
        5,
    )
    assert found == (2, 3, 4, 5, 3)


@pytest.mark.parametrize(("char", "kind"), [("f", 0), ("d", 1), ("e", 2)])
def test_tensor_descriptors_read_back(real, char, kind):
    library, descriptors = real
    for shape, layout, dims, strides in (
        ((2, 3, 4, 5), 0, [2, 3, 4, 5], [60, 20, 5, 1]),
        ((2, 4, 5, 3), 1, [2, 3, 4, 5], [60, 1, 15, 3]),
        ((7,), 0, [7, 1, 1, 1], [1, 1, 1, 1]),
        ((2, 3, 4, 5, 6), 0, [2, 3, 4, 5, 6], [360, 120, 30, 6, 1]),
    ):
        data_type, count, found, steps = (
            ctypes.c_int(),
            ctypes.c_int(),
            ints(*[0] * 8),
            ints(*[0] * 8),
        )
        library.cudnnGetTensorNdDescriptor(
            descriptors.tensor(char, shape, layout).value, 8, ctypes.byref(data_type),
            ctypes.byref(count), found, steps,
        )  # fmt: skip
        assert (data_type.value, count.value) == (kind, len(dims))
        assert (found[: len(dims)], steps[: len(dims)]) == (dims, strides)


def test_dropout_mask_size(real):
    """Sizes come back as size_t; a bit or more per element."""
    library, descriptors = real
    size = library.size(
        "cudnnDropoutGetReserveSpaceSize", descriptors.tensor("f", (64, 1000)).value
    )
    assert 64 * 1000 // 8 <= size <= 64 * 1000 * 4


def test_refusals_are_errors_with_the_librarys_words(real):
    _, descriptors = real
    from chainer_ooc.compat.cudnn.errors import CuDNNError

    with pytest.raises(CuDNNError, match=r"CUDNN_STATUS_BAD_PARAM \(2000\).*stride") as info:
        descriptors.convolution("f", (1, 1), (0, 1), (1, 1), 1, 3)
    assert info.value.bad_parameter
    with pytest.raises(CuDNNError, match="cudnnSetTensorNdDescriptor failed"):
        descriptors.tensor("f", (2, 0, 3, 4))


def test_handle_needs_a_gpu(real):
    library, _ = real
    from chainer_ooc.compat.cudnn.errors import CuDNNError

    try:
        handle = library.create("cudnnCreate")
    except CuDNNError as error:
        assert error.function == "cudnnCreate"
    else:
        library.cudnnDestroy(handle)


def test_spatial_transformer_and_rnn_descriptors(real):
    library, descriptors = real
    shape = numpy.array([2, 3, 4, 5], numpy.int32)
    transformer = descriptors.Descriptor("SpatialTransformer")
    library.cudnnSetSpatialTransformerNdDescriptor(transformer.value, 0, 0, 4, shape.ctypes.data)
    sequences = descriptors.Descriptor("RNNData")
    library.cudnnSetRNNDataDescriptor(sequences.value, 0, 1, 3, 3, 8, ints(3, 2, 1), None)
    network, dropout = descriptors.Descriptor("RNN"), descriptors.Descriptor("Dropout")
    # algorithm, LSTM, double bias, bidirectional, linear input, float, float, FMA; no projection
    library.cudnnSetRNNDescriptor_v8(
        network.value, 0, 2, 2, 1, 0, 0, 0, 3, 8, 16, 16, 2, dropout.value, 0
    )


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy")
@pytest.mark.parametrize("value", ["own", "off"])
def test_chainer_finds_the_modules(value):
    """The whole way: import hook, choice, library; in a process of its own: Chainer keeps it."""
    code = (
        "import chainer_ooc, chainer, chainer.backends.cuda as cuda\n"
        "name = getattr(getattr(cuda, 'cudnn', None), '__name__', None)\n"
        "print(cuda.cudnn_enabled, cuda._cudnn_version // 10000, name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CHAINER_OOC_CUDNN": value, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    expected = {
        "own": "True 9 chainer_ooc.compat.cudnn.cupy_cudnn",
        "off": "False -1 None",
    }
    assert done.stdout.strip() == expected[value], done.stderr[-2000:]
