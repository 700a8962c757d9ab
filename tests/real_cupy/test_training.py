"""Out-of-core training on real CuPy: every bit comes back, and each call is one that CuPy and CUDA allow."""

from __future__ import annotations

import gc

import pytest

import chainer_ooc
from tests.doubles import cuda_runtime
from tests.real_cupy.conftest import KIB

cupy = pytest.importorskip("cupy")

from tests.real_cupy.known_net import LAYOUTS, step  # noqa: E402

COUNT, NBYTES = 12, 256 * KIB


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
