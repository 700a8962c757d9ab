"""The manager on the CUDA device, step by step: what is asked, waited for, counted and given back, and when."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import warnings

import numpy as np
import pytest

from chainer_ooc import errors
from chainer_ooc.planning.plan import Plan
from chainer_ooc.settings import Settings
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.observing import Observer
from chainer_ooc.swap.player import Player
from chainer_ooc.swap.storage import State
from tests.swap.cuda.conftest import UNIT, states


@pytest.fixture
def rig(make_rig):
    return make_rig()


def values(saved):
    return [float(one.get().get()[0]) for one in saved]


def host_bytes(rig):
    """Return what is in use when all copies have ended, and what was retired is taken back."""
    rig.cupy.synchronize()
    rig.device.host.allocate(1).free()
    return rig.device.host.slab.allocated


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
    mover = rig.manager._mover
    assert {state: n for state, n in mover.nbytes.items() if n} == {State.RESIDENT: UNIT}
    assert [len(mover._members[state]) for state in State] == [1, 0, 0, 0, 0, 0]


def test_graphs_that_are_never_used_are_forgotten(rig):
    for number in range(500):
        rig.save(float(number), 512)
    assert len(rig.manager._order._forward._storages) < 200


ASKED = {
    "memory is short": lambda rig, other: rig.manager.make_room(7 * UNIT),
    "all goes out": lambda rig, other: rig.manager.move_all_out(),
    "a plan goes on": lambda rig, other: rig.manager.play(Player(Plan("g", ()), lambda n: None), 0),
    "another is dropped": lambda rig, other: rig.manager.finish([other], drop=True),
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
    low = [rig.manager.marks.low]
    monkeypatch.setattr(rig.device, "hold", held.append)
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
    assert (held == low) == (short != "never")


def test_hits_are_counted_once(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    counters = rig.manager.counters
    arrays = rig.manager.fetch(saved, trusted=True)
    assert (counters.hits, counters.storages_in) == (3, 0)
    del arrays
    rig.manager.move_all_out()
    rig.manager.fetch(saved, trusted=True)
    assert (counters.hits, counters.storages_in) == (3, 3)


def test_prefetched_storages_are_counted_when_they_are_used(rig):
    saved = [rig.save(float(i)) for i in range(4)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved[3:], trusted=True)
    rig.manager.prefetch(saved[3:])
    counters = rig.manager.counters
    assert (counters.prefetched, counters.prefetch_hits) == (3, 0)
    assert set(states(saved[:3])) == {State.COMING_IN}
    for _ in range(2):
        rig.manager.fetch(saved[2:], trusted=True)
        assert counters.prefetch_hits == 1
    rig.manager._mover.end_in(saved[0].storage)
    rig.manager._mover.release(saved[0].storage)  # in vain
    rig.manager.fetch(saved[:1], trusted=True)
    assert counters.prefetch_hits == 1
    assert values(saved) == [0, 1, 2, 3]


def test_what_is_used_or_here_is_not_prefetched(rig):
    saved = [rig.save(float(i)) for i in range(5)]
    rig.manager.move_all_out()
    rig.manager.finish([saved[1]], drop=False)
    kept = saved[2].get()
    rig.manager.fetch(saved[4:], trusted=True)
    rig.manager.prefetch(saved[4:])
    assert rig.manager.counters.prefetched == 2
    assert saved[1].storage.state is State.OUT
    assert kept.get()[0] == 2


def test_prefetching_goes_by_falling_rank(rig):
    saved = [rig.save(float(i)) for i in range(4)]
    for rank, one in zip((3, 1, 2, 4), saved, strict=True):
        rig.manager.expect([one], rank)
        rig.manager.expect([one], 0)  # the highest counts
    rig.manager.move_all_out()
    held = [rig.array(0.0) for _ in range(5)]
    rig.manager.fetch(saved[3:], trusted=True)
    rig.manager.prefetch(saved[3:])
    assert states(saved[:3]) == [State.COMING_IN, State.OUT, State.OUT]
    del held


def test_prefetching_asks_no_room_for_what_is_here(rig):
    saved = [rig.save(0.0), rig.save(1.0, 4 * UNIT), rig.save(2.0)]
    held = saved[1].get()
    rig.manager.move_all_out()
    rig.manager.prefetch(saved[2:])
    assert states(saved) == [State.COMING_IN, State.RESIDENT, State.OUT]
    del held


def test_prefetching_goes_as_far_as_there_is_room(rig):
    saved = [rig.save(float(i)) for i in range(6)]
    rig.manager.move_all_out()
    held = [rig.array(0.0) for _ in range(3)]
    rig.manager.fetch(saved[5:], trusted=True)
    rig.manager.prefetch(saved[5:])
    assert rig.manager.counters.prefetched == 3  # 8, less the margin, less 4
    assert states(saved[:2]) == [State.OUT] * 2
    assert rig.pool.used_bytes() == 7 * UNIT
    del held


def test_where_a_plan_decides_nothing_else_is_fetched_ahead(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    rig.manager.move_all_out()
    rig.manager.follows_plan = True
    rig.manager.prefetch(saved[2:])
    assert states(saved) == [State.OUT] * 3
    rig.manager.follows_plan = False
    rig.manager.prefetch(saved[2:])
    assert states(saved[:2]) == [State.COMING_IN] * 2


@pytest.mark.parametrize(
    ("out", "back", "expected"),
    [(2.0, 3.0, (2, 3)), (2.0, None, (2, 2)), (None, 3.0, (3, 3)), (None, None, (7, 7))],
)
def test_a_bandwidth_that_nobody_knows_is_that_of_the_other_way(
    rig, monkeypatch, out, back, expected
):
    measured = {True: out, False: back}
    monkeypatch.setattr(rig.manager._mover, "bandwidth", lambda out: measured[out])
    assert rig.manager.bandwidths(7.0) == expected


def test_prefetching_releases_what_has_been_used(rig):
    saved = [rig.save(float(i)) for i in range(6)]
    rig.manager.move_all_out()
    held = [rig.array(0.0) for _ in range(4)]
    rig.manager.fetch(saved[4:], trusted=True)
    rig.manager.finish([saved[5]], drop=False)
    rig.manager.prefetch(saved[4:5])
    assert saved[5].storage.state is State.OUT
    assert states(saved[:4]).count(State.COMING_IN) == 2
    del held


def test_a_failed_prefetch_is_no_error(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved[2:], trusted=True)
    rig.cupy.fail["malloc"] = [0, 1, 2, 3]
    rig.manager.prefetch(saved[2:])
    assert rig.manager.counters.prefetched == 0
    rig.cupy.fail.clear()
    assert values(saved) == [0, 1, 2]


def test_transfers_of_a_group_are_all_begun_before_one_is_waited_for(rig, monkeypatch):
    saved = [rig.save(float(i)) for i in range(3)]
    rig.manager.move_all_out()
    calls = []
    copy_in, wait = rig.device.copy_in, rig.device.streams.let_compute_wait
    monkeypatch.setattr(
        rig.device, "copy_in", lambda *args: [calls.append("begin"), copy_in(*args)][1]
    )
    monkeypatch.setattr(
        rig.device.streams, "let_compute_wait", lambda event: [calls.append("wait"), wait(event)][1]
    )
    rig.manager.fetch(saved, trusted=True)
    assert calls[:4] == ["begin"] * 3 + ["wait"]


def test_what_is_here_stays_while_the_rest_of_its_group_comes(rig):
    saved = [rig.save(float(i)) for i in range(4)]
    rig.manager.move_all_out()
    saved[0].get()  # clean, and held by nobody
    held = [rig.array(0.0) for _ in range(3)]
    before = rig.manager.counters.storages_in
    arrays = rig.manager.fetch(saved, trusted=True)
    assert rig.manager.counters.storages_in - before == 3
    assert [a.get()[0] for a in arrays] == [0, 1, 2, 3]
    del held


def test_a_reader_who_may_write_makes_the_copy_worthless(rig):
    saved = rig.save(1.0)
    rig.manager.move_all_out()
    rig.manager.read(saved, trusted=True)
    assert saved.storage.state is State.BOTH
    rig.manager.read(saved, trusted=False)
    assert saved.storage.state is State.RESIDENT
    assert saved.storage.copy is None
    rig.cupy.synchronize()
    assert rig.device.host.allocate(1) is not None
    assert rig.device.host.slab.allocated == 512


def test_what_cannot_be_written_to_keeps_its_copy(rig):
    array = rig.array(1.0)
    array.flags.writeable = False
    saved = rig.manager.save(array, "f")
    del array
    rig.manager.move_all_out()
    rig.manager.read(saved, trusted=False)
    assert saved.storage.state is State.BOTH


def test_backward_may_give_an_array_away(rig):
    saved = [rig.save(float(i)) for i in range(2)]
    rig.manager.move_all_out()
    kept, _ = rig.manager.fetch(saved, trusted=True)
    del _
    rig.manager.finish(saved, drop=False)
    assert states(saved) == [State.RESIDENT, State.BOTH]
    assert kept.get()[0] == 0


def test_backward_may_give_away_what_goes_out(rig):
    saved = rig.save(1.0)
    rig.manager._mover.begin_out(saved.storage)
    kept = rig.manager.read(saved, trusted=True)
    rig.manager.finish([saved], drop=False)
    rig.manager.settle()
    assert saved.storage.state is State.RESIDENT
    assert host_bytes(rig) == 0
    kept.add(1)
    assert values([saved]) == [2]


def test_written_to_after_it_went_out_once_it_goes_out_again(rig):
    """The second copy is not taken for one that was written to meanwhile, as the first was."""
    saved = rig.save(1.0)
    mover = rig.manager._mover
    mover.begin_out(saved.storage)
    rig.manager.read(saved, trusted=False)
    mover.end_out(saved.storage)
    assert saved.storage.state is State.RESIDENT
    mover.begin_out(saved.storage)
    mover.end_out(saved.storage)
    assert saved.storage.state is State.BOTH


def test_only_the_last_function_drops(rig):
    saved = rig.save(1.0)
    rig.manager.expect([saved])
    rig.manager.finish([saved], drop=True)
    assert saved.storage.state is State.RESIDENT
    rig.manager.finish([saved], drop=True)
    assert saved.storage.state is State.DROPPED
    rig.manager.finish([saved], drop=True)
    assert rig.pool.used_bytes() == 0


def test_a_dropped_array_that_somebody_holds_can_be_read(rig):
    array = rig.array(1.0)
    saved = rig.manager.save(array, "f")
    rig.manager.finish([saved], drop=True)
    assert saved.get() is array
    del array
    with pytest.raises(errors.GraphReleasedError):
        saved.get()


def test_nothing_goes_behind_the_computation_below_the_low_mark(rig):
    saved = [rig.save(float(i)) for i in range(6)]
    assert rig.manager.make_room(0)
    assert rig.manager.counters.bytes_out == 0
    saved.append(rig.save(6.0))
    assert rig.manager.make_room(0)
    assert states(saved) == [State.GOING_OUT] + [State.RESIDENT] * 6
    assert rig.manager.make_room(0)
    assert rig.manager.counters.storages_out == 1


def test_what_is_held_or_used_does_not_go_behind_the_computation(rig):
    saved = [rig.save(float(i)) for i in range(7)]
    held = saved[0].get()
    rig.manager.finish([saved[1]], drop=False)
    rig.manager.make_room(0)
    assert states(saved[:3]) == [State.RESIDENT, State.RESIDENT, State.GOING_OUT]
    del held


def test_no_more_goes_behind_the_computation_than_is_announced(rig):
    saved = [rig.save(float(i)) for i in range(7)]
    rig.manager.make_room(UNIT // 2)
    assert rig.manager.counters.bytes_out == 0
    del saved


def test_no_more_is_given_up_than_needed(rig):
    saved = [rig.save(float(i)) for i in range(6)]
    assert rig.manager.make_room(3 * UNIT)
    assert states(saved) == [State.OUT] * 2 + [State.RESIDENT] * 4
    rig.manager.fetch(saved[:2], trusted=True)
    assert rig.manager.make_room(3 * UNIT)  # clean ones go first
    assert rig.manager.counters.storages_out == 2
    assert states(saved) == [State.OUT] * 2 + [State.RESIDENT] * 4


def test_only_so_much_that_is_clean_is_given_up(rig):
    saved = [rig.save(float(i)) for i in range(6)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved, trusted=True)
    assert rig.manager.make_room(2 * UNIT)
    assert states(saved) == [State.OUT] + [State.BOTH] * 5


def test_what_is_used_and_clean_goes_first_and_what_is_used_and_not_copied_last(rig):
    saved = [rig.save(float(i)) for i in range(6)]
    rig.manager.finish(saved[1:3], drop=False)
    for one in saved[:2]:
        rig.manager._mover.begin_out(one.storage)
    rig.cupy.synchronize()
    assert rig.manager.make_room(2 * UNIT)
    assert states(saved[:3]) == [State.BOTH, State.OUT, State.RESIDENT]
    assert rig.manager.make_room(4 * UNIT)
    assert states(saved) == [
        State.OUT,
        State.OUT,
        State.RESIDENT,
        State.OUT,
        State.RESIDENT,
        State.RESIDENT,
    ]


def test_what_is_held_is_not_copied_in_vain(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    held = saved[1].get()
    rig.manager.move_all_out()
    assert states(saved) == [State.OUT, State.RESIDENT, State.OUT]
    assert rig.manager.counters.storages_out == 2
    del held


def test_copies_under_way_are_released_before_others_are_begun(rig):
    saved = [rig.save(float(i)) for i in range(7)]
    rig.manager.make_room(0)
    assert states(saved)[0] is State.GOING_OUT
    assert rig.manager.make_room(UNIT)
    assert rig.manager.counters.storages_out == 1
    assert states(saved) == [State.OUT] + [State.RESIDENT] * 6


def test_arrivals_are_released_last(rig):
    saved = [rig.save(float(i)) for i in range(6)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved[5:], trusted=True)
    rig.manager.prefetch(saved[5:])
    assert states(saved[:5]) == [State.COMING_IN] * 5
    assert rig.manager.make_room(4 * UNIT)
    # What is needed last goes first.
    assert states(saved) == [State.OUT] * 2 + [State.COMING_IN] * 3 + [State.OUT]
    rig.manager.fetch(saved[4:5], trusted=True)
    rig.manager.prefetch(saved[4:5])  # they are looked at again
    assert states(saved[:4]) == [State.COMING_IN] * 4
    assert values(saved) == [0, 1, 2, 3, 4, 5]


def test_what_is_held_is_not_released(rig):
    saved = [rig.save(float(i)) for i in range(6)]
    rig.manager.move_all_out()
    held = rig.manager.fetch(saved[:3], trusted=True)
    assert not rig.manager.make_room(7 * UNIT)
    assert states(saved) == [State.BOTH] * 3 + [State.OUT] * 3
    assert rig.manager.reclaim(UNIT) == 0
    held.pop()
    assert rig.manager.reclaim(UNIT) == UNIT


def test_reclaim_waits_for_what_died_under_its_copy(rig):
    rig.cupy.eagerness = 0
    saved = [rig.save(float(i)) for i in range(4)]
    for one in saved:
        rig.manager._mover.begin_out(one.storage)
    one = None
    saved.clear()
    gc.collect()
    assert rig.pool.used_bytes() == 4 * UNIT
    assert rig.manager.reclaim(UNIT) == 4 * UNIT
    assert rig.device.host.slab.allocated == 0
    assert one is None


def test_reclaim_does_not_wait_where_something_else_goes(rig):
    clean, dying = rig.save(1.0), rig.save(2.0)
    rig.manager._mover.begin_out(clean.storage)
    rig.manager.settle()
    rig.cupy.synchronize()
    rig.cupy.eagerness = 0
    rig.manager._mover.begin_out(dying.storage)
    del dying
    gc.collect()
    before = rig.cupy.calls["synchronize"]
    assert rig.manager.reclaim(UNIT) == UNIT
    assert clean.storage.state is State.OUT
    assert rig.pool.used_bytes() == UNIT
    assert rig.cupy.calls["synchronize"] == before


def test_what_is_fetched_stays_below_the_high_mark(rig):
    saved = [rig.save(float(i)) for i in range(4)]
    rig.manager.move_all_out()
    more = [rig.save(float(i)) for i in range(4)]
    held = [rig.array(0.0) for _ in range(3)]
    (array,) = rig.manager.fetch(saved[:1], trusted=True)
    assert rig.pool.used_bytes() == 7 * UNIT
    assert states(more) == [State.OUT] + [State.RESIDENT] * 3
    del array, held


def test_all_that_was_used_goes_with_the_rest(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved, trusted=True)
    rig.manager.finish(saved[:2], drop=False)
    rig.manager.move_all_out()
    assert states(saved) == [State.OUT, State.OUT, State.BOTH]


def test_what_has_changed_its_state_meanwhile_is_passed_over(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    mover = rig.manager._mover
    seen = []
    for storage in mover.members(State.RESIDENT):
        seen.append(storage)
        mover.begin_out(saved[1].storage)
        saved[2] = None
    assert seen == [saved[0].storage]


def test_nothing_is_trimmed_while_there_is_room(rig, monkeypatch):
    calls = []
    monkeypatch.setattr(rig.device, "trim", lambda desperate: calls.append(desperate))
    saved = [rig.save(float(i)) for i in range(7)]
    rig.manager.make_room(UNIT // 2)
    assert calls == []
    rig.manager.make_room(UNIT)
    assert calls == [False, False]  # before, and after something went
    del saved


def test_more_is_copied_at_a_time_than_may_be_under_way(rig, monkeypatch):
    import chainer_ooc.swap.reclaimer as reclaimer

    monkeypatch.setattr(reclaimer, "IN_FLIGHT", 2 * UNIT)
    saved = [rig.save(float(i)) for i in range(7)]
    most = []
    begin_out = rig.manager._mover.begin_out

    def begin(storage):
        begin_out(storage)
        most.append(rig.manager._mover.nbytes[State.GOING_OUT])

    monkeypatch.setattr(rig.manager._mover, "begin_out", begin)
    rig.settings = Settings(limit=2 * UNIT, min_bytes=1)
    rig.manager.make_room(0)
    assert max(most) == 3 * UNIT  # more than that many, then one is waited for
    assert set(states(saved[:5])) == {State.OUT}


def test_writing_behind_keeps_few_under_way(rig, monkeypatch):
    import chainer_ooc.swap.reclaimer as reclaimer

    monkeypatch.setattr(reclaimer, "IN_FLIGHT", 2 * UNIT)
    saved = [rig.save(float(i)) for i in range(7)]
    rig.cupy.eagerness = 0
    rig.manager._reclaimer.write_behind(5 * UNIT)
    assert states(saved).count(State.GOING_OUT) == 2
    rig.cupy.synchronize()
    rig.manager._reclaimer.write_behind(5 * UNIT)
    assert states(saved).count(State.BOTH) == 2
    assert states(saved).count(State.GOING_OUT) == 2
    rig.cupy.synchronize()
    rig.manager._reclaimer.write_behind(5 * UNIT)
    assert states(saved).count(State.GOING_OUT) == 1


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
    rig.manager.read(saved, trusted=False)
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
    rig.manager._reclaimer.release_clean(UNIT)
    rig.cupy.fail["memcpyAsync"] = [0, 1]
    with pytest.raises(OSError, match="cannot be begun"):
        saved.get()
    assert saved.storage.state is State.OUT
    assert saved.storage.transfer is saved.storage.owner is None
    gc.collect()
    assert rig.pool.used_bytes() == 0
    assert values([saved]) == [1]


def test_what_came_back_is_known_by_its_memory(rig):
    saved = rig.save(1.0)
    rig.manager.move_all_out()
    array = saved.get()
    storage = saved.storage
    assert rig.manager._mover.find(storage.owner) is storage
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
        assert len(rig.manager._mover._by_owner) <= 1


def test_shortages_are_told_once_or_raised(rig):
    saved = [rig.save(float(i)) for i in range(4)]
    held = saved[0].get()
    rig.manager.marks.used_bytes()
    with warnings.catch_warnings(action="error"):
        assert rig.manager.shortage(4 * UNIT, "f") is None  # it fits
    with pytest.warns(RuntimeWarning, match="f needs"):
        assert rig.manager.shortage(8 * UNIT, "f") is None
    with warnings.catch_warnings(action="error"):
        assert rig.manager.shortage(8 * UNIT, "f") is None  # once
    rig.settings = Settings(limit=8 * UNIT, min_bytes=1, strict=True)
    assert isinstance(rig.manager.shortage(8 * UNIT, "f"), errors.OutOfMemoryError)
    assert isinstance(rig.manager.shortage(0, "f"), errors.OutOfMemoryError)
    del held


def test_verify_notices_a_write_and_a_broken_copy(make_rig):
    rig = make_rig()
    rig.settings = Settings(limit=8 * UNIT, min_bytes=1, verify=True)
    saved = rig.save(1.0)
    rig.manager.move_all_out()
    assert values([saved]) == [1]
    rig.manager.read(saved, trusted=False).add(1)
    with pytest.warns(RuntimeWarning, match=r"f1.0 saved.*modified in place"):
        rig.manager.move_all_out()
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


def test_verify_looks_at_what_is_here_when_it_is_used(rig):
    rig.settings = Settings(limit=8 * UNIT, min_bytes=1, verify=True)
    saved = rig.save(1.0)
    rig.manager.fetch([saved], trusted=True)
    rig.manager.read(saved, trusted=False).add(1)
    with pytest.warns(RuntimeWarning, match="modified in place"):
        rig.manager.fetch([saved], trusted=True)


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
    rig.manager.fetch(saved[3:], trusted=True)
    rig.manager.prefetch(saved[3:])
    more = rig.save(9.0)
    rig.manager._mover.begin_out(more.storage)
    dead = rig.save(8.0)
    rig.manager._mover.begin_out(dead.storage)
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


@pytest.mark.parametrize(
    "state", [s for s in State if s is not State.DROPPED], ids=lambda s: s.name
)
def test_a_storage_may_be_dropped_in_any_state(rig, state):
    rig.cupy.eagerness = 0
    saved = rig.save(1.0)
    mover = rig.manager._mover
    if state is not State.RESIDENT:
        mover.begin_out(saved.storage)
    if state not in (State.RESIDENT, State.GOING_OUT):
        mover.end_out(saved.storage)
    if state in (State.OUT, State.COMING_IN):
        mover.release(saved.storage)
    if state is State.COMING_IN:
        mover.begin_in(saved.storage)
    assert saved.storage.state is state
    rig.manager.finish([saved], drop=True)
    assert saved.storage.state is State.DROPPED
    rig.manager.settle()
    assert host_bytes(rig) == rig.pool.used_bytes() == 0


def test_what_was_dropped_with_a_copy_leaves_that_once(rig):
    saved, calls = rig.save(1.0), []
    rig.manager.move_all_out()
    copy = saved.storage.copy
    free = copy.free
    copy.free = lambda: [calls.append(1), free()]
    rig.manager.finish([saved], drop=True)
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


def test_a_failed_allocation_of_what_is_fetched_is_tried_again(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved[:1], trusted=True)
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
