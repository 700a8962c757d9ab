"""Room: what goes behind the computation, what is given up, in which order, and no more than that."""

from __future__ import annotations

import gc

import pytest

from chainer_ooc.planning import eviction
from chainer_ooc.settings import Settings
from chainer_ooc.swap.storage import State
from tests.swap.cuda.conftest import UNIT, states, values


@pytest.fixture
def rig(make_rig):
    return make_rig()


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
    rig.manager.release_use([saved[1]], drop=False)
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
    rig.manager.fetch(saved[:2], read_only=True)
    assert rig.manager.make_room(3 * UNIT)  # clean ones go first
    assert rig.manager.counters.storages_out == 2
    assert states(saved) == [State.OUT] * 2 + [State.RESIDENT] * 4


def test_only_so_much_that_is_clean_is_given_up(rig):
    saved = [rig.save(float(i)) for i in range(6)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved, read_only=True)
    assert rig.manager.make_room(2 * UNIT)
    assert states(saved) == [State.OUT] + [State.BOTH] * 5


def test_what_is_used_and_clean_goes_first_and_what_is_used_and_not_copied_last(rig):
    saved = [rig.save(float(i)) for i in range(6)]
    rig.manager.release_use(saved[1:3], drop=False)
    for one in saved[:2]:
        rig.manager._transfers.begin_out(one.storage)
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
    rig.manager.fetch(saved[5:], read_only=True)
    rig.manager.prefetch(saved[5:])
    assert states(saved[:5]) == [State.COMING_IN] * 5
    assert rig.manager.make_room(4 * UNIT)
    # What is needed last goes first.
    assert states(saved) == [State.OUT] * 2 + [State.COMING_IN] * 3 + [State.OUT]
    rig.manager.fetch(saved[4:5], read_only=True)
    rig.manager.prefetch(saved[4:5])  # they are looked at again
    assert states(saved[:4]) == [State.COMING_IN] * 4
    assert values(saved) == [0, 1, 2, 3, 4, 5]


def test_what_is_held_is_not_released(rig):
    saved = [rig.save(float(i)) for i in range(6)]
    rig.manager.move_all_out()
    held = rig.manager.fetch(saved[:3], read_only=True)
    assert not rig.manager.make_room(7 * UNIT)
    assert states(saved) == [State.BOTH] * 3 + [State.OUT] * 3
    assert rig.manager.reclaim(UNIT) == 0
    held.pop()
    assert rig.manager.reclaim(UNIT) == UNIT


def test_reclaim_waits_for_what_died_under_its_copy(rig):
    rig.cupy.eagerness = 0
    saved = [rig.save(float(i)) for i in range(4)]
    for one in saved:
        rig.manager._transfers.begin_out(one.storage)
    one = None
    saved.clear()
    gc.collect()
    assert rig.pool.used_bytes() == 4 * UNIT
    assert rig.manager.reclaim(UNIT) == 4 * UNIT
    assert rig.device.host.slab.allocated == 0
    assert one is None


def test_reclaim_does_not_wait_where_something_else_goes(rig):
    clean, dying = rig.save(1.0), rig.save(2.0)
    rig.manager._transfers.begin_out(clean.storage)
    rig.manager.settle()
    rig.cupy.synchronize()
    rig.cupy.eagerness = 0
    rig.manager._transfers.begin_out(dying.storage)
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
    (array,) = rig.manager.fetch(saved[:1], read_only=True)
    assert rig.pool.used_bytes() == 7 * UNIT
    assert states(more) == [State.OUT] + [State.RESIDENT] * 3
    del array, held


def test_all_that_was_used_goes_with_the_rest(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved, read_only=True)
    rig.manager.release_use(saved[:2], drop=False)
    rig.manager.move_all_out()
    assert states(saved) == [State.OUT, State.OUT, State.BOTH]


@pytest.mark.parametrize("way", ["push_out", "write_behind"])
def test_what_has_changed_its_state_meanwhile_is_passed_over(rig, monkeypatch, way):
    saved = [rig.save(float(i)) for i in range(3)]
    transfers = rig.manager._transfers
    begin_out = transfers.begin_out

    def begin(storage):
        begin_out(storage)
        if storage is saved[0].storage:
            begin_out(saved[1].storage)

    monkeypatch.setattr(transfers, "begin_out", begin)
    getattr(rig.manager._evictor, way)(3 * UNIT)
    assert rig.manager.counters.storages_out == 3
    assert not [*transfers.members(State.RESIDENT)]
    assert values(saved) == [0, 1, 2]


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
    monkeypatch.setattr(eviction, "IN_FLIGHT", 2 * UNIT)
    saved = [rig.save(float(i)) for i in range(7)]
    most = []
    begin_out = rig.manager._transfers.begin_out

    def begin(storage):
        begin_out(storage)
        most.append(rig.manager._transfers.nbytes[State.GOING_OUT])

    monkeypatch.setattr(rig.manager._transfers, "begin_out", begin)
    rig.settings = Settings(limit=2 * UNIT, min_bytes=1)
    rig.manager.make_room(0)
    assert max(most) == 3 * UNIT  # more than that many, then one is waited for
    assert set(states(saved[:5])) == {State.OUT}


def test_writing_behind_keeps_few_under_way(rig, monkeypatch):
    monkeypatch.setattr(eviction, "IN_FLIGHT", 2 * UNIT)
    saved = [rig.save(float(i)) for i in range(7)]
    rig.cupy.eagerness = 0
    rig.manager._evictor.write_behind(5 * UNIT)
    assert states(saved).count(State.GOING_OUT) == 2
    rig.cupy.synchronize()
    rig.manager._evictor.write_behind(5 * UNIT)
    assert states(saved).count(State.BOTH) == 2
    assert states(saved).count(State.GOING_OUT) == 2
    rig.cupy.synchronize()
    rig.manager._evictor.write_behind(5 * UNIT)
    assert states(saved).count(State.GOING_OUT) == 1
