"""Training out of core on a GPU: the bits of stock Chainer, the limit held, shortages survived."""

from __future__ import annotations

import contextlib
import gc

import numpy as np
import pytest

from tests.doubles import cuda_runtime

cupy = pytest.importorskip("cupy", exc_type=ImportError)

pytestmark = pytest.mark.on_double
MIB = 1 << 20


@pytest.fixture
def clean(chainer_gpu):
    """Start with an empty pool; end with out-of-core mode off and the pool's limit as it was."""
    import chainer_ooc

    pool = cupy.get_default_memory_pool()
    limit = pool.get_limit()
    gc.collect()
    pool.free_all_blocks()
    yield pool
    chainer_ooc.disable()
    pool.set_limit(size=limit)
    gc.collect()
    pool.free_all_blocks()


def network(chainer, depth=12, width=32):
    links, functions = chainer.links, chainer.functions

    class Net(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.first = links.Convolution2D(3, width, 3, pad=1)
                self.blocks = chainer.ChainList(
                    *[links.Convolution2D(width, width, 3, pad=1) for _ in range(depth)]
                )
                self.norms = chainer.ChainList(
                    *[links.BatchNormalization(width) for _ in range(depth)]
                )
                self.last = links.Linear(None, 10)

        def __call__(self, x, t):
            h = self.first(x)
            for block, norm in zip(self.blocks, self.norms, strict=True):
                h = functions.relu(norm(block(h))) + functions.dropout(h, 0.1)
            h = functions.average_pooling_2d(functions.max_pooling_2d(h, 2), 2)
            return functions.softmax_cross_entropy(self.last(h), t)

    return Net()


def assert_equal_bits(ours, stock):
    """Compare what :func:`train` returns. Where nothing is computed, losses are what memory held before."""
    assert len(ours) == len(stock)
    assert ours == stock or cuda_runtime.is_installed()


class InUse(cupy.cuda.MemoryHook):
    """The most bytes of the pool that were in use at one time: cached blocks do not count."""

    name = "InUse"
    peak = 0

    def malloc_postprocess(self, **_given):
        self.peak = max(self.peak, cupy.get_default_memory_pool().used_bytes())


def in_core(chainer, **given):
    """Train with stock Chainer; return what :func:`train` does, with the memory in use in the place of the pool's.

    Graphs are cycles of references after backward. The collector comes in time, as it does when memory is short.
    """
    with InUse() as in_use:
        results, _ = train(chainer, contextlib.nullcontext(), after=gc.collect, **given)
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    return results, in_use.peak


def train(chainer, mode, steps=3, batch=16, size=64, depth=12, after=lambda: None):
    """Train; return losses and parameters in host memory, and the pool's peak. Call ``after`` after each graph."""
    pool = cupy.get_default_memory_pool()
    np.random.seed(0)
    cupy.random.seed(0)
    net = network(chainer, depth)
    net.to_device("@cupy:0")
    optimizer = chainer.optimizers.MomentumSGD(0.01).setup(net)
    x = cupy.asarray(np.random.rand(batch, 3, size, size).astype("f"))
    t = cupy.asarray(np.arange(batch) % 10, dtype="i")
    results, peak = [], 0
    with chainer.using_config("cudnn_deterministic", True), mode:
        for _ in range(steps):
            optimizer.update(net, x, t)
            after()
            results.append(float(net(x, t).array))
            after()
            peak = max(peak, pool.total_bytes())
    return results + [cupy.asnumpy(p.array).tobytes() for p in net.params()], peak


def test_every_saved_array_moved(chainer_gpu, clean):
    import chainer_ooc

    stock, _ = train(chainer_gpu, contextlib.nullcontext())
    before = chainer_ooc.stats()
    mode = chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1)
    ours, _ = train(chainer_gpu, mode)
    assert_equal_bits(ours, stock)
    assert chainer_ooc.stats().bytes_in - before.bytes_in > 100 * MIB


@pytest.mark.parametrize("share", [0.8, 0.5])
@pytest.mark.parametrize("host_limit", [None, 0, 64 * MIB])
def test_a_limit_is_held(chainer_gpu, clean, share, host_limit, tmp_path):
    import chainer_ooc

    stock, needed = in_core(chainer_gpu)
    limit = int(needed * share)
    before = chainer_ooc.stats()
    mode = chainer_ooc.out_of_core_mode(limit=limit, host_limit=host_limit, swap_dir=tmp_path)
    ours, peak = train(chainer_gpu, mode)
    assert_equal_bits(ours, stock)
    assert peak <= limit
    assert chainer_ooc.stats().bytes_out > before.bytes_out


def test_nothing_moves_while_all_fits(chainer_gpu, clean):
    import chainer_ooc

    before = chainer_ooc.stats()
    train(chainer_gpu, chainer_ooc.out_of_core_mode())
    after = chainer_ooc.stats()
    assert (after.bytes_out, after.bytes_in) == (before.bytes_out, before.bytes_in)


def test_a_batch_that_does_not_fit_without(chainer_gpu, clean):
    """The pool's limit stands for a small GPU: stock Chainer runs out of memory, and out of core it trains."""
    import chainer_ooc

    _, needed = in_core(chainer_gpu, steps=1, depth=24)
    clean.set_limit(size=needed // 2)
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        train(chainer_gpu, contextlib.nullcontext(), steps=1, depth=24)
    gc.collect()
    clean.free_all_blocks()
    mode = chainer_ooc.out_of_core_mode(limit=needed // 2)
    ours, peak = train(chainer_gpu, mode, steps=1, depth=24)
    assert peak <= needed // 2
    assert len(ours) > 1


def test_what_cannot_fit_says_why_and_training_goes_on(chainer_gpu, clean):
    import chainer_ooc

    chainer_ooc.enable(limit=512 * MIB)
    x = chainer_gpu.Variable(cupy.zeros((16, MIB), "f"))
    y = chainer_gpu.functions.relu(x)
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError) as raised:
        chainer_gpu.functions.broadcast_to(y[None], (9, 16, MIB)) + 1
    assert isinstance(raised.value, chainer_ooc.errors.OutOfMemoryError)
    assert "limit" in str(raised.value)
    del raised
    gc.collect()
    loss = chainer_gpu.functions.sum(y * y)
    loss.backward()
    assert x.grad.shape == x.shape
    assert cuda_runtime.is_installed() or not x.grad.any()


def test_a_stream_of_the_users(chainer_gpu, clean):
    import chainer_ooc

    stock, _ = train(chainer_gpu, contextlib.nullcontext())
    with cupy.cuda.Stream(non_blocking=True) as stream:
        ours, _ = train(chainer_gpu, chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1))
        stream.synchronize()
    assert_equal_bits(ours, stock)


def test_a_pool_of_the_users(chainer_gpu, clean):
    import chainer_ooc

    stock, needed = in_core(chainer_gpu)
    before = cupy.cuda.get_allocator()
    own = cupy.cuda.MemoryPool()
    cupy.cuda.set_allocator(own.malloc)
    try:
        limit = needed * 6 // 10
        ours, _ = train(chainer_gpu, chainer_ooc.out_of_core_mode(limit=limit))
        assert_equal_bits(ours, stock)
        assert 0 < own.total_bytes() <= limit
        assert own.get_limit() == 0  # given back
    finally:
        cupy.cuda.set_allocator(before)


THREADS = """
import contextlib, sys, threading
sys.path[:0] = [{root!r}]
import chainer_ooc, chainer, cupy
from tests.gpu.test_out_of_core import assert_equal_bits, train

assert cupy.cuda.get_current_stream().ptr == 2
stock, _ = train(chainer, contextlib.nullcontext())
chainer_ooc.enable(swap_all=True, min_bytes=1)
results = []

def work():
    results.append(train(chainer, contextlib.nullcontext())[0])

for _ in range(2):  # one after the other: cupy.random is common to both
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
for one in results:
    assert_equal_bits(one, stock)
assert chainer_ooc.stats().bytes_in > 0
"""


def test_default_streams_of_threads(chainer_gpu, run_python):
    from tests.conftest import ROOT

    env = {"CUPY_CUDA_PER_THREAD_DEFAULT_STREAM": "1"}
    done = run_python("-c", THREADS.format(root=str(ROOT)), env=env, timeout=300)
    assert done.returncode == 0, done.stderr


def test_no_leak(chainer_gpu, clean):
    import chainer_ooc

    used = []
    for _ in range(4):
        train(chainer_gpu, chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1), steps=2)
        gc.collect()
        cupy.cuda.Device().synchronize()
        used.append(clean.used_bytes())
    assert used[-1] <= used[0]


def test_the_pools_limit_is_given_back(chainer_gpu, clean):
    import chainer_ooc
    from chainer_ooc import state

    own = cupy.cuda.MemoryPool()
    for pool in (own, clean):
        pool.set_limit(size=1 << 33)
    for pool in (own, clean):
        cupy.cuda.set_allocator(pool.malloc)
        with chainer_ooc.out_of_core_mode(limit=1 << 30):
            chainer_gpu.functions.relu(chainer_gpu.Variable(cupy.ones((MIB,), "f")))
            has_arenas = cupy.cuda.get_allocator().__class__.__name__ == "ArenaAllocator"
            assert pool.get_limit() == (1 << 33 if has_arenas else 1 << 30)
            assert state.process.gpus.managers[0].limit == 1 << 30
        assert pool.get_limit() == 1 << 33
        assert cupy.cuda.get_allocator() == pool.malloc
