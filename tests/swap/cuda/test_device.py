"""CudaDevice alone: every copy comes after what it depends on, and before what depends on it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import itertools
import threading
import time
import weakref

import numpy as np
import pytest

from chainer_ooc.errors import SwapSpaceError
from chainer_ooc.swap.devices.copy_threads import THREADS
from chainer_ooc.swap.devices.cuda.device import STAGING, CudaDevice, new_slab
from chainer_ooc.swap.devices.cuda.device import _abandoned as abandoned
from chainer_ooc.swap.devices.cuda.transfers import DiskTransfer, FailedTransfer
from chainer_ooc.swap.devices.protocol import Layout
from chainer_ooc.swap.events import Observer
from chainer_ooc.swap.system import memory
from chainer_ooc.swap.tiers.pinned import CHUNK
from tests.doubles.adopted_arrays import AdoptedArrays
from tests.doubles.simulated_cuda import CUDARuntimeError, SimulatedCuda
from tests.doubles.simulated_memory import Gpu
from tests.swap.cuda.conftest import UNIT, on_pool


def array_of(rig, owner, nbytes=UNIT):
    return rig.device.view(owner, 0, Layout(np.dtype("f4"), (nbytes // 4,), (4,), 0, True))


def round_trip(rig, value, nbytes=UNIT):
    """Copy a value out, give its memory up, use the memory for something else, copy it in."""
    owner = rig.owner(value, nbytes)
    out = rig.device.copy_out(owner, 0, nbytes)
    out.join()
    del owner
    rig.array(-1.0, nbytes)
    owner, origin, transfer = rig.device.copy_in(out.copy, nbytes, 0)
    assert origin == 0
    transfer.join()
    return array_of(rig, owner, nbytes), out.copy


def test_a_round_trip_keeps_the_bytes_and_never_stops_the_host(rig):
    array, copy = round_trip(rig, 3.0)
    assert rig.cupy.calls["synchronize"] == rig.cupy.calls["deviceSynchronize"] == 0
    assert (array.get() == 3).all()
    copy.free()


@pytest.mark.parametrize("nbytes", [512, UNIT + 512, 3 * UNIT])
def test_a_round_trip_through_the_file(make_rig, nbytes):
    rig = make_rig(host_limit=0)
    array, copy = round_trip(rig, 5.0, nbytes)
    assert (array.get() == 5).all()
    assert rig.device.disk.file.allocated >= nbytes
    copy.free()
    assert rig.device.disk.file.allocated == 0


def test_the_copy_out_comes_after_what_was_computed(rig):
    owner = rig.owner(1.0)
    array_of(rig, owner).add(1)
    out = rig.device.copy_out(owner, 0, UNIT)
    out.join()
    array_of(rig, owner).add(1)  # not part of the copy
    new, _, back = rig.device.copy_in(out.copy, UNIT, 0)
    back.join()
    assert (array_of(rig, new).get() == 2).all()


def test_work_on_a_stream_of_the_users_is_waited_for(rig):
    stream = rig.cupy.cuda.Stream(non_blocking=True)
    with stream:
        owner = rig.owner(1.0)
        rig.device.note_allocation()
        array_of(rig, owner).add(1)
    out = rig.device.copy_out(owner, 0, UNIT)  # with another stream current
    out.join()
    del owner
    with stream:  # the memory is on this stream's free list
        other = rig.array(9.0)
        owner, _, back = rig.device.copy_in(out.copy, UNIT, 0)
        back.join()
        assert (array_of(rig, owner).get() == 2).all()
    assert (other.get() == 9).all()


def test_streams_that_are_gone_are_forgotten(rig):
    for _ in range(50):
        with rig.cupy.cuda.Stream():
            rig.device.note_allocation()
    assert len(rig.device.streams._compute) <= 8
    kept = [rig.cupy.cuda.Stream() for _ in range(20)]
    for stream in kept:
        with stream:
            rig.device.note_allocation()
    assert len(rig.device.streams._compute) >= 20
    del kept, stream
    rig.cupy.eagerness = 0
    busy = rig.cupy.cuda.Stream()
    with busy:
        rig.array(0.0)
        rig.device.note_allocation()
    reference = weakref.ref(busy)
    del busy
    for _ in range(20):
        with rig.cupy.cuda.Stream():
            rig.device.note_allocation()
    assert reference() is not None  # what it was given may use what is copied
    rig.cupy.synchronize()
    for _ in range(20):
        with rig.cupy.cuda.Stream():
            rig.device.note_allocation()
    assert reference() is None


def test_a_copy_in_waits_for_the_copy_out_of_the_same_bytes(rig):
    owner = rig.owner(4.0)
    out = rig.device.copy_out(owner, 0, UNIT)
    new, _, back = rig.device.copy_in(out.copy, UNIT, 0)
    back.join()
    assert (array_of(rig, new).get() == 4).all()
    out.wait()


@pytest.mark.parametrize("host_limit", [0, 16 * UNIT])
@pytest.mark.parametrize("way", ["out", "in"])
def test_the_memory_is_held_until_the_copy_has_ended(make_rig, host_limit, way):
    rig = make_rig(host_limit=host_limit)
    rig.cupy.eagerness = 0
    owner = rig.owner(4.0)
    transfer = rig.device.copy_out(owner, 0, UNIT)
    if way == "in":
        transfer.join()
        owner, _, transfer = rig.device.copy_in(transfer.copy, UNIT, 0)
    del owner
    gc.collect()
    if host_limit:
        assert rig.pool.used_bytes() == UNIT  # nobody waited: it cannot have ended
        assert not transfer.done()
        rig.cupy.synchronize()
    while not transfer.done():
        pass
    assert rig.pool.used_bytes() == 0


@pytest.mark.parametrize("host_limit", [0, 16 * UNIT])
@pytest.mark.parametrize("ended_by", ["join", "wait"])
def test_the_memory_is_let_go_when_the_copy_is_waited_for(make_rig, host_limit, ended_by):
    rig = make_rig(host_limit=host_limit)
    owner = rig.owner(4.0)
    transfer = rig.device.copy_out(owner, 0, UNIT)
    del owner
    getattr(transfer, ended_by)()
    assert rig.pool.used_bytes() == 0
    rig.array(1.0)


def test_waiting_is_the_hosts(rig):
    owner = rig.owner(4.0)
    transfer = rig.device.copy_out(owner, 0, UNIT)
    transfer.wait()
    assert transfer.done()
    assert (np.frombuffer(_bytes(transfer.copy), "f4") == 4).all()


def _bytes(copy):
    return bytes((ctypes.c_char * copy.nbytes).from_address(copy.address))


@pytest.mark.parametrize("joined", [True, False])
def test_a_block_is_not_used_again_while_a_copy_reads_it(make_rig, joined):
    rig = make_rig(host_limit=6 * UNIT)  # 4 are for staging blocks
    rig.cupy.eagerness = 0
    first = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
    first.join()
    owner, _, back = rig.device.copy_in(first.copy, UNIT, 0)
    if joined:
        back.join()
    first.copy.free()  # the GPU may not have begun to read it
    size = rig.device.host.slab.limit
    others = [rig.device.copy_out(rig.owner(7.0), 0, UNIT) for _ in range(size // UNIT)]
    assert all(transfer.copy.address for transfer in others)
    back.join()
    assert (array_of(rig, owner).get() == 1).all()
    for transfer in others:
        transfer.wait()


def test_a_block_is_not_used_again_while_a_copy_writes_it(make_rig):
    rig = make_rig(host_limit=6 * UNIT)
    rig.cupy.eagerness = 0
    first = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
    first.copy.free()
    assert rig.device.host.slab.allocated == UNIT
    again = [rig.device.copy_out(rig.owner(2.0), 0, UNIT) for _ in range(2)]
    for transfer in again:
        transfer.wait()
        assert (np.frombuffer(_bytes(transfer.copy), "f4") == 2).all()
        transfer.copy.free()
    assert rig.device.host.slab.allocated == 0
    first.wait()


@pytest.mark.parametrize("host_limit", [0, 16 * UNIT])
def test_copies_are_freed_once(make_rig, host_limit):
    rig = make_rig(host_limit=host_limit)
    transfer = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
    transfer.wait()
    transfer.copy.free()
    transfer.copy.free()
    assert rig.device.host.slab.allocated == rig.device.disk.file.allocated == 0


def test_the_slab_overflows_to_the_file(make_rig):
    rig = make_rig(host_limit=7 * UNIT)
    transfers = [rig.device.copy_out(rig.owner(float(i)), 0, UNIT) for i in range(6)]
    for transfer in transfers:
        transfer.join()
    assert 2 * UNIT <= rig.device.disk.file.allocated <= 4 * UNIT
    assert sum(rig.cupy.pinned.values()) <= 7 * UNIT
    for i, transfer in enumerate(transfers):
        owner, _, back = rig.device.copy_in(transfer.copy, UNIT, 0)
        back.join()
        assert (array_of(rig, owner).get() == i).all()


def test_host_and_disk_full(make_rig, monkeypatch):
    rig = make_rig(host_limit=0)

    def full(extent):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rig.device.disk.file, "_reserve", full)
    owner = rig.owner(6.0)
    with pytest.raises(SwapSpaceError, match=r"no data was lost.*host_limit") as error:
        rig.device.copy_out(owner, 0, UNIT)
    assert error.value.errno == errno.ENOSPC
    assert (array_of(rig, owner).get() == 6).all()


def test_no_memory_can_be_locked_at_all(make_rig):
    rig = make_rig()
    rig.cupy.fail["hostRegister"] = list(range(20))
    with pytest.raises(SwapSpaceError, match="ulimit -l"):
        rig.device.copy_out(rig.owner(6.0), 0, UNIT)
    rig.cupy.fail.clear()  # others have given memory back
    rig.device.copy_out(rig.owner(6.0), 0, UNIT).join()


def test_staging_blocks_are_given_back_when_there_are_too_few(make_rig):
    rig = make_rig(host_limit=0)
    staging = rig.device.disk.staging
    staging.limit = 2 * rig.device.disk.piece  # of four
    for _ in range(2):
        with pytest.raises(SwapSpaceError, match="staging blocks"):
            rig.device.copy_out(rig.owner(6.0), 0, UNIT)
        assert staging.allocated == staging.size == 0
        assert rig.cupy.pinned == {}


@pytest.mark.parametrize("refused", [0, 1, 2, 3])
def test_staging_blocks_are_given_back_when_a_later_one_is_refused(make_rig, refused, monkeypatch):
    monkeypatch.setattr("chainer_ooc.swap.tiers.pinned.CHUNK", UNIT)  # a chunk for each
    rig = make_rig(host_limit=0)
    rig.cupy.fail["hostRegister"] = [*range(refused, 40)]
    with pytest.raises(SwapSpaceError, match="staging blocks"):
        rig.device.copy_out(rig.owner(6.0), 0, UNIT)
    assert rig.cupy.pinned == {}
    rig.cupy.fail.clear()
    rig.device.copy_out(rig.owner(6.0), 0, UNIT).join()
    assert sum(rig.cupy.pinned.values()) == rig.device.staging_bytes


def test_staging_blocks_are_not_taken_where_the_machine_has_no_memory(make_rig, monkeypatch):
    rig = make_rig(host_limit=0)
    free = [rig.device.staging_bytes - 1]
    monkeypatch.setattr(memory, "available_bytes", lambda: free[0])
    with pytest.raises(SwapSpaceError, match="free -h"):
        rig.device.copy_out(rig.owner(6.0), 0, UNIT)
    assert rig.cupy.pinned == {}
    free[0] += 1
    rig.device.copy_out(rig.owner(6.0), 0, UNIT).join()


class Machine:
    """The host's memory: what is page-locked is taken, and ``others`` is what other code has taken (bytes)."""

    def __init__(self, cupy, total):
        self.cupy, self.total, self.others = cupy, total, 0

    def available_bytes(self):
        return self.total - self.others - sum(self.cupy.pinned.values())


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 0.79, 0.9])
def test_chunks_leave_room_for_what_has_grown_meanwhile(monkeypatch, share, ranks):
    """Data loaders and other ranks grow between the first array and the last chunk."""
    chunk, total = 1 << 20, 40 << 20
    monkeypatch.setattr("chainer_ooc.swap.tiers.pinned.CHUNK", chunk)
    cupy = SimulatedCuda()
    machine = Machine(cupy, total)
    monkeypatch.setattr(memory, "available_bytes", machine.available_bytes)
    monkeypatch.setenv("MPI_LOCALNRANKS", str(ranks))
    slab = new_slab(cupy, None)
    slab.allocate(chunk // 4)  # makes one chunk
    slab.wait()
    machine.others = int(total * share)

    def fill():
        while slab.allocate(chunk // 4) is not None:
            slab.wait()

    fill()
    taken = sum(cupy.pinned.values())
    may_take = max(0.8 * total - machine.others, chunk)
    assert taken <= may_take
    # Of what others leave, this rank has its share of what was there when it asked last.
    assert taken >= (may_take - 4 * chunk) / ranks
    machine.others = 0  # they have given it back
    fill()
    assert slab.size >= slab.limit - chunk
    slab.close()


def test_a_limit_that_the_machine_does_not_have_leaves_room_for_staging_blocks(
    make_rig, monkeypatch
):
    rig = make_rig(host_limit=16 << 20)
    machine = Machine(rig.cupy, 1 << 30)
    monkeypatch.setattr(memory, "available_bytes", machine.available_bytes)
    machine.others = machine.total - STAGING - 4 * UNIT
    kept = []
    for value in range(8):
        kept.append(rig.device.copy_out(rig.owner(float(value)), 0, UNIT))
        kept[-1].join()
    assert rig.device.host.slab.size == rig.device.host.slab.allocated == 4 * UNIT
    assert rig.device.disk.file.allocated == 4 * UNIT


@pytest.mark.parametrize("host_limit", [0, 16 * UNIT])
@pytest.mark.parametrize("number", range(3))
def test_where_no_event_can_be_made_nothing_is_lost(make_rig, host_limit, number):
    """Of a copy that is under way the end must be known, or its memory would be used by others meanwhile."""
    rig = make_rig(host_limit=host_limit)
    owner = rig.owner(6.0)
    rig.cupy.fail["Event"] = [number]
    try:
        out = rig.device.copy_out(owner, 0, UNIT)
        out.wait()
        with contextlib.suppress(OSError):
            out.join()
        out.copy.free()
    except CUDARuntimeError:
        pass
    rig.cupy.fail.clear()
    rig.cupy.synchronize()
    if host_limit:
        rig.device.host.allocate(1).free()
    assert rig.device.host.slab.allocated == 0
    out = rig.device.copy_out(owner, 0, UNIT)
    out.join()
    owner, _, back = rig.device.copy_in(out.copy, UNIT, 0)
    back.join()
    assert (array_of(rig, owner).get() == 6).all()


@pytest.mark.parametrize("host_limit", [0, 16 * UNIT])
def test_a_copy_that_cannot_be_begun_fails_when_it_is_joined(make_rig, host_limit):
    rig = make_rig(host_limit=host_limit)
    rig.cupy.fail["memcpyAsync"] = [0]
    out = rig.device.copy_out(rig.owner(6.0), 0, UNIT)
    out.wait()
    assert out.done()
    with pytest.raises(OSError, match="cannot be begun"):
        out.join()
    assert isinstance(out, FailedTransfer) == bool(host_limit)
    out.copy.free()
    out = rig.device.copy_out(rig.owner(6.0), 0, UNIT)
    out.join()
    rig.cupy.fail["memcpyAsync"] = [0]
    _, _, back = rig.device.copy_in(out.copy, UNIT, 0)
    with pytest.raises(OSError, match="cannot be begun"):
        back.join()
    owner, _, back = rig.device.copy_in(out.copy, UNIT, 0)
    back.join()
    assert (array_of(rig, owner).get() == 6).all()


def test_arrays_may_be_of_another_kind(rig, tmp_path):
    arrays = AdoptedArrays(rig.cupy)
    assert CudaDevice(rig.cupy, 0, str(tmp_path), 0, arrays).arrays is arrays


@on_pool
def test_which_arrays_stay(rig, monkeypatch):
    array = rig.array(1.0)
    assert rig.device.locate(array).nbytes == UNIT
    assert rig.device.locate(np.zeros(3)) is None
    monkeypatch.setattr(array.data.mem, "identity", "ManagedMemory")
    assert rig.device.locate(array) is None

    class Foreign:
        ptr, size, device_id = array.data.ptr, UNIT, 0

    foreign = rig.cupy.ndarray((4,), "f4", rig.cupy.cuda.MemoryPointer(Foreign(), 0))
    assert rig.device.locate(foreign) is None


def test_views_lie_where_they_lay(rig):
    array = rig.array(1.0)
    view = rig.cupy.ndarray((3,), "f4", rig.cupy.cuda.MemoryPointer(array.data.mem, 64), (8,))
    location = rig.device.locate(view)
    assert (location.owner, location.offset) == (array.data.mem, 64)
    again = rig.device.view(location.owner, 0, Layout(view.dtype, (3,), (8,), 64, True))
    assert (again.data.ptr, again.strides) == (view.data.ptr, (8,))


def layout_of(nbytes):
    """Return the layout of an array that fills a storage of that size."""
    return Layout(np.dtype("f4"), (nbytes // 16, 4), (16, 4), 0, True)


def numbers(layout):
    return np.arange(np.prod(layout.shape)).reshape(layout.shape)


def filled(rig, layout, pointer=None, strides=None):
    """Return an array of numbers that are all different."""
    array = rig.cupy.ndarray(layout.shape, layout.dtype, pointer, strides)
    rig.cupy.synchronize()  # the pool's first use of it
    array.view()()[...] = numbers(layout)
    return array


def test_an_array_that_lies_as_it_lay_is_taken_as_it_is(rig):
    layout = layout_of(UNIT)
    array = filled(rig, layout)
    assert rig.device.take_buffer(array, layout, UNIT, 0) == (array.data.mem, 0)


@pytest.mark.parametrize("differs", ["strides", "offset", "size", "allocator"])
@on_pool
def test_an_array_that_lies_otherwise_than_it_lay_is_copied(make_rig, monkeypatch, differs):
    rig = make_rig(devices=2)
    layout = layout_of(UNIT // 2 if differs == "offset" else UNIT)
    memory = rig.owner(1.0, 2 * UNIT if differs == "size" else UNIT)
    offset = UNIT // 2 if differs == "offset" else 0
    strides = (4, UNIT // 4) if differs == "strides" else None
    array = filled(rig, layout, rig.cupy.cuda.MemoryPointer(memory, offset), strides)
    if differs == "allocator":
        monkeypatch.setattr(memory, "identity", "ManagedMemory")
    with rig.cupy.cuda.Device(1):
        owner, origin = rig.device.take_buffer(array, layout, UNIT, 0)
    assert owner is not memory
    assert (owner.size, owner.device_id, origin) == (UNIT, 0, 0)
    assert (rig.device.view(owner, 0, layout).get() == numbers(layout)).all()


def test_the_other_gpu_may_be_current(make_rig):
    rig = make_rig(devices=2)
    array = rig.array(2.0)
    owner = array.data.mem
    del array
    with rig.cupy.cuda.Device(1):
        other = rig.cupy.ndarray((UNIT,), "f4")
        assert rig.device.used_bytes() == UNIT
        out = rig.device.copy_out(owner, 0, UNIT)
        out.join()
        owner, _, back = rig.device.copy_in(out.copy, UNIT, 0)
        back.join()
        assert owner.device_id == 0
        assert rig.device.streams._out.device_id == 0
    assert (array_of(rig, owner).get() == 2).all()
    assert other.data.mem.device_id == 1


def test_all_is_asked_of_its_own_gpu_while_another_is_current(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # no ranks share it
    cupy = SimulatedCuda(2, total=32 * UNIT, devices=2)
    cupy.eagerness = 0
    cupy.gpus[1] = Gpu(64 * UNIT)
    pool = cupy.get_default_memory_pool()
    pool.set_limit(20 * UNIT)
    with cupy.cuda.Device(1):
        pool.set_limit(5 * UNIT)
        device = CudaDevice(cupy, 0, str(tmp_path), 16 * UNIT)
        assert device.own_limit == 20 * UNIT
        assert device.stand_in.data.device_id == 0
    assert {device.streams._out.device_id, device.streams._back.device_id} == {0}
    array = cupy.ndarray((UNIT // 4,), np.float32)
    array.fill(3)
    with cupy.cuda.Device(1):
        other = cupy.ndarray((UNIT,), np.float32)
        assert device.total_bytes() == 32 * UNIT
        assert device.capacity() == 20 * UNIT
        device.own_limit = 0
        assert device.capacity() == UNIT + int(31 * UNIT * 0.95)
        assert device.peak_bytes() == UNIT
        found = device.checksum(array.data.mem, 0, UNIT)
    assert found == device.checksum(array.data.mem, 0, UNIT)
    del other
    device.close()
    cupy.check()


def test_memory_is_locked_with_its_own_gpu_current(tmp_path, monkeypatch):
    """In a thread that makes chunks ahead, another would be: locking makes a context there, of hundreds of MiB."""
    cupy = SimulatedCuda(devices=2)
    seen = []
    real = cupy.cuda.runtime.hostRegister

    def register(*args):
        seen.append((threading.current_thread().name, cupy.cuda.runtime.getDevice()))
        real(*args)

    monkeypatch.setattr(cupy.cuda.runtime, "hostRegister", register)
    with cupy.cuda.Device(1):
        slab = new_slab(cupy, 3 * CHUNK)
        assert slab.allocate(CHUNK * 3 // 4) is not None
        slab.wait()
    assert [device_id for _, device_id in seen] == [1, 1]
    assert seen[1][0] == "chainer_ooc-pin"
    slab.close()


def test_what_it_says_of_its_memory(make_rig, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    rig = make_rig()
    held = [rig.array(1.0) for _ in range(3)]
    assert rig.device.used_bytes() == 3 * UNIT
    held.clear()
    rig.device.note_allocation()
    assert rig.device.used_bytes() == 0
    assert rig.device.peak_bytes() == 3 * UNIT
    rig.pool.free_all_blocks()
    assert rig.device.peak_bytes() == 3 * UNIT
    assert rig.device.total_bytes() == 32 * UNIT
    assert rig.device.capacity() == int(32 * UNIT * 0.95)
    monkeypatch.setenv("MPI_LOCALNRANKS", "4")
    assert rig.device.total_bytes() == 8 * UNIT
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert rig.device.total_bytes() == 8 * UNIT
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert rig.device.total_bytes() == 32 * UNIT


@pytest.mark.parametrize("way", ["out", "in"])
@pytest.mark.parametrize("host_limit", [0, 16 * UNIT])
def test_closing_waits_for_the_copies(make_rig, host_limit, way):
    rig = make_rig(host_limit=host_limit)
    before = threading.active_count()
    rig.cupy.eagerness = 0
    transfer = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
    if way == "in":
        transfer.wait()
        _, _, transfer = rig.device.copy_in(transfer.copy, UNIT, 0)
    rig.device.close()
    assert not rig.cupy.pinned
    assert transfer.done()
    assert threading.active_count() == before
    assert rig.device.disk.file.allocated == 0


def test_a_closed_device_reads_no_copies_and_may_be_used_again(make_rig):
    rig = make_rig(host_limit=0, limit=32 * UNIT)
    out = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
    out.join()
    rig.device.close()
    with pytest.raises(OSError, match="closed"):
        rig.device.copy_in(out.copy, UNIT, 0)
    array, copy = round_trip(rig, 2.0, 12 * UNIT)  # several pieces for each thread
    assert (array.get() == 2).all()
    assert rig.device.disk._blocks.qsize() == THREADS  # and none of before
    copy.free()


@pytest.mark.parametrize("way", ["out", "in"])
def test_waiting_for_the_file_takes_until_the_last_piece(make_rig, monkeypatch, way):
    rig = make_rig(host_limit=0)
    file = rig.device.disk.file
    gate, real = threading.Event(), {"out": file.write, "in": file.read}[way]

    def slow(offset, memory):
        gate.wait(20)
        real(offset, memory)

    out = rig.device.copy_out(rig.owner(1.0), 0, UNIT) if way == "in" else None
    if out is not None:
        out.join()
    monkeypatch.setattr(file, {"out": "write", "in": "read"}[way], slow)
    if out is None:
        transfer = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
    else:
        _, _, transfer = rig.device.copy_in(out.copy, UNIT, 0)
    waiter = threading.Thread(target=transfer.wait)
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    assert not transfer.done()
    assert rig.pool.used_bytes() == UNIT
    gate.set()
    waiter.join()
    assert transfer.done()


def test_memory_of_no_pool_moves_too(rig):
    rig.cupy.cuda.set_allocator(None)
    array = rig.array(4.0)
    location = rig.device.locate(array)
    assert (location.nbytes, location.offset) == (UNIT, 0)
    out = rig.device.copy_out(location.owner, 0, UNIT)
    out.join()
    del array, location
    owner, _, back = rig.device.copy_in(out.copy, UNIT, 0)
    back.join()
    assert (array_of(rig, owner).get() == 4).all()


def test_what_is_copied_in_counts_for_the_peak(rig):
    out = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
    out.wait()
    held = [rig.array(0.0) for _ in range(3)]
    owner, _, back = rig.device.copy_in(out.copy, UNIT, 0)
    back.wait()
    del owner
    held.clear()
    rig.pool.free_all_blocks()
    assert rig.device.peak_bytes() == 4 * UNIT
    held = [rig.array(0.0) for _ in range(6)]  # nobody told
    assert rig.device.peak_bytes() == 6 * UNIT


def test_the_file_may_move(make_rig, tmp_path):
    rig = make_rig(host_limit=0)
    out = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
    out.join()
    first = rig.device.disk.file
    rig.device.move_to(first.directory)
    assert rig.device.disk.file is first
    (tmp_path / "other").mkdir()
    rig.device.move_to(str(tmp_path / "other"))
    again = rig.device.copy_out(rig.owner(2.0), 0, UNIT)
    again.join()
    assert rig.device.disk.file.directory == str(tmp_path / "other")
    assert (first.allocated, rig.device.disk.file.allocated) == (UNIT, UNIT)
    for copy, value in ((out.copy, 1), (again.copy, 2)):
        owner, _, back = rig.device.copy_in(copy, UNIT, 0)
        back.join()
        assert (array_of(rig, owner).get() == value).all()
        copy.free()
    assert first.allocated == rig.device.disk.file.allocated == 0


def test_a_forked_child_has_nothing_and_destroys_nothing(make_rig, tmp_path):
    rig = make_rig()
    device = CudaDevice(rig.cupy, 0, str(tmp_path), 7 * UNIT)
    for value in range(4):
        out = device.copy_out(rig.owner(value), 0, UNIT)
        out.wait()
    before = dict(rig.cupy.pinned)
    assert len(before) == 2  # of staging blocks, too
    kept = [weakref.ref(one) for one in (device.streams, device.host, device.disk)]
    device.after_fork()
    out.copy.free()
    assert rig.cupy.pinned == before
    assert device.host.slab.allocate(1) is None
    device.host.slab.close()
    device.disk.staging.close()
    assert rig.cupy.pinned == before
    del device, out
    gc.collect()
    assert all(reference() is not None for reference in kept)
    abandoned.pop()
    rig.cupy.pinned.clear()


def test_when_copies_began_and_ended_is_known_later_and_the_host_waits_for_nothing(rig):
    transfers = [rig.device.copy_out(rig.owner(float(n)), 0, UNIT) for n in range(3)]
    before = time.perf_counter()
    for transfer in transfers:
        transfer.join()
        assert not transfer._event.done and transfer.span() is None
    assert rig.cupy.calls["synchronize"] == 0
    while not all(transfer.done() for transfer in transfers):
        transfers[-1].wait()
    spans = [transfer.span() for transfer in transfers]
    starts, ends = zip(*spans, strict=True)
    assert all(start < end for start, end in spans)
    assert list(starts) == sorted(starts) and ends[0] <= starts[1]
    assert abs(starts[0] - before) < 5
    for transfer in transfers:
        transfer.copy.free()


@pytest.mark.parametrize("end", ["done", "wait", "join"])
def test_the_memory_stays_until_all_pieces_have_ended(end):
    class Owner:
        pass

    owner = Owner()
    reference = weakref.ref(owner)
    transfer = DiskTransfer(None, 2, owner)
    del owner
    transfer.run(lambda: (2.0, 5.0))
    assert not transfer.done()
    assert reference() is not None
    transfer.run(lambda: (1.0, 3.0))
    assert reference() is not None  # no copying thread frees a GPU's memory
    getattr(transfer, end)()
    assert reference() is None
    assert transfer.span() == (1.0, 5.0)
    assert transfer.arrival() is None  # the GPU's clock does not know it


def test_what_is_computed_is_timed_on_the_gpu(rig):
    marks = [rig.device.mark()]
    for _ in range(3):
        rig.array(1.0)
        marks.append(rig.device.mark())
    seconds = [rig.device.seconds(a, b) for a, b in itertools.pairwise(marks)]
    assert all(one > 0 for one in seconds)
    assert rig.device.seconds(marks[0], marks[-1]) == pytest.approx(sum(seconds))
    assert rig.device.seconds(marks[-1], marks[0]) < 0


def test_copies_whose_end_nobody_waited_for_are_counted_when_they_are_known(rig):
    told = []

    class Watch(Observer):
        def copied(self, copied, span):
            told.append((copied.label, copied.out, copied.nbytes))

    rig.manager._observers.append(Watch())
    saved = [rig.save(float(n)) for n in range(3)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved, read_only=True)
    rig.device.streams.synchronize()
    out, back = rig.manager.bandwidths(0.0)
    assert out > 0 and back > 0
    expected = [(f"f{float(n)}", out, UNIT) for out in (True, False) for n in range(3)]
    assert sorted(told) == sorted(expected)
    assert rig.manager.counters.copy_seconds > 0
