"""Running functions again on a GPU: fingerprints in GPU memory, and the bits of products that run again."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from tests.gpu.test_cudnn_functions import CONVOLUTIONS
from tests.gpu.test_out_of_core import assert_equal_bits, clean, in_core, train  # noqa: F401  a fixture

cupy = pytest.importorskip("cupy", exc_type=ImportError)

MIB = 1 << 20


@pytest.fixture
def device(tmp_path):
    from chainer_ooc.swap.devices.cuda.device import CudaDevice

    device = CudaDevice(cupy, 0, str(tmp_path), 64 * MIB)
    yield device
    cupy.cuda.Device().synchronize()
    device.close()


def fingerprint(device, array, offset=0, nbytes=None):
    memory = array.data.mem
    start = array.data.ptr - memory.ptr + offset
    return device.fingerprint(memory, start, array.nbytes - offset if nbytes is None else nbytes)


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 4099, 1 << 16, (64 << 20) + 5])
@pytest.mark.parametrize("offset", [0, 3])
def test_slots_hold_the_checksums_of_the_host(device, nbytes, offset):
    """Again and again in the same slot, by few blocks and by many."""
    from chainer_ooc.swap.devices.cuda.checksum import checksum_on_host

    data = np.random.RandomState(1).randint(0, 256, nbytes + 8).astype(np.uint8)
    array = cupy.asarray(data)
    for _ in range(5):
        for size in (nbytes, nbytes // 2):
            taken = fingerprint(device, array, offset, size)
            pointer = cupy.cuda.UnownedMemory(taken.slot, 8, device.fingerprints)
            slot = cupy.ndarray((1,), np.uint64, cupy.cuda.MemoryPointer(pointer, 0))
            expected = checksum_on_host(data[offset : offset + size])
            assert (int(slot.get()[0]) + size) % (1 << 64) == expected
            del taken
    assert device.checksum(array.data.mem, array.data.ptr - array.data.mem.ptr, nbytes) == (
        checksum_on_host(data[:nbytes])
    )


@pytest.mark.parametrize("count", [1, 8, 9, 30])
def test_comparisons_tell_one_bit(device, count):
    array = cupy.arange(MIB, dtype="i4")
    pairs = [(fingerprint(device, array), fingerprint(device, array)) for _ in range(count)]
    other = array.copy()
    other[12345] ^= 1
    bad = fingerprint(device, other)
    verdicts = [device.compare(pairs)]
    for place in range(count):
        changed = [*pairs]
        changed[place] = (bad, changed[place][1])
        verdicts.append(device.compare(changed))
    assert [one.equal() for one in verdicts] == [True] + [False] * count
    place = array.data.ptr - array.data.mem.ptr
    assert device.matches(pairs[0][0], array.data.mem, place, array.nbytes).equal()
    assert not device.matches(bad, array.data.mem, place, array.nbytes).equal()


def test_the_host_does_not_wait(device):
    array = cupy.zeros(16 * MIB, "f")
    first = fingerprint(device, array)
    assert device.compare([(first, fingerprint(device, array))]).equal()  # compiled, allocated
    busy = cupy.cuda.get_current_stream()
    for _ in range(200):
        array += 1
    array -= 200
    verdict = device.compare([(first, fingerprint(device, array))])
    assert not busy.done
    assert not verdict.done()
    assert verdict.equal()


def test_streams_are_put_in_order(device):
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]
    array = cupy.zeros(4 * MIB, "f")
    cupy.cuda.Device().synchronize()
    for number in range(60):
        with streams[number % 3]:
            device.note_allocation()
            before = fingerprint(device, array)
        with streams[(number + 1) % 3]:
            device.note_allocation()
            array += 1
            changed = number % 2
            if not changed:
                array -= 1
        with streams[(number + 2) % 3]:
            device.note_allocation()
            verdict = device.compare([(before, fingerprint(device, array))])
        assert verdict.equal() is not bool(changed)


@contextlib.contextmanager
def disturbed():
    """Let another stream multiply meanwhile."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        a = cupy.ones((2048, 2048), "f")
        for _ in range(30):
            a = a @ a * 0
    yield
    stream.synchronize()


@pytest.mark.parametrize("autotune", [False, True])
@pytest.mark.parametrize("dtype", "efd")
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("direction", ["forward", "backward data"])
def test_algorithms_that_cudnn_calls_deterministic_give_equal_bits(
    chainer_gpu, name, dtype, autotune, direction
):
    """What ``recompute`` waits for to run them again by default: see docs/cuda.md."""
    from chainer_ooc.compat.cudnn import algorithms

    options, x_shape, w_shape = CONVOLUTIONS[name]
    functions = chainer_gpu.functions
    if direction == "forward":
        function = functions.convolution_2d
    else:
        function = functions.deconvolution_2d
        groups = options.get("groups", 1)
        x_shape = (x_shape[0], w_shape[0], *x_shape[2:])
        assert w_shape[0] % groups == 0
    rng = np.random.default_rng(0)
    x, w = (cupy.asarray(rng.standard_normal(s).astype(dtype)) for s in (x_shape, w_shape))
    with chainer_gpu.using_config("autotune", autotune):
        y = function(x, w, **options)
        algorithm = algorithms.that_made(y.array)
        if algorithm is None or not algorithm.deterministic:
            pytest.skip(f"cuDNN chose {algorithm}")
        expected = y.array.tobytes()
        for _ in range(20):
            with disturbed(), algorithms.pinned(algorithm):
                again = function(x, w, **options)
            assert algorithms.that_made(again.array) == algorithm
            assert again.array.tobytes() == expected


PRODUCTS = """
import cupy, numpy
rng = numpy.random.default_rng(0)
for dtype in "efd":
    for m, k, n in ((64, 1024, 1000), (256, 25088, 512), (7, 333, 5), (4096, 64, 64)):
        a, b = (cupy.asarray(rng.standard_normal(s).astype(dtype)) for s in ((m, k), (k, n)))
        expected = a.dot(b).tobytes()
        for _ in range(30):
            kept = cupy.empty(int(rng.integers(1, 1 << 24)), "u1")
            assert a.dot(b).tobytes() == expected, (dtype, m, k, n)
"""


def test_matrix_products_give_equal_bits_in_a_fixed_workspace(run_python):
    done = run_python("-c", PRODUCTS, env={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("share", [0.6, 0.4])
def test_planned_reruns_give_the_bits_of_stock(chainer_gpu, clean, share):  # noqa: F811
    """With verdicts that are known late, and products that run again."""
    import chainer_ooc

    stock, needed = in_core(chainer_gpu, steps=6)
    before = chainer_ooc.stats().storages_remade
    mode = chainer_ooc.out_of_core_mode(limit=int(needed * share), host_limit=0)
    ours, peak = train(chainer_gpu, mode, steps=6)
    assert_equal_bits(ours, stock)
    assert peak <= int(needed * share)
    assert chainer_ooc.stats().storages_remade > before
