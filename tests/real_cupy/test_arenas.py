"""Page arenas in the place of CuPy's default pool: what is free in pieces is of use, and nothing else changes."""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import threading

import chainer
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import errors, state
from tests.doubles import cuda_runtime
from tests.real_cupy.conftest import KIB, MIB

cupy = pytest.importorskip("cupy")

PAGE = 2 * MIB
pytestmark = pytest.mark.extension


@pytest.fixture
def mode():
    """Turn out-of-core mode on with a limit (MiB), the GPU's manager made."""

    def enable(limit=64, **given):
        chainer_ooc.enable(limit=limit * MIB, min_bytes=1, **given)
        chainer.functions.relu(chainer.Variable(cupy.zeros(1000, "f")))
        gc.collect()

    yield enable
    chainer_ooc.disable()
    gc.collect()


def arena():
    pool = state.process.gpus._allocator.arenas
    return None if pool is None else pool._arena()


def blocks(sizes):
    return [cupy.cuda.alloc(int(size)) for size in sizes]


def taken():
    return cuda_runtime.memory()["physical"]


def test_arrays_lie_in_pages_and_cupys_pool_comes_back():
    stock = cupy.cuda.get_allocator()
    chainer_ooc.enable(limit=64 * MIB)
    x = cupy.ones((1000,), "f")
    assert chainer_ooc.swap.devices.ram.native.allocator.in_arena(x.data.ptr)
    assert x.data.mem.size == 4000  # not rounded up
    assert taken() == PAGE
    chainer_ooc.disable()
    assert cupy.cuda.get_allocator() == stock
    y = cupy.ones((1000,), "f")
    assert type(y.data.mem) is cupy.cuda.memory.PooledMemory
    assert taken() == PAGE
    x += 1  # it is valid, and freed as any
    del x
    assert taken() == 0


def test_memory_that_is_free_in_pieces_is_of_use(mode):
    mode(limit=64)
    held = blocks([3 * MIB] * 21)
    del held[::2]
    big = blocks([30 * MIB])  # no 30 MiB are side by side
    assert big[0].ptr and taken() <= 64 * MIB + 8 * MIB
    assert arena().counts["unmaps"] > 0
    arena().check()


@pytest.mark.parametrize("seed", range(5))
def test_random_blocks_never_fail_below_the_limit_and_never_overlap(mode, seed):
    mode(limit=300)
    chance = random.Random(seed)
    cuda_runtime.setup(total=1 << 30, lag=seed)
    held, used = [], 0
    for _ in range(1500):
        size = int(2 ** chance.uniform(3, 25.5))
        while held and used + size > 260 * MIB:
            used -= held.pop(chance.randrange(len(held)))[1]
        held.append((cupy.cuda.alloc(size), size))
        used += size
    spans = sorted((one.ptr, one.ptr + size) for one, size in held)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(start % 512 == 0 for start, _ in spans)
    assert cuda_runtime.memory()["peak"] <= 309 * MIB
    arena().check()


def test_what_the_same_sizes_need_is_hardly_mapped_again(mode):
    mode(limit=200)
    sizes = [int(n * MIB) for n in (3.3, 7.1, 20, 0.7, 5.5, 41, 1.2, 9.9, 30.3, 2)]
    counts = [arena().counts["maps"]]
    for _ in range(16):
        held = []
        for size in sizes * 3:
            while sum(mem.mem.size for mem in held) + size > 180 * MIB:
                del held[0]
            held.append(cupy.cuda.alloc(size))
        del held
        counts.append(arena().counts["maps"])
    assert counts[-1] - counts[-2] < (counts[1] - counts[0]) / 5


def test_a_limit_that_nobody_can_hold_is_an_error_that_explains(mode):
    mode(limit=64)
    held = blocks([50 * MIB])
    with pytest.raises(errors.OutOfMemoryError, match="needs 40 MiB more") as raised:
        cupy.cuda.alloc(40 * MIB)
    assert isinstance(raised.value, cupy.cuda.memory.OutOfMemoryError)
    assert blocks([10 * MIB]) and held


def test_garbage_is_collected_before_that(mode):
    mode(limit=64)
    cycle = [cupy.cuda.alloc(50 * MIB)]
    cycle.append(cycle)
    del cycle
    assert blocks([50 * MIB])


def test_garbage_that_dies_inside_of_an_allocation_harms_nobody(mode):
    mode(limit=64)
    gc.set_threshold(1)
    try:
        for size in range(1, 400):
            cycle = [cupy.cuda.alloc(size * 10 * KIB)]
            cycle.append(cycle)
    finally:
        gc.set_threshold(700)
    arena().check()


@pytest.mark.parametrize("name", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap"])
@pytest.mark.parametrize("at", range(1, 40, 4))
def test_a_driver_that_refuses_loses_nothing(mode, name, at):
    mode(limit=64)
    cuda_runtime.fail(name, at=at, times=2)
    held = []
    for step in range(60):
        with contextlib.suppress(cupy.cuda.memory.OutOfMemoryError):
            held += blocks([(1 + step % 7) * MIB])
        if step % 3:
            del held[: len(held) // 4 + 1]
    held.clear()
    cuda_runtime.reset()
    arena().check()
    assert blocks([50 * MIB])


def test_streams_get_each_others_memory_in_order(mode):
    mode(limit=64)
    cuda_runtime.setup(total=1 << 30, lag=2)
    first, second = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    for _ in range(4):
        with first:
            mine = blocks([9 * MIB] * 6)
            address = {one.ptr for one in mine}
            del mine[:]
            mine = blocks([9 * MIB] * 6)  # at once, for they are the stream's own
            assert {one.ptr for one in mine} == address
            del mine[:]
        before = arena().counts["orders"]
        with second:
            yours = blocks([50 * MIB])
            assert arena().counts["orders"] == before + 1
            del yours[:]
    arena().check()


def test_memory_of_a_stream_that_was_destroyed_is_of_use(mode):
    mode(limit=64)
    for _ in range(20):
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            held = blocks([50 * MIB])
        del held, stream
        gc.collect()
    assert blocks([50 * MIB])
    arena().check()


def test_threads_allocate_and_free_at_the_same_time(mode):
    mode(limit=256)
    failed, shared = [], []

    def work(seed):
        chance = random.Random(seed)
        try:
            for _ in range(600):
                shared.append(cupy.cuda.alloc(int(2 ** chance.uniform(9, 22))))
                while len(shared) > 40:
                    shared.pop(chance.randrange(20))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shared.clear()
    assert not failed
    arena().check()
    assert arena().used_bytes < MIB


def test_what_cupys_pool_holds_counts(mode):
    outside = blocks([40 * MIB])
    mode(limit=64)
    with pytest.raises(errors.OutOfMemoryError):
        blocks([40 * MIB])
    del outside
    assert blocks([50 * MIB])
    assert cuda_runtime.memory()["allocated"] < MIB


def test_cached_memory_of_cupys_pool_goes_back(mode):
    blocks([100 * MIB])
    mode(limit=64)
    assert cuda_runtime.memory()["allocated"] < MIB


def test_pools_of_the_users_own_stay(mode):
    pool = cupy.cuda.MemoryPool()
    with_pool = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(pool.malloc)
    try:
        mode(limit=64)
        x = cupy.ones(1000, "f")
        assert type(x.data.mem) is cupy.cuda.memory.PooledMemory and pool.used_bytes()
        assert arena() is None
    finally:
        chainer_ooc.disable()
        cupy.cuda.set_allocator(with_pool)


@pytest.mark.filterwarnings("ignore:cupy.cuda.MemoryAsyncPool")
def test_arrays_of_cudas_own_pools_move(mode):
    stock = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(cupy.cuda.MemoryAsyncPool().malloc)
    try:
        mode(limit=8)
        before = chainer_ooc.stats().bytes_out
        h = chainer.Variable(cupy.zeros((1 << 18,), "f"))
        for _ in range(12):
            h = chainer.functions.sigmoid(h)
        assert chainer_ooc.stats().bytes_out > before
        del h
    finally:
        chainer_ooc.disable()
        cupy.cuda.set_allocator(stock)


@pytest.mark.parametrize("size", [1 << 18, (1 << 18) + 1, 99_999, 123_457])
def test_arrays_of_any_size_are_computed_again(mode, size):
    mode(limit=8, discard_all=True)
    before = chainer_ooc.stats().bytes_discarded
    for _ in range(4):
        h = chainer.Variable(cupy.zeros((size,), "f"))
        for _ in range(24):
            h = chainer.functions.relu(h * 2)
        loss = chainer.functions.sum(h)
        loss.backward()
        del h, loss
    assert chainer_ooc.stats().bytes_discarded > before


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("cudaDeviceGetAttribute", "GPU 0 has no virtual memory management"),
        ("cuMemGetAllocationGranularity", "cuMemGetAllocationGranularity: error 999"),
        ("cuMemAddressReserve", "bytes: error 2"),
    ],
)
def test_without_virtual_memory_cupys_pool_serves(run_on_double, function, why):
    code = f"""
import logging, cupy, chainer, chainer_ooc
from tests.doubles import cuda_runtime
seen, handler = [], logging.Handler()
handler.emit = lambda record: seen.append(record.getMessage())
logging.getLogger("chainer_ooc").addHandler(handler)
cuda_runtime.fail("{function}", times=100)
chainer_ooc.enable(limit=64 << 20)
"Attribute" in "{function}" and cuda_runtime.reset()
x = cupy.ones(1000, "f")
chainer_ooc.enable(limit=32 << 20)
h = chainer.Variable(cupy.zeros((1 << 20,), "f"))
for _ in range(30): h = chainer.functions.sigmoid(h)
assert chainer_ooc.stats().bytes_out and cupy.get_default_memory_pool().total_bytes() <= 32 << 20
print(type(x.data.mem).__name__, *[one for one in seen if "GPU memory" in one])
"""
    done = run_on_double(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PooledMemory GPU memory comes from CuPy's pool")
    assert done.stdout.endswith(f"{why}\n") and done.stdout.count("GPU memory comes") == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", ["", "chainer_ooc.disable()", "del h, cycle"])
def test_it_ends_silently(run_on_double, ending):
    code = f"""
import warnings; warnings.simplefilter("ignore")
import cupy, chainer, chainer_ooc
chainer_ooc.enable(limit=64 << 20)
h = chainer.Variable(cupy.zeros((1 << 20,), "f"))
for _ in range(30): h = chainer.functions.sigmoid(h)
cycle = [h]; cycle.append(cycle)
from tests.doubles import cuda_runtime
{ending}
assert not cuda_runtime.complaints()
"""
    done = run_on_double(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_forked_child_has_no_gpu_memory(run_on_double):
    code = """
import os, sys, cupy, chainer_ooc
chainer_ooc.enable(limit=64 << 20)
x = cupy.ones(1 << 20, "f")
pid = os.fork()
if not pid:
    y = x; del x, y
    try: cupy.cuda.alloc(1 << 20)
    except RuntimeError as error: print(error)
    sys.stdout.flush(); os._exit(0)
os.wait()
x += 1; del x
"""
    done = run_on_double(code)
    assert done.returncode == 0, done.stderr
    assert "GPU 0 has no memory for this process, which was forked" in done.stdout


def test_bits_survive_in_pages_that_are_mapped_anew(mode):
    """With data: each block keeps its own bytes while others around it are mapped anew."""
    mode(limit=40)
    chance = random.Random(3)
    held = []
    for step in range(300):
        while held and sum(len(bits) for _, bits in held) > 30 * MIB:
            pointer, bits = held.pop(chance.randrange(len(held)))
            back = np.empty_like(bits)
            pointer.copy_to_host(back.ctypes.data, len(bits))
            assert (back == bits).all()
            del pointer
        bits = np.full(int(2 ** chance.uniform(10, 23.5)), step % 251, np.uint8)
        pointer = cupy.cuda.alloc(len(bits))
        pointer.copy_from_host(bits.ctypes.data, len(bits))
        held.append((pointer, bits))
    assert arena().counts["unmaps"] > 0


def test_a_second_hook_finds_the_arenas_that_are_there(mode):
    mode(limit=64)
    chainer_ooc.disable()
    from chainer_ooc.swap.cupy_allocator import CupyAllocator

    other = CupyAllocator(cupy, lambda device: None, lambda: "", lambda nbytes: None)
    other.install()
    try:
        x = cupy.ones((1000,), "f")
        assert x.data.ptr in other.arenas._arena()
    finally:
        other.uninstall()
    mode(limit=64)
    with pytest.raises(errors.OutOfMemoryError):  # the engine is asked again
        blocks([80 * MIB])


def test_frees_after_disable_wait_for_the_gpu_only_where_that_gives_something_back():
    chainer_ooc.enable(limit=512 * MIB)
    held = blocks([3.5 * MIB] * 60)
    del held[1::2]
    chainer_ooc.disable()
    before = cuda_runtime.counts()["cudaDeviceSynchronize"]
    while len(held) > 1:
        held.pop()
    assert cuda_runtime.counts()["cudaDeviceSynchronize"] - before <= 5
    assert taken() <= 50 * MIB
    held.clear()
    assert taken() == 0
