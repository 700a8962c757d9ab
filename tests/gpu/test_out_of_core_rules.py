"""The rules that the simulated GPU goes by, as far as the real runtime lets them be observed."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys

import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

MIB = 1 << 20

SPIN = """
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


@pytest.fixture(scope="module")
def spin():
    """Return a function that keeps a stream busy for a second or so."""
    kernel = cupy.RawKernel(SPIN, "spin")
    kernel((1,), (1,), (np.int64(1),))  # compiled now

    def run(stream):
        with stream:
            kernel((1,), (1,), (np.int64(1_500_000_000),))

    yield run
    cupy.cuda.Device().synchronize()


@pytest.fixture
def host():
    """Page-locked memory made as the slab makes it: mapped, then registered."""
    memory = mmap.mmap(-1, 4 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    cupy.cuda.runtime.hostRegister(address, 4 * MIB, 1)
    yield address, memory
    cupy.cuda.Device().synchronize()
    cupy.cuda.runtime.hostUnregister(address)


@pytest.fixture
def pool():
    """A fresh pool that is CuPy's allocator meanwhile."""
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        yield pool
    gc.collect()


def new_stream():
    return cupy.cuda.Stream(non_blocking=True)


def test_non_blocking_streams_do_not_wait_for_the_default_stream(spin):
    spin(cupy.cuda.Stream.null)
    other = new_stream()
    event = other.record()
    event.synchronize()
    assert not cupy.cuda.Stream.null.done


def test_an_event_stands_for_what_its_stream_was_given(spin):
    busy, idle = new_stream(), new_stream()
    before = busy.record()
    spin(busy)
    after = busy.record()
    before.synchronize()
    assert before.done
    assert not after.done
    idle.wait_event(after)
    ordered = idle.record()
    assert not ordered.done
    ordered.synchronize()
    assert after.done


def test_an_event_that_was_never_recorded_is_not_waited_for(spin):
    stream = new_stream()
    event = cupy.cuda.Event(disable_timing=True)
    assert event.done
    stream.wait_event(event)
    stream.synchronize()


def test_waiting_takes_the_event_as_it_is_then(spin):
    busy, idle = new_stream(), new_stream()
    event = busy.record(cupy.cuda.Event(disable_timing=True))
    event.synchronize()
    idle.wait_event(event)
    spin(busy)
    busy.record(event)  # again
    idle.synchronize()
    assert not busy.done


def test_an_event_may_be_destroyed_while_it_is_waited_for(spin):
    busy, idle = new_stream(), new_stream()
    spin(busy)
    event = busy.record()
    idle.wait_event(event)
    del event
    gc.collect()
    assert not idle.record().done
    idle.synchronize()
    assert busy.done


def test_a_stream_that_is_destroyed_does_its_work(spin):
    stream = new_stream()
    array = cupy.zeros(4)
    cupy.cuda.Device().synchronize()
    spin(stream)
    with stream:
        array += 1
    del stream
    gc.collect()
    cupy.cuda.Device().synchronize()
    assert array.get().tolist() == [1] * 4


def test_copies_of_registered_memory_do_not_stop_the_host(spin, host):
    address, memory = host
    stream = new_stream()
    array = cupy.full(MIB, 7, "u1")
    cupy.cuda.Device().synchronize()
    spin(stream)
    runtime = cupy.cuda.runtime
    runtime.memcpyAsync(address, array.data.ptr, MIB, runtime.memcpyDeviceToHost, stream.ptr)
    assert not stream.done
    assert memory[:MIB] != bytes([7]) * MIB
    stream.synchronize()
    assert memory[:MIB] == bytes([7]) * MIB
    back = cupy.zeros(MIB, "u1")
    cupy.cuda.Device().synchronize()
    runtime.memcpyAsync(back.data.ptr, address, MIB, runtime.memcpyHostToDevice, stream.ptr)
    stream.synchronize()
    assert (back == 7).all()


def test_a_freed_block_is_at_once_its_streams_again(spin, pool):
    busy = new_stream()
    with busy:
        array = cupy.zeros(MIB, "u1")
        pointer = array.data.ptr
        spin(busy)
        del array
        again = cupy.empty(MIB, "u1")
    assert not busy.done
    assert again.data.ptr == pointer
    with new_stream():
        assert cupy.empty(MIB, "u1").data.ptr != pointer
    busy.synchronize()


def test_a_freed_block_is_not_held_for_copies_on_other_streams(spin, pool, host):
    """Why the device holds memory itself."""
    address, _ = host
    array = cupy.zeros(MIB, "u1")
    pointer, copies = array.data.ptr, new_stream()
    cupy.cuda.Device().synchronize()
    spin(copies)
    runtime = cupy.cuda.runtime
    runtime.memcpyAsync(address, pointer, MIB, runtime.memcpyDeviceToHost, copies.ptr)
    del array
    assert cupy.empty(MIB, "u1").data.ptr == pointer
    assert not copies.done


def test_regions_are_given_back_only_when_the_device_has_stopped(spin, pool):
    busy = new_stream()
    with busy:
        array = cupy.zeros(64 * MIB, "u1")
        spin(busy)
        del array
    pool.free_all_blocks()
    assert busy.done
    assert pool.total_bytes() == 0


def test_blocks_are_split_and_merged(pool):
    whole = cupy.empty(4 * MIB, "u1")
    pointer = whole.data.ptr
    del whole
    first, second = cupy.empty(MIB, "u1"), cupy.empty(MIB, "u1")
    assert (first.data.ptr, second.data.ptr) == (pointer, pointer + MIB)
    assert pool.total_bytes() == 4 * MIB
    del first, second
    assert cupy.empty(4 * MIB, "u1").data.ptr == pointer


def test_a_limit_counts_free_blocks_which_go_before_it_fails(pool):
    pool.set_limit(size=8 * MIB)
    kept = [cupy.empty(MIB, "u1") for _ in range(6)]
    del kept[::2]
    assert (pool.used_bytes(), pool.total_bytes()) == (3 * MIB, 6 * MIB)
    large = cupy.empty(5 * MIB, "u1")
    assert pool.total_bytes() == 8 * MIB
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        cupy.empty(MIB, "u1")
    assert large.nbytes == 5 * MIB


def test_sizes_are_rounded_up_to_512_bytes(pool):
    array = cupy.empty(513, "u1")
    assert array.data.mem.size == 1024
    assert array.data.ptr % 512 == 0


def test_whoever_has_an_array_has_its_memory():
    """What tells whether a storage is held: two references are the caller's own."""
    array = cupy.zeros((4, 4), "f")
    owner = array.data.mem
    assert type(owner) is cupy.cuda.memory.PooledMemory
    assert owner.identity == "Memory"
    assert sys.getrefcount(owner) > 2
    view = array[1:].T
    assert view.data.mem is owner
    del array
    assert sys.getrefcount(owner) > 2
    del view
    assert sys.getrefcount(owner) == 2


def test_the_collector_does_not_know_memory():
    array = cupy.zeros(4)
    assert not gc.is_tracked(array.data.mem)


def test_the_allocator_may_be_any_callable():
    calls = []
    stock = cupy.cuda.get_allocator()

    class Allocator:
        def __call__(self, nbytes):
            calls.append(nbytes)
            return stock(nbytes)

    allocator = Allocator()
    cupy.cuda.set_allocator(allocator)
    try:
        assert cupy.cuda.get_allocator() is allocator
        cupy.empty(1000, "u1")
    finally:
        cupy.cuda.set_allocator(stock)
    assert calls == [1000]


def test_registering_what_is_registered_is_an_error(host):
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        cupy.cuda.runtime.hostRegister(host[0], 4 * MIB, 1)


class TestDevice:
    """CudaDevice on the real runtime."""

    @pytest.fixture
    def device(self, tmp_path):
        from chainer_ooc.swap.devices.cuda import CudaDevice

        devices = []

        def make(host_limit):
            devices.append(CudaDevice(cupy, 0, str(tmp_path), host_limit))
            return devices[-1]

        yield make
        for device in devices:
            device.close()

    @pytest.mark.parametrize("host_limit", [0, 64 * MIB])
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

    def test_the_host_goes_on(self, device, spin):
        device = device(64 * MIB)
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
    from chainer_ooc.swap.storage import Layout

    return Layout(array.dtype, array.shape, array.strides, offset, True)
