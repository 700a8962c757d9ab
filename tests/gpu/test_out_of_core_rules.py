"""The rules that the simulated GPU goes by, on a real one, and the CUDA device on the real runtime."""

from __future__ import annotations

import gc

import numpy as np
import pytest

cupy = pytest.importorskip("cupy", exc_type=ImportError)

from tests.doubles import cuda_runtime  # noqa: E402
from tests.swap.cuda.rules import RULES, Bench  # noqa: E402

MIB = 1 << 20

SPIN = """
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


@pytest.fixture(scope="module")
def spin():
    """Return a function that keeps a stream busy for half a second or so."""
    kernel = cupy.RawKernel(SPIN, "spin")
    kernel((1,), (1,), (np.int64(1),))  # compiled now

    def run(stream):
        with stream:
            kernel((1,), (1,), (np.int64(800_000_000),))

    yield run
    cupy.cuda.Device().synchronize()


@pytest.fixture
def bench(spin):
    yield Bench(cupy, spin, lambda array, value: cupy.add(array, array.dtype.type(value), array))
    cupy.cuda.Device().synchronize()
    if cuda_runtime.is_installed():
        cuda_runtime.reset()  # rules try what is forbidden


def _marked(rule):
    """CUDA's double does all work at once, and computes nothing."""
    on_double = not {"spin", "add", "full"} & {*rule.__code__.co_names}
    return pytest.param(rule, marks=[pytest.mark.on_double] if on_double else [])


@pytest.mark.parametrize("rule", [*map(_marked, RULES)], ids=[rule.__name__ for rule in RULES])
def test_rule(rule, bench):
    rule(bench)


@pytest.mark.on_double
def test_the_collector_does_not_know_memory():
    array = cupy.zeros(4)
    assert not gc.is_tracked(array.data.mem)


class TestDevice:
    """CudaDevice on the real runtime."""

    @pytest.fixture
    def device(self, tmp_path):
        from chainer_ooc.swap.devices.cuda.device import CudaDevice

        devices = []

        def make(host_limit):
            devices.append(CudaDevice(cupy, 0, str(tmp_path), host_limit))
            return devices[-1]

        yield make
        for device in devices:
            device.close()

    @pytest.mark.parametrize("host_limit", [0, 128 * MIB])
    def test_round_trips(self, device, host_limit):
        device = device(host_limit)
        for nbytes in (512, MIB + 512, 40 * MIB):
            array = cupy.random.randint(0, 256, nbytes, dtype="u1")
            expected = array.get()
            location = device.locate(array)
            layout_of = device.view(location.owner, 0, _layout(array, location.offset))
            assert layout_of.data.ptr == array.data.ptr
            del array, layout_of
            out = device.copy_out(location.owner, 0, location.nbytes)
            out.join()
            size = location.nbytes
            del location
            cupy.full(nbytes, 0xE5, "u1")
            owner, origin, back = device.copy_in(out.copy, size, 0)
            back.join()
            again = cupy.ndarray(nbytes, "u1", cupy.cuda.MemoryPointer(owner, origin))
            assert (again.get() == expected).all()
            out.copy.free()

    @pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 4096, 4099, 3 * MIB + 5, 40 * MIB])
    @pytest.mark.parametrize("offset", [0, 3])
    def test_checksums_are_those_of_the_host(self, device, nbytes, offset):
        from chainer_ooc.swap.devices.cuda.checksum import checksum_on_host

        array = cupy.random.randint(0, 256, 41 * MIB, dtype="u1")
        found = device(0).checksum(array.data.mem, offset, nbytes)
        assert found == checksum_on_host(array.get()[offset : offset + nbytes])

    def test_the_host_goes_on(self, device, spin):
        device = device(128 * MIB)
        device.copy_out(cupy.full(MIB, 0, "u1").data.mem, 0, MIB).wait()  # the slab is there now
        array = cupy.full(MIB, 3, "u1")
        stream = cupy.cuda.get_current_stream()
        spin(stream)
        array += 1
        owner = array.data.mem
        del array
        out = device.copy_out(owner, 0, MIB)
        out.join()
        del owner
        cupy.full(MIB, 9, "u1")  # where it was
        owner, origin, back = device.copy_in(out.copy, MIB, 0)
        back.join()
        assert not stream.done  # nobody waited
        again = cupy.ndarray(MIB, "u1", cupy.cuda.MemoryPointer(owner, origin))
        assert (again.get() == 4).all()


def _layout(array, offset):
    from chainer_ooc.swap.devices.protocol import Layout

    return Layout(array.dtype, array.shape, array.strides, offset, True)
