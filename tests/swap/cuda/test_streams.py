"""CopyStreams: which streams wait for what, when threads, streams and GPUs come and go."""

from __future__ import annotations

import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from chainer_ooc.swap.devices.cuda import streams
from chainer_ooc.swap.devices.cuda.device import CudaDevice
from chainer_ooc.swap.devices.protocol import Layout
from tests.doubles.simulated_cuda import CUDARuntimeError, SimulatedCuda
from tests.doubles.simulated_streams import Queue
from tests.swap.cuda.conftest import UNIT, on_pool


def array_of(device, owner):
    return device.view(owner, 0, Layout(np.dtype("f4"), (UNIT // 4,), (4,), 0, True))


def copied_out(rig, value=1.0):
    """Return a copy whose original is gone."""
    out = rig.device.copy_out(rig.owner(value), 0, UNIT)
    out.wait()
    return out.copy


def test_the_stream_on_which_the_device_is_made_is_waited_for(tmp_path):
    cupy = SimulatedCuda(2)
    cupy.eagerness = 0
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        device = CudaDevice(cupy, 0, str(tmp_path), 16 * UNIT)
        array = cupy.ndarray((UNIT // 4,), np.float32)
        array.fill(3)
    out = device.copy_out(array.data.mem, 0, UNIT)
    out.wait()
    device.close()
    cupy.check()


def test_the_stream_that_is_current_when_memory_is_copied_out_is_waited_for(rig):
    rig.cupy.eagerness = 0
    with rig.cupy.cuda.Stream(non_blocking=True):
        out = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
    owner, _, back = rig.device.copy_in(out.copy, UNIT, 0)
    back.join()
    assert set(array_of(rig.device, owner).get()) == {1}


def test_the_stream_that_is_current_when_a_copy_is_joined_waits(rig):
    copy = copied_out(rig)
    rig.cupy.eagerness = 0
    owner, _, back = rig.device.copy_in(copy, UNIT, 0)
    stream = rig.cupy.cuda.Stream(non_blocking=True)
    with stream:  # nothing was allocated on it
        back.join()
        assert set(array_of(rig.device, owner).get()) == {1}


def test_the_stream_that_is_current_when_memory_is_given_up_is_put_in_order(rig):
    array = rig.array(1.0)
    owner = array.data.mem
    rig.cupy.synchronize()
    rig.cupy.eagerness = 0
    with rig.cupy.cuda.Stream(non_blocking=True):
        array.add(1)  # nothing was allocated on it
        rig.device.before_release()
        del array, owner
    rig.array(2.0)


@on_pool
def test_a_stream_that_is_new_waits_for_copies_begun_before(rig):
    """Its free list may have a block that is still read: of memory from before it was seen."""
    stream = rig.cupy.cuda.Stream(non_blocking=True)
    with stream:
        array = rig.array(1.0)  # as with out-of-core mode off
        rig.array(0.0)
    rig.cupy.get_current_stream().wait_event(stream.record())
    rig.cupy.eagerness = 0
    out = rig.device.copy_out(array.data.mem, 0, UNIT)
    out.join()
    address = array.data.ptr
    del array
    rig.allocator.install()
    with stream:
        again = rig.array(7.0)
        assert again.data.ptr == address
    assert set(np.frombuffer(_bytes(rig, out.copy), "f4")) == {1}
    # The pool itself writes nothing: what is written comes after the allocator has returned.
    assert not [race for race in rig.cupy.races if race.startswith("a fill")]
    rig.cupy.races.clear()


def _bytes(rig, copy):
    import ctypes

    rig.cupy.synchronize()
    return bytes((ctypes.c_char * copy.nbytes).from_address(copy.address))


def test_a_stream_that_is_new_does_not_wait_where_nothing_is_copied(rig):
    before = rig.cupy.calls["wait_event"]
    with rig.cupy.cuda.Stream(non_blocking=True):
        rig.device.note_allocation()
    assert rig.cupy.calls["wait_event"] == before


def test_a_stream_that_is_known_does_not_wait_for_copies(rig):
    rig.cupy.eagerness = 0
    out = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
    before = rig.cupy.calls["wait_event"]
    rig.device.note_allocation()
    assert rig.cupy.calls["wait_event"] == before
    out.wait()


def test_copies_are_joined_on_their_own_gpu(make_rig):
    """The default stream is named alike on all GPUs, and is another on each."""
    rig = make_rig(devices=2, seed=2)
    copy = copied_out(rig)
    rig.cupy.eagerness = 0
    owner, _, back = rig.device.copy_in(copy, UNIT, 0)
    with rig.cupy.cuda.Device(1):
        back.join()
    assert set(array_of(rig.device, owner).get()) == {1}
    out = rig.device.copy_out(owner, 0, UNIT)
    with rig.cupy.cuda.Device(1):
        out.join()
        del owner
    rig.array(2.0)


def test_memory_is_given_up_on_its_own_gpu(make_rig):
    rig = make_rig(devices=2, seed=2)
    stream = rig.cupy.cuda.Stream(non_blocking=True)
    rig.cupy.eagerness = 0
    array = rig.array(1.0)
    with stream:
        stream.wait_event(rig.cupy.cuda.Stream(null=True).record())
        array.add(1)
        rig.device.note_allocation()
    with rig.cupy.cuda.Device(1):
        rig.device.before_release()
        del array
    rig.array(2.0)


def test_an_event_belongs_to_a_gpu():
    cupy = SimulatedCuda(devices=2)
    stream = cupy.cuda.Stream(non_blocking=True)
    with cupy.cuda.Device(1), pytest.raises(CUDARuntimeError, match="InvalidResourceHandle"):
        stream.record()


def in_thread(job):
    """Run a job in another thread; raise what it raises."""
    errors = []

    def work():
        try:
            job()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@pytest.fixture(params=["out", "in", "release"])
def way(request):
    return request.param


@pytest.mark.parametrize("noted", [True, False], ids=["both compute", "one computes"])
def test_default_streams_of_threads_are_put_in_order(make_rig, way, noted):
    """Each thread's is named alike, and only its own thread can wait on it: the host does."""
    rig = make_rig(per_thread=True, seed=2)
    rig.cupy.eagerness = 0
    copy = copied_out(rig)
    made = []

    def compute():
        made.append(rig.array(5.0).data.mem)
        if noted:
            rig.device.note_allocation()

    before = rig.cupy.calls["deviceSynchronize"]
    if not noted:
        compute()
        out = rig.device.copy_out(made.pop(), 0, UNIT)
        out.join()
        assert rig.cupy.calls["deviceSynchronize"] == before
        return
    in_thread(compute)
    if way == "out":
        out = rig.device.copy_out(made.pop(), 0, UNIT)
        out.join()
        owner, _, back = rig.device.copy_in(out.copy, UNIT, 0)
        back.join()
        assert set(array_of(rig.device, owner).get()) == {5}
    elif way == "in":
        owner, _, back = rig.device.copy_in(copy, UNIT, 0)
        back.join()

        def use():
            assert set(array_of(rig.device, owner).get()) == {1}
            rig.device.note_allocation()

        in_thread(use)
    else:
        rig.device.before_release()
        made.clear()
        rig.array(6.0)


def test_threads_on_a_common_default_stream_do_not_stop_the_host(rig):
    in_thread(rig.device.note_allocation)
    out = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
    out.join()
    assert rig.cupy.calls["deviceSynchronize"] == rig.cupy.calls["synchronize"] == 0


def test_one_computing_stream_needs_no_order(rig):
    rig.device.note_allocation()
    before = rig.cupy.calls["wait_event"]
    rig.device.before_release()
    assert rig.cupy.calls["wait_event"] == before


def test_the_default_stream_of_a_thread_that_is_new_waits_for_copies_begun_before(make_rig):
    rig = make_rig(per_thread=True, seed=2)
    with ThreadPoolExecutor(1) as other:
        array = other.submit(rig.array, 1.0).result()  # as with out-of-core mode off
        other.submit(rig.array, 0.0).result()
        rig.cupy.synchronize()
        rig.cupy.eagerness = 0
        out = rig.device.copy_out(array.data.mem, 0, UNIT)
        out.join()
        address = array.data.ptr
        del array
        rig.allocator.install()
        again = other.submit(rig.array, 7.0).result()
        assert again.data.ptr == address
    assert set(np.frombuffer(_bytes(rig, out.copy), "f4")) == {1}
    assert not [race for race in rig.cupy.races if race.startswith("a fill")]
    rig.cupy.races.clear()


@pytest.fixture
def clock(monkeypatch):
    """The host's clock: its ``now`` is what it says (seconds)."""
    clock = types.SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(streams, "time", clock)
    return clock


def passed(rig):
    """Return an event that has just been."""
    event = rig.device.mark()
    event.synchronize()
    return event


def test_when_events_were_is_known_by_the_hosts_clock(clock, make_rig):
    rig = make_rig(devices=2)
    clock.now = 300
    before = rig.cupy.calls["synchronize"]
    assert rig.device.streams.host_time(passed(rig)) == pytest.approx(0, abs=0.1)
    assert rig.cupy.calls["synchronize"] == before + 1  # the test's
    clock.now = 301
    with rig.cupy.cuda.Device(1):  # related anew
        assert rig.device.streams.host_time(passed(rig)) == pytest.approx(301, abs=0.1)


def test_the_clocks_are_not_related_anew_while_something_is_copied(clock, make_rig):
    rig = make_rig()
    rig.cupy.eagerness = 0
    out = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
    event = passed(rig)
    clock.now = 301
    assert rig.device.streams.host_time(event) == pytest.approx(0, abs=0.1)
    assert not out.done()
    out.wait()
    assert rig.device.streams.host_time(event) == pytest.approx(301, abs=0.1)


def test_what_is_marked_was_given_to_its_own_gpu(make_rig):
    rig = make_rig(devices=2)
    with rig.cupy.cuda.Device(1):
        assert rig.device.mark().device_id == 0


# External streams, which their owners may destroy at any time.


def computed_on_external(rig, owned, value=1.0):
    """Compute on a stream of another library. Return the memory."""
    with rig.cupy.cuda.ExternalStream(owned.ptr):
        array = rig.array(value)
        rig.device.note_allocation()
    return array.data.mem


def test_an_external_stream_that_is_left_is_not_used_again(make_rig, way):
    rig = make_rig(seed=2)
    copy = copied_out(rig)
    rig.cupy.eagerness = 0
    owned = rig.cupy.cuda.Stream(non_blocking=True)
    external = rig.cupy.cuda.ExternalStream(owned.ptr)  # it is referred to, and of no use
    with external:
        array = rig.array(5.0)
        rig.device.note_allocation()
    del owned  # destroyed; what it was given is still to be done
    if way == "out":
        out = rig.device.copy_out(array.data.mem, 0, UNIT)
        out.join()
        owner, _, back = rig.device.copy_in(out.copy, UNIT, 0)
        back.join()
        assert set(array_of(rig.device, owner).get()) == {5}
    elif way == "in":
        owner, _, back = rig.device.copy_in(copy, UNIT, 0)
        back.join()
        assert set(array_of(rig.device, owner).get()) == {1}
    else:
        rig.device.before_release()
        del array
        rig.array(6.0)
    assert rig.device.streams.are_one


def test_the_host_waits_once_for_an_external_stream(rig):
    owned = rig.cupy.cuda.Stream(non_blocking=True)
    owner = computed_on_external(rig, owned)
    before = rig.cupy.calls["deviceSynchronize"]
    for _ in range(3):
        rig.device.copy_out(owner, 0, UNIT).wait()
    assert rig.cupy.calls["deviceSynchronize"] == before + 1


def test_the_host_does_not_wait_while_an_external_stream_is_current(rig):
    owned = rig.cupy.cuda.Stream(non_blocking=True)
    with rig.cupy.cuda.ExternalStream(owned.ptr):
        before = rig.cupy.calls["deviceSynchronize"]
        for _ in range(3):
            out = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
            out.join()
            rig.device.before_release()
        assert rig.cupy.calls["deviceSynchronize"] == before


@pytest.mark.parametrize("kind", ["external", "own"])
def test_the_number_of_a_destroyed_stream_is_used_again(make_rig, kind):
    """What the first one was given comes before copies out all the same."""
    rig = make_rig(seed=2)
    rig.cupy.eagerness = 0
    owned = rig.cupy.cuda.Stream(non_blocking=True)
    number = owned.ptr
    owner = computed_on_external(rig, owned)
    del owned
    queue = rig.cupy._queues[number]
    rig.cupy._of_threads.append(queue)  # those without a number
    rig.cupy._queues[number] = Queue("the next stream", 0)
    again = rig.cupy.cuda.Stream(non_blocking=True)
    assert again.ptr == number
    assert again.queue is not queue
    with rig.cupy.cuda.ExternalStream(number) if kind == "external" else again:
        out = rig.device.copy_out(owner, 0, UNIT)
        assert not queue.items
        out.wait()
    del owner


def test_an_external_stream_of_another_thread_stays_known(make_rig):
    """That thread may go on computing on it and allocate nothing: the host waits each time."""
    rig = make_rig(seed=2)
    rig.cupy.eagerness = 0
    owned = rig.cupy.cuda.Stream(non_blocking=True)
    with ThreadPoolExecutor(1) as other:
        owner = other.submit(computed_on_external, rig, owned).result()
        for value in (1.0, 2.0):
            with_more = array_of(rig.device, owner)

            def fill(array=with_more, value=value):
                with rig.cupy.cuda.ExternalStream(owned.ptr):
                    array.fill(value)

            other.submit(fill).result()
            out = rig.device.copy_out(owner, 0, UNIT)
            out.wait()
            assert set(np.frombuffer(_bytes(rig, out.copy), "f4")) == {value}
    rig.device.before_release()  # its thread has ended
    assert rig.device.streams.are_one


def test_many_external_streams_are_forgotten(make_rig):
    rig = make_rig(limit=32 * UNIT, seed=2)
    owners = []
    for _ in range(2 * streams._MOST_STREAMS):
        owned = rig.cupy.cuda.Stream(non_blocking=True)
        owners.append(computed_on_external(rig, owned))
        rig.cupy.synchronize()
    assert len(rig.device.streams._compute) <= streams._MOST_STREAMS
    rig.device.copy_out(owners[0], 0, UNIT).wait()


def test_many_external_streams_that_live_are_forgotten_too(make_rig):
    rig = make_rig(limit=32 * UNIT, seed=2)
    rig.cupy.eagerness = 0
    owned = [rig.cupy.cuda.Stream(non_blocking=True) for _ in range(2 * streams._MOST_STREAMS)]
    owners = [computed_on_external(rig, one) for one in owned]
    assert len(rig.device.streams._compute) <= streams._MOST_STREAMS
    rig.device.copy_out(owners[0], 0, UNIT).wait()
