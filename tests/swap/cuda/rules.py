"""The rules of CUDA and CuPy that the device relies on, as tests that run on a GPU and on the simulated one.

Each is a function of a bench: the module ``cupy`` or what simulates it, and something that keeps a stream
busy. ``tests/gpu/test_out_of_core_rules.py`` runs them on the real runtime, ``test_rules.py`` here on the
simulated one: where the two do not agree, the simulation proves nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import threading
from types import SimpleNamespace

import pytest

from chainer_ooc.references import attribute_is_referenced_externally

KIB = 1 << 10
SIZE = 64 * KIB
_PORTABLE = 1


class Bench:
    """A runtime to be looked at.

    Args:
        cupy: The module, or what simulates it.
        spin: Keeps a stream busy for a while: called with the stream.
        add: Adds to each element of an array, on the current stream.
    """

    def __init__(self, cupy, spin, add):
        self.cupy, self.spin, self.add = cupy, spin, add
        self.cuda = cupy.cuda
        self.runtime = cupy.cuda.runtime
        self.cuda_event = cupy.cuda.Event
        self.elapsed = cupy.cuda.get_elapsed_time

    def stream(self):
        return self.cupy.cuda.Stream(non_blocking=True)

    @property
    def default(self):
        return self.cupy.cuda.Stream(null=True)

    def empty(self, nbytes=SIZE):
        return self.cupy.ndarray((nbytes,), "u1")

    def full(self, value, nbytes=SIZE):
        array = self.empty(nbytes)
        array.fill(value)
        self.runtime.deviceSynchronize()
        return array

    @contextlib.contextmanager
    def host(self):
        """Page-locked memory, made as the slab makes it: mapped, then registered."""
        memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_DONTFORK)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.runtime.hostRegister(address, SIZE, _PORTABLE)
        try:
            yield address, memory
        finally:
            self.runtime.deviceSynchronize()
            self.runtime.hostUnregister(address)

    @contextlib.contextmanager
    def pool(self):
        """A fresh pool that is the calling thread's allocator meanwhile."""
        pool = self.cupy.cuda.MemoryPool()
        with self.cupy.cuda.using_allocator(pool.malloc):
            yield pool
        gc.collect()

    def two_gpus(self):
        if self.runtime.getDeviceCount() < 2:
            pytest.skip("needs two GPUs")


RULES = []


def rule(function):
    RULES.append(function)
    return function


@rule
def non_blocking_streams_do_not_wait_for_the_default_stream(bench):
    bench.spin(bench.default)
    bench.stream().record().synchronize()
    assert not bench.default.done


@rule
def an_event_stands_for_what_its_stream_was_given(bench):
    busy, idle = bench.stream(), bench.stream()
    before = busy.record()
    bench.spin(busy)
    after = busy.record()
    before.synchronize()
    assert before.done
    assert not after.done
    idle.wait_event(after)
    ordered = idle.record()
    assert not ordered.done
    ordered.synchronize()
    assert after.done


@rule
def an_event_that_was_never_recorded_is_not_waited_for(bench):
    stream = bench.stream()
    event = bench.cupy.cuda.Event(disable_timing=True)
    assert event.done
    stream.wait_event(event)
    stream.synchronize()
    assert stream.done


@rule
def waiting_takes_the_event_as_it_is_then(bench):
    busy, idle = bench.stream(), bench.stream()
    event = busy.record(bench.cupy.cuda.Event(disable_timing=True))
    event.synchronize()
    idle.wait_event(event)
    bench.spin(busy)
    busy.record(event)  # again
    idle.synchronize()
    assert not busy.done


@rule
def an_event_may_be_destroyed_while_it_is_waited_for(bench):
    busy, idle = bench.stream(), bench.stream()
    bench.spin(busy)
    event = busy.record()
    idle.wait_event(event)
    del event
    gc.collect()
    assert not idle.record().done
    idle.synchronize()
    assert busy.done


@rule
def a_stream_that_is_destroyed_does_its_work(bench):
    stream = bench.stream()
    array = bench.full(3)
    bench.spin(stream)
    with stream:
        bench.add(array, 1)
    del stream
    gc.collect()
    bench.runtime.deviceSynchronize()
    assert set(array.get()) == {4}


@rule
def copies_of_page_locked_memory_do_not_stop_the_host(bench):
    runtime = bench.runtime
    with bench.host() as (address, memory):
        memory[:] = bytes(SIZE)
        stream = bench.stream()
        array = bench.full(7)
        bench.spin(stream)
        runtime.memcpyAsync(address, array.data.ptr, SIZE, runtime.memcpyDeviceToHost, stream.ptr)
        assert not stream.done
        assert memory[:] == bytes(SIZE)
        stream.synchronize()
        assert memory[:] == bytes([7]) * SIZE
        back = bench.full(0)
        runtime.memcpyAsync(back.data.ptr, address, SIZE, runtime.memcpyHostToDevice, stream.ptr)
        stream.synchronize()
        assert set(back.get()) == {7}


@rule
def memory_is_page_locked_once(bench):
    with bench.host() as (address, _), pytest.raises(bench.runtime.CUDARuntimeError):
        bench.runtime.hostRegister(address, SIZE, _PORTABLE)


@rule
def a_freed_block_is_at_once_its_streams_again(bench):
    with bench.pool():
        busy = bench.stream()
        with busy:
            array = bench.empty()
            pointer = array.data.ptr
            bench.spin(busy)
            del array
            again = bench.empty()
        assert not busy.done
        assert again.data.ptr == pointer
        with bench.stream():
            assert bench.empty().data.ptr != pointer
        busy.synchronize()


@rule
def a_freed_block_is_not_kept_for_copies_on_other_streams(bench):
    """Why the device holds memory itself."""
    runtime = bench.runtime
    with bench.pool(), bench.host() as (address, _):
        array = bench.full(0)
        pointer, copies = array.data.ptr, bench.stream()
        bench.spin(copies)
        runtime.memcpyAsync(address, pointer, SIZE, runtime.memcpyDeviceToHost, copies.ptr)
        del array
        again = bench.empty()
        assert again.data.ptr == pointer
        assert not copies.done
        copies.synchronize()


@rule
def regions_are_given_back_only_when_the_gpu_has_stopped(bench):
    with bench.pool() as pool:
        busy = bench.stream()
        with busy:
            array = bench.empty()
            bench.spin(busy)
            del array
        pool.free_all_blocks()
        assert busy.done
        assert pool.total_bytes() == 0


@rule
def regions_of_which_a_part_is_in_use_are_not_given_back(bench):
    with bench.pool() as pool:
        whole = bench.empty(2 * SIZE)
        del whole
        part = bench.empty(SIZE)
        pool.free_all_blocks()
        assert pool.total_bytes() == 2 * SIZE
        del part


@rule
def blocks_are_split_and_merged(bench):
    with bench.pool() as pool:
        whole = bench.empty(4 * SIZE)
        pointer = whole.data.ptr
        del whole
        first, second = bench.empty(), bench.empty()
        assert (first.data.ptr, second.data.ptr) == (pointer, pointer + SIZE)
        assert pool.total_bytes() == 4 * SIZE
        del first, second
        assert bench.empty(4 * SIZE).data.ptr == pointer


@rule
def a_limit_counts_free_blocks_which_go_before_it_fails(bench):
    with bench.pool() as pool:
        pool.set_limit(size=8 * SIZE)
        assert pool.get_limit() == 8 * SIZE
        kept = [bench.empty() for _ in range(6)]
        del kept[::2]
        assert (pool.used_bytes(), pool.total_bytes()) == (3 * SIZE, 6 * SIZE)
        large = bench.empty(5 * SIZE)
        assert pool.total_bytes() == 8 * SIZE
        with pytest.raises(bench.cupy.cuda.memory.OutOfMemoryError) as error:
            bench.empty()
        assert isinstance(error.value, MemoryError)
        assert large.nbytes == 5 * SIZE
        pool.set_limit(size=0)
        assert bench.empty().nbytes == SIZE


@rule
def sizes_are_rounded_up_to_512_bytes(bench):
    with bench.pool():
        array = bench.empty(513)
        assert array.data.mem.size == 1024
        assert array.data.ptr % 512 == 0
        assert array.data.mem.ptr == array.data.ptr


@rule
def nothing_is_memory_of_no_pool(bench):
    memory = bench.empty(0).data.mem
    assert type(memory) is bench.cupy.cuda.memory.Memory
    assert memory.size == 0


@rule
def whoever_has_an_array_has_its_memory(bench):
    """What tells whether a storage is held."""
    array = bench.empty()
    storage = SimpleNamespace(owner=array.data.mem)
    assert type(storage.owner) is bench.cupy.cuda.memory.PooledMemory
    assert storage.owner.identity == "Memory"
    assert attribute_is_referenced_externally(storage, "owner")
    pointer = bench.cupy.cuda.MemoryPointer(storage.owner, 512)
    view = bench.cupy.ndarray((4,), "f4", pointer, (8,))
    del pointer
    assert view.data.ptr == array.data.ptr + 512
    assert view.data.mem is storage.owner
    del array
    assert attribute_is_referenced_externally(storage, "owner")
    del view
    assert not attribute_is_referenced_externally(storage, "owner")


@rule
def the_allocator_may_be_any_callable(bench):
    cuda, calls = bench.cupy.cuda, []
    stock = cuda.get_allocator()

    class Allocator:
        def __call__(self, nbytes):
            calls.append(nbytes)
            return stock(nbytes)

    allocator = Allocator()
    cuda.set_allocator(allocator)
    try:
        assert cuda.get_allocator() is allocator
        bench.empty(1000)
    finally:
        cuda.set_allocator(stock)
    assert calls == [1000]


@rule
def a_pools_allocator_tells_its_pool(bench):
    pool = bench.cupy.cuda.MemoryPool()
    assert pool.malloc.__self__ is pool
    stock = bench.cupy.cuda.get_allocator()
    assert stock.__self__ is bench.cupy.get_default_memory_pool()
    assert isinstance(stock.__self__, bench.cupy.cuda.MemoryPool)


@rule
def the_allocator_cannot_be_changed_inside_using_allocator(bench):
    cuda = bench.cupy.cuda
    stock = cuda.get_allocator()
    pool = cuda.MemoryPool()
    with cuda.using_allocator(pool.malloc):
        assert cuda.get_allocator() is not stock
        with pytest.raises(ValueError):
            cuda.set_allocator(stock)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(cuda.get_allocator()))
        thread.start()
        thread.join()
        assert seen[0] is stock
    assert cuda.get_allocator() is stock


@rule
def the_default_stream_of_a_thread_is_its_own(bench):
    stream = bench.cupy.cuda.Stream(ptds=True)
    assert stream.ptr == 2
    bench.spin(stream)
    seen = []

    def look():
        other = bench.cupy.cuda.Stream(ptds=True)
        seen.append((other.ptr, other.done))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [(2, True)]
    assert not stream.done
    bench.runtime.deviceSynchronize()
    assert stream.done


@rule
def the_free_blocks_of_a_threads_default_stream_are_its_own(bench):
    with bench.pool() as pool:
        with bench.cupy.cuda.Stream(ptds=True):
            array = bench.empty()
        pointer = array.data.ptr
        del array
        seen = []

        def look():
            with bench.cupy.cuda.using_allocator(pool.malloc), bench.cupy.cuda.Stream(ptds=True):
                seen.append(bench.empty().data.ptr)

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert seen[0] != pointer
        with bench.cupy.cuda.Stream(ptds=True):
            assert bench.empty().data.ptr == pointer


@rule
def each_gpu_has_a_default_stream(bench):
    bench.two_gpus()
    stream = bench.default
    bench.spin(stream)
    with bench.cupy.cuda.Device(1):
        assert stream.done  # that of the other GPU
    assert not stream.done
    stream.synchronize()


@rule
def an_event_is_recorded_on_streams_of_its_gpu(bench):
    bench.two_gpus()
    stream = bench.stream()
    with bench.cupy.cuda.Device(1):
        event = bench.cupy.cuda.Event(disable_timing=True)
        with pytest.raises(bench.runtime.CUDARuntimeError):
            stream.record(event)


@rule
def a_stream_waits_and_copies_with_another_gpu_current(bench):
    bench.two_gpus()
    busy, stream = bench.stream(), bench.stream()
    array = bench.full(5)
    bench.spin(busy)
    event = busy.record()
    with bench.host() as (address, memory), bench.cupy.cuda.Device(1):
        stream.wait_event(event)
        kind = bench.runtime.memcpyDeviceToHost
        bench.runtime.memcpyAsync(address, array.data.ptr, SIZE, kind, stream.ptr)
        assert not stream.done
        stream.synchronize()
        assert event.done
        assert memory[:] == bytes([5]) * SIZE


@rule
def a_stream_is_entered_on_its_gpu(bench):
    bench.two_gpus()
    stream = bench.stream()
    with bench.cupy.cuda.Device(1), pytest.raises(RuntimeError), stream:
        pass


@rule
def streams_are_current_on_their_gpu_alone(bench):
    bench.two_gpus()
    stream = bench.stream()
    with stream:
        with bench.cupy.cuda.Device(1):
            assert bench.cupy.cuda.get_current_stream().ptr != stream.ptr
        assert bench.cupy.cuda.get_current_stream().ptr == stream.ptr


def refused(bench, call):
    """The error of the runtime that a call raises."""
    with pytest.raises(bench.runtime.CUDARuntimeError) as caught:
        call()
    return str(caught.value)


@rule
def the_time_between_events_is_known_when_both_have_ended(bench):
    stream, other = bench.stream(), bench.stream()
    first, last = bench.cuda_event(), bench.cuda_event()
    stream.record(first)
    bench.spin(stream)
    stream.record(last)
    assert "NotReady" in refused(bench, lambda: bench.elapsed(first, last))
    last.synchronize()
    assert bench.elapsed(first, last) > 0 > bench.elapsed(last, first)
    elsewhere = bench.cuda_event()
    other.record(elsewhere)
    elsewhere.synchronize()
    assert bench.elapsed(last, elsewhere) > 0  # on another stream of the same GPU


@rule
def events_made_to_take_no_times_have_none(bench):
    stream = bench.stream()
    with_time, without = bench.cuda_event(), bench.cuda.Event(disable_timing=True)
    for event in (with_time, without):
        stream.record(event)
        event.synchronize()
    assert "Handle" in refused(bench, lambda: bench.elapsed(with_time, without))
    assert "Handle" in refused(bench, lambda: bench.elapsed(with_time, bench.cuda_event()))
