"""While a program captures a CUDA graph nothing moves and nothing is recorded; afterwards all goes on.

The double raises, and counts as a race, whatever would belong to the graph or spoil it.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time

import pytest

from chainer_ooc.errors import OutOfCoreError
from chainer_ooc.planning.executor import PlanExecutor
from chainer_ooc.planning.plan import Plan
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.cuda import host
from chainer_ooc.swap.storage import State
from tests.doubles.simulated_cuda import OutOfMemoryError
from tests.swap.cuda.conftest import UNIT, host_bytes, states, values
from tests.swap.cuda.test_eviction import with_recipe
from tests.swap.cuda.test_late_verdicts import begin

LIMIT = 8 * UNIT


@pytest.fixture(params=[0.0, 0.6])
def rig(request, make_rig):
    """A rig whose program computes on a stream of its own."""
    rig = make_rig(seed=2, limit=LIMIT, total=64 * UNIT)
    rig.cupy.eagerness = request.param
    rig.stream = rig.cupy.cuda.Stream(non_blocking=True)
    rig.pool.set_limit(0)
    with rig.stream:
        rig.device.note_allocation()
        yield rig


@contextlib.contextmanager
def capture(rig, stream=None):
    stream = stream or rig.stream
    stream.begin_capture()
    try:
        yield
    finally:
        stream.end_capture()
    assert rig.cupy.races == []


def test_no_room_is_made(rig):
    saved = [rig.save(float(i)) for i in range(7)]
    before = states(saved)
    with capture(rig):
        assert not rig.manager.make_room(4 * UNIT)
        assert rig.manager.make_room(0)
        assert rig.manager.reclaim(UNIT) == 0
        rig.manager.move_all_out()
        assert states(saved) == before
    assert rig.manager.make_room(4 * UNIT)
    assert states(saved) != before
    assert values(saved) == list(range(7))


def test_allocations_go_on(rig):
    rig.allocator.install()
    saved = [rig.save(float(i)) for i in range(6)]
    with capture(rig):
        more = [rig.array(9.0) for _ in range(4)]  # beyond the limit, which the pool does not know
        assert states(saved) == [State.RESIDENT] * 6
        rig.pool.set_limit(10 * UNIT)
        with pytest.raises(OutOfMemoryError):
            rig.array(9.0)
    rig.array(9.0)
    assert State.RESIDENT not in states(saved[:2])
    del more
    assert values(saved) == list(range(6))


def test_copies_that_are_under_way_are_left_alone(rig):
    saved = [rig.save(float(i)) for i in range(4)]
    transfers = rig.manager._transfers
    for number in range(4):
        transfers.begin_out(saved[number].storage)
    held = saved[1].get()
    with capture(rig):
        assert not saved[0].storage.transfer.done()
        assert transfers.first_left() is None
        rig.manager.release_use(saved[1:2], drop=False)
        rig.manager.release_use(saved[2:3], drop=True)
        dead = saved.pop()
        del dead
        gc.collect()
        rig.manager.usage_without_offload(0)
        assert repr(rig.manager)
        assert rig.manager.measured_bandwidths() == (None, None)
    assert held.get()[0] == 1
    rig.manager.settle()
    assert values(saved[:2]) == [0, 1]
    del saved, held
    gc.collect()
    rig.manager.settle()
    assert host_bytes(rig) == 0


@pytest.mark.parametrize("state", [State.OUT, State.COMING_IN, State.DISCARDED])
def test_what_is_not_in_memory_cannot_be_read(rig, state):
    """The copy would be made whenever the graph runs, and not before."""
    x = rig.save(3.0)
    transfers = rig.manager._transfers
    if state is State.DISCARDED:
        y = begin_and_end(rig, x)
    else:
        y = x
        transfers.begin_out(y.storage)
        transfers.end_out(y.storage)
        transfers.release(y.storage)
        if state is State.COMING_IN:
            transfers.begin_in(y.storage, ahead=True)
    assert y.storage.state is state
    with capture(rig):
        for read in (y.get, lambda: rig.manager.fetch([y], True)):
            with pytest.raises(OutOfCoreError, match="while a CUDA graph is captured"):
                read()
    assert y.storage.state is state
    assert y.get().get()[0] == (4.0 if state is State.DISCARDED else 3.0)


def begin_and_end(rig, x):
    y = with_recipe(rig, x)
    rig.manager._evictor.give_up(y.storage)
    if y.storage.state is State.CHECKING:
        rig.manager._transfers.end_discard(y.storage)
    return y


def test_what_is_in_memory_can_be_read(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    with capture(rig):
        arrays = rig.manager.fetch(saved, True)
        rig.manager.prefetch(saved)
    assert [array.get()[0] for array in arrays] == [0, 1, 2]


def test_nothing_is_prefetched(rig):
    saved = [rig.save(float(i)) for i in range(6)]
    rig.manager.move_all_out()
    del saved[5:]
    last = saved[-1].get()
    before = states(saved)
    assert State.OUT in before
    with capture(rig):
        rig.manager.prefetch(saved[-1:])
        assert states(saved) == before
    rig.manager.prefetch(saved[-1:])
    assert states(saved) != before
    del last


def test_a_plan_waits(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    plan = Plan("graph", (), copy_out=((1, 0), (1, 1)), need_bytes=(0,) * 4)
    executor = PlanExecutor(plan, lambda number: saved[number].storage)
    rig.manager.run_plan(executor, 0)
    with capture(rig):
        rig.manager.run_plan(executor, 1)
        assert states(saved) == [State.RESIDENT] * 3
    rig.manager.run_plan(executor, 2)
    assert states(saved[:2]) == [State.GOING_OUT] * 2
    rig.manager.run_plan(None)


def test_no_moment_is_recorded(rig):
    before = rig.device.mark()
    with capture(rig):
        now = rig.device.mark()
        assert rig.device.seconds(before, before) == 0
    after = rig.device.mark()
    assert now is None
    assert rig.device.seconds(before, now) == rig.device.seconds(now, after) == 0
    assert rig.device.seconds(before, after) >= 0


def test_no_fingerprint_is_taken(rig):
    array = rig.array(1.0)

    def take():
        return rig.device.fingerprint(array.data.mem, 0, UNIT)

    pair = take(), take()
    with capture(rig):
        assert take() is None
        assert not rig.device.compare([pair]).equal()
    assert rig.device.compare([pair]).equal()


def test_verdicts_are_known_later(rig):
    x = rig.save(1.0)
    y = begin_and_end(rig, x)
    assert y.get().get()[0] == 2
    z = begin(rig, with_recipe(rig, x)) if not rig.cupy.eagerness else None
    with capture(rig):
        rig.manager.check_remade()
        assert z is None or not z.storage.verdict.done()
    rig.manager.check_remade()
    assert not rig.manager._transfers._remade


def test_nothing_is_verified(rig):
    rig.settings = Settings(limit=LIMIT, min_bytes=1, verify=True)
    one = rig.save(1.0)
    assert one.storage.checksum is not None
    with capture(rig):
        two = rig.save(2.0)
        rig.manager.fetch([one, two], True)
        rig.manager.check_unchanged(one.get())
    rig.manager.fetch([one, two], True)
    assert two.storage.checksum is None
    rig.manager.move_all_out()
    assert values([one, two]) == [1, 2]


def test_a_stream_that_is_new_when_it_is_captured(rig):
    """It may own blocks that copies read: it waits for them afterwards."""
    rig.cupy.eagerness = 0
    out = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
    new = rig.cupy.cuda.Stream(non_blocking=True)
    with new:
        with capture(rig, new):
            rig.device.note_allocation()
            assert not rig.manager.make_room(9 * UNIT)
        before = rig.cupy.calls["wait_event"]
        rig.device.note_allocation()
        assert rig.cupy.calls["wait_event"] == before + 1
    out.wait()


def test_another_stream_than_that_which_is_captured(rig):
    saved = [rig.save(float(i)) for i in range(7)]
    with capture(rig), rig.cupy.cuda.Stream(null=True):
        rig.device.note_allocation()
        assert not rig.manager.make_room(4 * UNIT)
        rig.device.before_release()
    assert rig.manager.make_room(4 * UNIT)
    assert values(saved) == list(range(7))


def test_another_stream_that_is_new(rig):
    rig.cupy.eagerness = 0
    out = rig.device.copy_out(rig.owner(1.0), 0, UNIT)
    new = rig.cupy.cuda.Stream(non_blocking=True)
    with new:
        with capture(rig):
            rig.device.note_allocation()
        rig.device.note_allocation()
        assert new.ptr in rig.device.streams._compute
    out.wait()


def test_the_default_stream_of_a_thread(make_rig):
    rig = make_rig(per_thread=True, seed=2)
    with capture(rig, rig.cupy.cuda.Stream(ptds=True)):
        rig.device.note_allocation()
        assert not rig.manager.make_room(9 * UNIT)
    rig.device.note_allocation()


def test_copies_to_the_swap_file_wait(make_rig, monkeypatch):
    """No thread may wait for the GPU meanwhile, and a capture that is never ended stops none for ever."""
    rig = make_rig(host_limit=0, seed=2)
    stream = rig.cupy.cuda.Stream(non_blocking=True)
    with stream:
        owner = rig.owner(1.0)
        rig.device.note_allocation()
        hold = threading.Event()
        write = rig.device.disk._write_piece
        rig.device.disk._write_piece = lambda *given: (hold.wait(30), write(*given))[1]
        out = rig.device.copy_out(owner, 0, UNIT)
        with capture(rig, stream):
            hold.set()
            time.sleep(0.05)
            assert not out.done()
        out.join()
        assert out.done()
        rig.device.disk._write_piece = write
        monkeypatch.setattr(host, "_PATIENCE", 0.01)
        stream.begin_capture()
        rig.device.disk._wait_for_captures()  # for that long
        stream.end_capture()


def test_the_driver_is_asked_only_where_something_moves_and_may_be_captured(make_rig):
    rig = make_rig(seed=2)
    rig.allocator.install()
    saved = [rig.save(float(i)) for i in range(20)]
    assert values(saved) == list(range(20))
    assert rig.cupy.calls["streamIsCapturing"] == 0  # all is on the default stream
    rig = make_rig(seed=2)
    with rig.cupy.cuda.Stream(non_blocking=True):
        rig.device.note_allocation()
        rig.cupy.calls.clear()
        rig.allocator.install()
        saved = [rig.save(float(i)) for i in range(3)]
        for _ in range(10):
            assert rig.manager.make_room(0)
            rig.manager.fetch(saved, True)
            rig.manager.prefetch(saved)
        assert rig.cupy.calls["streamIsCapturing"] == 0  # far below the limit
