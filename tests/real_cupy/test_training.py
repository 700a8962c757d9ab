"""Out-of-core training on real CuPy: every bit comes back, and each call is one that CuPy and CUDA allow."""

from __future__ import annotations

import contextlib
import gc
import weakref

import chainer
import chainer.functions as F
import pytest

import chainer_ooc
from tests.doubles import cuda_runtime
from tests.real_cupy.conftest import KIB

cupy = pytest.importorskip("cupy")

from tests.real_cupy.known_net import LAYOUTS, step  # noqa: E402

COUNT, NBYTES = 12, 256 * KIB
POOLINGS = {
    "max": lambda x: F.max_pooling_2d(x, 2),
    "max in 3-D": lambda x: F.max_pooling_nd(F.expand_dims(x, 2), (1, 2, 2)),
    "average": lambda x: F.average_pooling_nd(x, (2, 2)),
}


def used():
    gc.collect()
    return cupy.get_default_memory_pool().used_bytes()


@pytest.mark.parametrize("lag", [0, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("host_limit", [None, 0, 5 * NBYTES], ids=["pinned", "swap file", "both"])
def test_every_bit_comes_back(tmp_path, host_limit, layout, lag):
    cuda_runtime.setup(total=1 << 30, lag=lag)
    before, was_used = chainer_ooc.stats(), used()
    given = {"limit": 5 * NBYTES, "min_bytes": 1, "swap_dir": tmp_path, "host_limit": host_limit}
    with chainer_ooc.out_of_core_mode(**given):
        for _ in range(4):
            assert step(COUNT, NBYTES, layout) == dict.fromkeys(range(COUNT + 1), True)
    after = chainer_ooc.stats()
    assert after.bytes_out - before.bytes_out >= 4 * 5 * NBYTES
    assert after.bytes_in - before.bytes_in >= 4 * 5 * NBYTES
    assert used() == was_used


@pytest.mark.parametrize("limit", [None, 4 * KIB], ids=["in core", "out of core"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_graph_with_poolings_dies_without_the_garbage_collector(pooling, limit):
    cuda_runtime.reset()
    x = chainer.Variable(cupy.ones((2, 3, 8, 8), "f"))
    gc.collect()
    gc.disable()
    try:
        with contextlib.ExitStack() as stack:
            if limit is not None:
                stack.enter_context(chainer_ooc.out_of_core_mode(limit=limit, min_bytes=1))
            y = POOLINGS[pooling](F.relu(x))
            assert y.creator.is_cudnn_used
            alive = weakref.ref(y.creator)
            F.sum(y).backward()
            assert cuda_runtime.counts()["cudnnPoolingBackward"] == 1
            del y
            assert alive() is None
    finally:
        gc.enable()
