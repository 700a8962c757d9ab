"""Player: the moves of a plan, one by one, and what becomes of those that are not possible."""

from __future__ import annotations

import pytest

from chainer_ooc.planning.executor import PlanExecutor
from chainer_ooc.planning.plan import Plan
from chainer_ooc.swap.storage import State
from tests.swap.cuda.conftest import UNIT, states
from tests.swap.cuda.test_eviction import value, with_recipe


@pytest.fixture
def rig(make_rig):
    return make_rig()


def executor_of(saved, need=0, **moves):
    """Return a player of these moves; the number of a storage is its place in the list."""
    plan = Plan("graph", (), need_bytes=(need,) * 10, **moves)
    return PlanExecutor(plan, lambda number: saved[number] and saved[number].storage)


def test_what_goes_out_is_released_once_its_copy_is_complete(rig):
    rig.cupy.eagerness = 0
    saved = [rig.save(float(i)) for i in range(3)]
    executor = executor_of(saved, copy_out=((1, 0), (2, 1)))
    rig.manager.run_plan(executor, 0)
    assert states(saved) == [State.RESIDENT] * 3
    rig.manager.run_plan(executor, 1)
    rig.manager.run_plan(executor, 1)
    assert states(saved) == [State.GOING_OUT, State.RESIDENT, State.RESIDENT]
    rig.cupy.synchronize()
    rig.manager.run_plan(executor, 2)
    assert states(saved) == [State.OUT, State.GOING_OUT, State.RESIDENT]


def test_what_is_held_goes_out_later_and_what_is_used_or_dead_does_not(rig):
    saved = [rig.save(0.0), rig.save(1.0), None]
    rig.manager.release_use(saved[1:2], drop=False)
    held = saved[0].get()
    executor = executor_of(saved, copy_out=((0, 0), (0, 1), (0, 2)))
    rig.manager.run_plan(executor, 0)
    assert states(saved[:2]) == [State.RESIDENT] * 2
    del held
    rig.manager.run_plan(executor, 1)
    assert states(saved[:2]) == [State.GOING_OUT, State.RESIDENT]


def test_what_should_go_out_and_has_a_copy_is_released(rig):
    saved = [rig.save(0.0)]
    rig.manager._transfers.begin_out(saved[0].storage)
    rig.cupy.synchronize()
    executor = executor_of(saved, copy_out=((0, 0),))
    rig.manager.run_plan(executor, 0)
    rig.manager.run_plan(executor, 1)
    assert states(saved) == [State.OUT]


def test_what_was_out_when_it_should_go_and_came_back_since_stays(rig):
    saved = [rig.save(0.0)]
    rig.manager.move_all_out()
    executor = executor_of(saved, copy_out=((0, 0),))
    rig.manager.run_plan(executor, 0)
    rig.manager.fetch(saved, read_only=True)
    rig.manager.run_plan(executor, 1)
    assert states(saved) == [State.BOTH]


def test_clean_ones_are_released_when_it_is_due(rig):
    saved = [rig.save(float(i)) for i in range(2)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved, read_only=True)
    executor = executor_of(saved, release=((1, 0),))
    rig.manager.run_plan(executor, 0)
    assert states(saved) == [State.BOTH] * 2
    rig.manager.run_plan(executor, 1)
    assert states(saved) == [State.OUT, State.BOTH]


def test_copies_in_begin_when_they_are_due_and_pass_over_what_needs_none(rig):
    saved = [*(rig.save(float(i)) for i in range(5)), None]
    rig.manager.move_all_out()
    rig.manager.release_use(saved[1:2], drop=False)
    rig.manager.fetch(saved[2:3], read_only=True)
    executor = executor_of(saved, copy_in=((0, 5), (0, 1), (0, 2), (0, 3), (1, 4)))
    rig.manager.run_plan(executor, 0)
    out, coming = State.OUT, State.COMING_IN
    assert states(saved[:5]) == [out, out, State.BOTH, coming, out]
    rig.manager.run_plan(executor, 1)
    assert states(saved[:5]) == [out, out, State.BOTH, coming, coming]


def test_copies_in_wait_for_room_and_keep_their_order(rig):
    saved = [rig.save(0.0, 4 * UNIT), rig.save(1.0)]
    rig.manager.move_all_out()
    other = rig.array(0.0, 2 * UNIT)
    executor = executor_of(saved, need=2 * UNIT, copy_in=((0, 0), (0, 1)))
    rig.manager.run_plan(executor, 0)
    assert states(saved) == [State.OUT] * 2
    del other
    rig.manager.run_plan(executor, 1)
    assert states(saved) == [State.COMING_IN] * 2


def test_what_has_come_already_asks_for_no_room(rig):
    saved = [rig.save(0.0, 4 * UNIT), rig.save(1.0)]
    rig.manager.move_all_out()
    held = saved[0].get()
    executor = executor_of(saved, need=2 * UNIT, copy_in=((0, 0), (0, 1)))
    rig.manager.run_plan(executor, 0)
    assert states(saved) == [State.BOTH, State.COMING_IN]
    del held


def test_copies_in_wait_for_what_is_going_out_still(rig):
    saved = [rig.save(float(i)) for i in range(2)]
    rig.manager.move_all_out()
    rig.cupy.eagerness = 0
    first = rig.save(2.0)
    rig.manager._transfers.begin_out(first.storage)
    executor = executor_of([first, *saved], copy_in=((0, 0), (0, 1)))
    rig.manager.run_plan(executor, 0)
    assert states([first, *saved]) == [State.GOING_OUT, State.OUT, State.OUT]


@pytest.fixture
def staying(rig):
    """Return what is to be dropped, a player that has tried to, and what has kept it: it is held, or its input."""

    def make(what):
        x = rig.save(1.0)
        y = with_recipe(rig, x)
        held = [(x if what == "input" else y).get()]
        saved = [y]
        executor = executor_of(saved, discard=((0, 0),))
        rig.manager.run_plan(executor, 0)
        assert states(saved) == [State.RESIDENT]
        return y, executor, held

    return make


@pytest.mark.parametrize("what", ["input", "itself"])
def test_what_is_held_is_given_up_once_it_is_let_go(rig, staying, what):
    """Who holds an input may write to it."""
    y, executor, held = staying(what)
    held.clear()
    rig.manager.run_plan(executor, 1)
    rig.cupy.synchronize()
    rig.manager.run_plan(executor, 2)
    assert y.storage.state is State.DISCARDED
    assert value(y) == 2


def test_what_was_used_meanwhile_is_not_given_up_later(rig, staying):
    y, executor, held = staying("input")
    rig.manager.release_use([y], drop=False)
    rig.manager.run_plan(executor, 1)
    held.clear()
    rig.manager.run_plan(executor, 2)
    assert y.storage.state is State.RESIDENT


def test_what_was_out_when_it_was_to_be_given_up_stays_once_it_came_back(rig):
    y = with_recipe(rig, rig.save(1.0), costly=True)
    rig.manager.add_use([y])
    rig.manager.move_all_out()
    executor = executor_of([y], discard=((0, 0),))
    rig.manager.run_plan(executor, 0)
    assert value(y) == 2
    rig.manager.run_plan(executor, 1)
    assert y.storage.state.in_memory


def test_what_is_dead_serves_nobody(rig):
    saved = [rig.save(0.0), None]
    executor = executor_of(saved, evict_after_recompute=((0, 0), (0, 1)))
    assert executor.evict_after_recompute(0) == [saved[0].storage]
    rig.manager.run_plan(executor, 0)
    assert list(rig.manager._evict_after_recompute) == [saved[0].storage]
    rig.manager.run_plan(executor, 1)
    assert not rig.manager._evict_after_recompute
