"""The manager on the CUDA device, step by step: what is asked, waited for, counted and given back, and when."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import re

import numpy as np
import pytest

from chainer_ooc import errors
from chainer_ooc.planning.executor import PlanExecutor
from chainer_ooc.planning.plan import Plan
from chainer_ooc.settings import Settings
from chainer_ooc.swap.events import Observer
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.storage import State
from tests.swap.cuda.conftest import UNIT, host_bytes, on_pool, states, values
from tests.swap.cuda.test_eviction import with_recipe


@pytest.fixture
def rig(make_rig):
    return make_rig()


def test_what_stays(rig):
    assert rig.manager.save(np.zeros(3), "f") is None
    rig.settings = Settings(limit=8 * UNIT, min_bytes=UNIT + 1)
    assert rig.manager.save(rig.array(1.0), "f") is None
    rig.settings = Settings(limit=8 * UNIT, min_bytes=UNIT)
    assert rig.manager.save(rig.array(1.0), "f") is not None
    assert rig.manager.save(rig.cupy.ndarray((0,), "f4"), "f") is None


def test_an_array_that_is_held_is_handed_out_itself(rig):
    array = rig.array(1.0)
    saved = rig.manager.save(array, "f")
    assert saved.get() is array
    del array
    rig.manager.move_all_out()
    array = saved.get()
    assert saved.get() is array
    again = rig.manager.save(array, "g")
    assert again.storage is saved.storage


def test_views_of_one_allocation_are_one_storage(rig):
    array = rig.array(1.0)
    view = rig.cupy.ndarray((4,), "f4", rig.cupy.cuda.MemoryPointer(array.data.mem, 64), (8,))
    saved = [rig.manager.save(one, "f") for one in (array, view)]
    assert saved[0].storage is saved[1].storage
    del array, view
    rig.manager.move_all_out()
    assert rig.manager.counters.bytes_out == UNIT
    assert [len(one.get().get()) for one in saved] == [UNIT // 4, 4]
    assert rig.manager.counters.bytes_in == UNIT


def test_space_of_the_dead_is_given_back_at_the_next_save(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    rig.manager.move_all_out()
    rig.cupy.synchronize()
    assert rig.device.host.slab.allocated == 3 * UNIT
    saved.clear()
    gc.collect()
    saved.append(rig.save(5.0))
    assert rig.device.host.slab.allocated == 0
    assert len(rig.manager.storages()) == 1
    transfers = rig.manager._transfers
    assert {state: n for state, n in transfers.nbytes.items() if n} == {State.RESIDENT: UNIT}
    assert len(transfers._by_state.storages) == len([*transfers.members(State.RESIDENT)]) == 1


@pytest.mark.parametrize("moves", ["out", "out and back"])
def test_a_graph_may_die_as_a_cycle_while_its_copies_are_asked_for(rig, moves):
    """The collector then destroys the events that nothing else refers to before the storages are freed."""
    saved = [rig.save(float(i)) for i in range(4)]
    rig.manager.move_all_out()
    if moves == "out and back":
        assert values(saved) == [0, 1, 2, 3]
    rig.cupy.synchronize()
    saved.append(saved)
    del saved
    gc.collect()
    assert rig.manager.reclaim(UNIT) == 0
    assert host_bytes(rig) == 0


def test_graphs_that_are_never_used_are_forgotten(rig):
    for number in range(500):
        rig.save(float(number), 512)
    assert len(rig.manager._order._saved_sequence._storages) < 200


ASKED = {
    "memory is short": lambda rig, other: rig.manager.make_room(7 * UNIT),
    "all goes out": lambda rig, other: rig.manager.move_all_out(),
    "a plan goes on": lambda rig, other: rig.manager.run_plan(
        PlanExecutor(Plan("g", ()), lambda n: None), 0
    ),
    "another is dropped": lambda rig, other: rig.manager.release_use([other], drop=True),
}


@pytest.mark.parametrize("when", ASKED)
def test_space_of_the_dead_is_given_back_when(rig, when):
    saved = [rig.save(float(i)) for i in range(3)]
    rig.manager.move_all_out()
    other = rig.save(3.0)
    rig.cupy.synchronize()
    saved.clear()
    gc.collect()
    allocated = rig.device.host.slab.allocated
    ASKED[when](rig, other)
    assert allocated - rig.device.host.slab.allocated in (3 * UNIT, 2 * UNIT)


@pytest.mark.parametrize("short", ["never", "of room", "all went out"])
def test_less_is_held_between_graphs_once_memory_has_been_short(rig, monkeypatch, short):
    held = []
    low = [rig.manager.budget.low]
    monkeypatch.setattr(rig.device, "set_cached_limit", held.append)
    if short == "of room":
        rig.manager.make_room(8 * UNIT)
    if short == "all went out":
        rig.manager.move_all_out()
    held.clear()
    saved = rig.save(1.0)
    rig.manager.make_room(0)
    assert held == []
    del saved
    gc.collect()
    rig.manager.make_room(0)
    assert (set(held) == set(low)) == (short != "never")


def test_adopt_is_called_when_memory_is_short(rig):
    calls = []
    manager = SwapManager(rig.device, lambda: rig.settings, lambda: calls.append(1))
    manager.make_room(UNIT)
    assert calls == []
    manager.make_room(7 * UNIT)
    assert calls == [1]
    manager.reclaim(UNIT)
    assert calls == [1, 1]


class Notes(Observer):
    def __init__(self):
        self.told = []

    def used(self, device, time, nbytes):
        self.told.append(nbytes)


def test_observers_are_told(rig):
    notes = Notes()
    manager = SwapManager(rig.device, lambda: rig.settings, observers=[notes])
    held = rig.array(0.0)
    manager.make_room(0)
    assert notes.told == [UNIT]
    del held


def test_a_failed_copy_out_is_begun_again_then_given_up(make_rig):
    rig = make_rig(host_limit=6 * UNIT)  # 4 are for staging blocks
    saved = rig.save(1.0)
    rig.cupy.fail["memcpyAsync"] = [0]
    rig.manager.move_all_out()
    assert saved.storage.state is State.OUT
    assert values([saved]) == [1]
    rig.manager.read(saved, read_only=False)
    rig.cupy.fail["memcpyAsync"] = [0, 1]
    with pytest.raises(errors.SwapSpaceError, match=r"could not be written.*no data was lost"):
        rig.manager.move_all_out()
    assert saved.storage.state is State.RESIDENT
    assert saved.storage.transfer is None
    rig.cupy.synchronize()
    for _ in range(2):  # both blocks are free
        assert rig.device.host.allocate(UNIT) is not None
    assert values([saved]) == [1]


def test_a_failed_copy_in_is_begun_again_then_raised(rig):
    saved = rig.save(1.0)
    rig.manager.move_all_out()
    rig.cupy.fail["memcpyAsync"] = [0]
    assert values([saved]) == [1]
    rig.manager.move_all_out()
    rig.manager._evictor.release_clean(UNIT)
    rig.cupy.fail["memcpyAsync"] = [0, 1]
    with pytest.raises(OSError, match="cannot be begun"):
        saved.get()
    assert saved.storage.state is State.OUT
    assert saved.storage.transfer is saved.storage.owner is None
    gc.collect()
    assert rig.pool.used_bytes() == 0
    assert values([saved]) == [1]


def test_a_failed_copy_in_is_begun_again_in_the_same_memory(make_rig):
    """All that fits is what backward needs at once: another block beside that of the failed copy does not."""
    rig = make_rig(limit=4 * UNIT)
    saved = [rig.save(float(i)) for i in range(3)]
    rig.manager.move_all_out()
    others = [rig.array(9.0) for _ in range(2)]
    rig.cupy.fail["memcpyAsync"] = [0]
    arrays = rig.manager.fetch(saved[:2], True)
    assert [array.get()[0] for array in arrays] == [0, 1]
    del others


def test_what_came_back_is_known_by_its_memory(rig):
    saved = rig.save(1.0)
    rig.manager.move_all_out()
    array = saved.get()
    storage = saved.storage
    assert rig.manager._transfers.find(storage.owner) is storage
    del saved
    gc.collect()
    del storage
    gc.collect()
    again = rig.manager.save(array, "g")  # the storage has died: a new one
    assert again.storage.label == "g"
    del array
    rig.manager.move_all_out()
    assert values([again]) == [1]


def test_the_dead_are_not_mistaken_for_others(rig):
    """The identity of memory is given to other memory once it is gone."""
    for number in range(20):
        saved = rig.save(float(number))
        if number % 2:
            rig.manager.move_all_out()
            assert values([saved]) == [number]
        assert saved.storage.label == f"f{float(number)}"
        assert len(rig.manager._transfers._by_owner) <= 1


def test_shortages_are_told_once_or_raised(rig, caplog):
    saved = [rig.save(float(i)) for i in range(4)]
    held = saved[0].get()
    rig.manager.budget.used_bytes()
    assert rig.manager.shortage(4 * UNIT, "f") is None  # it fits
    for nbytes, name in ((8 * UNIT, "f"), (9 * UNIT, "g"), (8 * UNIT, "h")):
        assert rig.manager.shortage(nbytes, name) is None
    for backward in (False, True, False, True):
        rig.manager.shortages.ended(backward)
    assert not caplog.messages  # the second iteration is not over
    rig.manager.shortages.ended(backward=False)
    assert re.search(f"g needs.*limit={rig.manager.shortages.least_limit} ", caplog.text)
    assert rig.manager.shortage(10 * UNIT, "f") is None  # once
    rig.manager.shortages.tell()
    assert len(caplog.messages) == 1
    rig.settings = Settings(limit=8 * UNIT, min_bytes=1, strict=True)
    assert isinstance(rig.manager.shortage(8 * UNIT, "f"), errors.OutOfMemoryError)
    assert isinstance(rig.manager.shortage(0, "f"), errors.OutOfMemoryError)
    del held


def test_verify_notices_a_write_and_a_broken_copy(make_rig, caplog):
    rig = make_rig()
    rig.settings = Settings(limit=8 * UNIT, min_bytes=1, verify=True)
    saved = rig.save(1.0)
    rig.manager.move_all_out()
    assert values([saved]) == [1]
    rig.manager.read(saved, read_only=False).add(1)
    rig.manager.move_all_out()
    assert re.search(r"f1.0 saved.*modified in place", caplog.text)
    rig.cupy.synchronize()
    ctypes.memset(saved.storage.copy.address, 7, 8)
    with pytest.raises(errors.CorruptCopyError, match="broken"):
        saved.get()
    assert saved.storage.state is State.OUT
    rig.settings = Settings(limit=8 * UNIT, min_bytes=1)
    other = rig.save(2.0)
    rig.manager.move_all_out()
    rig.cupy.synchronize()
    ctypes.memset(other.storage.copy.address, 0, 8)
    assert values([other]) == [0]  # nobody looks


def test_verify_looks_at_what_is_here_when_it_is_used(rig, caplog):
    rig.settings = Settings(limit=8 * UNIT, min_bytes=1, verify=True)
    saved = rig.save(1.0)
    rig.manager.fetch([saved], read_only=True)
    rig.manager.read(saved, read_only=False).add(1)
    rig.manager.fetch([saved], read_only=True)
    assert "modified in place" in caplog.text


def test_after_a_fork_the_parents_is_let_alone(make_rig, monkeypatch):
    rig = make_rig()
    saved = rig.save(1.0)
    rig.manager.move_all_out()
    called = []
    monkeypatch.setattr(rig.device, "after_fork", lambda: called.append(1))
    lock = rig.manager._lock
    lock.acquire()
    rig.manager.after_fork()
    assert not rig.manager.busy  # the lock was another thread's, and is new
    lock.release()
    assert called == [1]
    assert values([saved]) == [1]


def test_settling_waits_for_both_ways(rig):
    rig.cupy.eagerness = 0
    saved = [rig.save(float(i)) for i in range(4)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved[3:], read_only=True)
    rig.manager.prefetch(saved[3:])
    more = rig.save(9.0)
    rig.manager._transfers.begin_out(more.storage)
    dead = rig.save(8.0)
    rig.manager._transfers.begin_out(dead.storage)
    del dead
    gc.collect()
    rig.manager.settle()
    assert set(states(saved)) == {State.BOTH}
    assert more.storage.state is State.BOTH
    assert {one.storage.transfer for one in (*saved, more)} == {None}
    rig.cupy.synchronize()
    assert rig.device.host.allocate(1) is not None
    assert rig.device.host.slab.allocated == 5 * UNIT + 512


def test_a_full_disk_in_the_midst_of_going_out(make_rig, monkeypatch):
    rig = make_rig(host_limit=0)
    saved = [rig.save(float(i)) for i in range(6)]
    real, room = rig.device.disk.file._reserve, [1]

    def reserve(extent):
        if not room or extent > UNIT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room.pop()
        real(extent)

    monkeypatch.setattr(rig.device.disk.file, "_reserve", reserve)
    with pytest.raises(errors.SwapSpaceError):
        rig.manager.move_all_out()
    assert states(saved).count(State.RESIDENT) == 5
    assert values(saved) == [0, 1, 2, 3, 4, 5]


class Later:
    """A verdict that becomes known when it is told so."""

    def __init__(self, known):
        self.known = known

    def done(self):
        return self.known

    def equal(self):
        return True


@pytest.mark.parametrize(
    "state", [s for s in State if s is not State.DROPPED], ids=lambda s: s.name
)
def test_a_storage_may_be_dropped_in_any_state(rig, state):
    rig.cupy.eagerness = 0
    saved = rig.save(1.0)
    transfers = rig.manager._transfers
    if state in (State.CHECKING, State.DISCARDED):
        source = saved
        saved = with_recipe(rig, source)
        transfers._check(saved.storage, Later(state is State.DISCARDED))
        rig.manager.release_use([source], drop=True)  # needed until the other is dropped
        assert source.storage.state is State.RESIDENT
        del source
    elif state is not State.RESIDENT:
        transfers.begin_out(saved.storage)
    if state in (State.BOTH, State.OUT, State.COMING_IN):
        transfers.end_out(saved.storage)
    if state in (State.OUT, State.COMING_IN):
        transfers.release(saved.storage)
    if state is State.COMING_IN:
        transfers.begin_in(saved.storage)
    assert saved.storage.state is state
    rig.manager.release_use([saved], drop=True)
    assert saved.storage.state is State.DROPPED
    rig.manager.settle()
    assert host_bytes(rig) == 0
    assert rig.pool.used_bytes() == 0


def test_what_was_dropped_with_a_copy_leaves_that_once(rig):
    saved, calls = rig.save(1.0), []
    rig.manager.move_all_out()
    copy = saved.storage.copy
    free = copy.free
    copy.free = lambda: [calls.append(1), free()]
    rig.manager.release_use([saved], drop=True)
    assert calls == [1]
    del saved
    gc.collect()
    rig.manager.settle()
    assert calls == [1]


def test_illegal_transitions_raise(rig):
    storage = rig.save(1.0).storage
    with pytest.raises(errors.OutOfCoreError, match="cannot become 'coming in'"):
        storage.move_to(State.COMING_IN)
    assert storage.state is State.RESIDENT


def test_memory_is_given_up_after_all_computing_streams_have_used_it(rig):
    saved = rig.save(1.0)
    rig.manager.move_all_out()
    rig.cupy.eagerness = 0
    array = saved.get()
    stream = rig.cupy.cuda.Stream(non_blocking=True)
    stream.wait_event(rig.cupy.get_current_stream().record())
    with stream:
        rig.device.note_allocation()
        rig.cupy.kernel("a use", [array.span], [])
    del array
    rig.manager.make_room(8 * UNIT)
    assert saved.storage.state is State.OUT
    rig.array(2.0)


@on_pool
def test_a_failed_allocation_of_what_is_fetched_is_tried_again(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved[:1], read_only=True)
    rig.cupy.fail["malloc"] = [0]
    assert values(saved[2:]) == [2]
    assert saved[0].storage.state is State.OUT
    rig.cupy.fail["malloc"] = [0, 1, 2, 3]
    rig.manager.make_room(8 * UNIT)
    with pytest.raises(MemoryError):
        saved[1].get()
    rig.cupy.fail.clear()
    assert values(saved) == [0, 1, 2]


def test_what_has_been_handed_out_to_nobody_is_not_alive(rig):
    saved = rig.save(1.0)
    saved._last = None
    assert saved.alive() is None
    assert values([saved]) == [1]
