"""Reclaimer: what goes first, what is waited for, and what is tried last."""

from __future__ import annotations

import gc
import inspect
import sys
import time

import pytest

from chainer_ooc.planning.eviction import outside
from chainer_ooc.planning.executor import PlanExecutor
from chainer_ooc.planning.plan import Plan
from chainer_ooc.swap.recipe import Constant, Recipe
from chainer_ooc.swap.storage import State
from tests.swap.cuda.conftest import UNIT, give_up, states


@pytest.fixture
def rig(make_rig):
    return make_rig()


@pytest.fixture
def trims(rig, monkeypatch):
    """The trims of the device: whether each was desperate."""
    calls = []
    monkeypatch.setattr(rig.device, "trim", calls.append)
    return calls


def value(saved):
    return float(saved.get().get()[0])


def with_recipe(rig, needed, seen=(), **more):
    """Save an array that is ``needed`` plus 1, with its recipe."""
    array = rig.array(value(needed) + 1)
    saved = rig.manager.save(array, "y")
    rig.manager.add_use([saved])

    def run(arrays):
        for look in seen:
            look()
        return rig.array(float(arrays[0].get()[0]) + 1)

    looks = rig.manager.fingerprint(saved), (rig.manager.fingerprint(needed),)
    rig.manager.give_recipe(saved, Recipe((needed,), run, saved.layout, *looks, **more))
    return saved


@pytest.mark.parametrize("chosen", [False, True], ids=["on demand", "by a plan"])
def test_what_a_plan_sends_out_goes_before_what_has_a_copy(rig, chosen):
    clean, leaving = rig.save(0.0), rig.save(1.0)
    rig.manager._transfers.begin_out(clean.storage)
    rig.manager.settle()
    rig.cupy.eagerness = 0
    rig.manager._transfers.begin_out(leaving.storage)
    rig.manager._evictor.follows_plan = chosen
    assert rig.manager.make_room(6 * UNIT)
    goes, stays = (leaving, clean) if chosen else (clean, leaving)
    assert goes.storage.state is State.OUT
    assert stays.storage.state is not State.OUT


def test_when_all_is_given_up_and_not_enough_the_system_is_asked_for_the_last(rig, trims):
    held = rig.array(0.0, 6 * UNIT)
    saved = rig.save(1.0)
    assert not rig.manager.make_room(7 * UNIT)
    assert saved.storage.state is State.OUT
    assert trims == [False, False, True]
    del held


def test_when_the_last_resort_was_enough_nothing_more_is_asked(rig, trims):
    saved = [rig.save(float(i)) for i in range(4)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved[3:], read_only=True)
    rig.manager.prefetch(saved[3:])
    trims.clear()
    assert rig.manager.make_room(6 * UNIT)
    assert State.COMING_IN in states(saved)
    assert True not in trims


def test_only_so_many_that_leave_are_waited_for(rig):
    rig.cupy.eagerness = 0
    saved = [rig.save(float(i)) for i in range(3)]
    for one in saved:
        rig.manager._transfers.begin_out(one.storage)
    rig.manager._evictor.release_leaving(UNIT)
    assert states(saved) == [State.OUT, State.GOING_OUT, State.GOING_OUT]


def test_those_that_died_on_their_way_out_are_passed_over(rig):
    dying, last = rig.save(1.0), rig.save(2.0)
    for one in (dying, last):
        rig.manager._transfers.begin_out(one.storage)
    del dying, one
    gc.collect()
    rig.manager._transfers.begin_out(rig.save(3.0).storage)
    assert rig.manager._evictor.release_leaving(2 * UNIT) == UNIT
    assert last.storage.state is State.OUT


def test_settling_what_has_ended_waits_for_nothing(rig):
    rig.cupy.eagerness = 0
    saved = rig.save(1.0)
    rig.manager._transfers.begin_out(saved.storage)
    rig.manager._evictor.settle()
    assert saved.storage.state is State.GOING_OUT
    rig.cupy.synchronize()
    rig.manager._evictor.settle()
    assert saved.storage.state is State.BOTH


def test_giving_up_what_can_be_made_again_needs_no_copy(rig):
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    assert give_up(rig, y) == UNIT
    assert y.storage.state is State.DISCARDED
    assert value(y) == 2


def test_what_somebody_holds_is_not_given_up(rig):
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    assert y.storage.recipe is not None
    held = y.get()
    assert give_up(rig, y) == 0
    assert y.storage.state is State.RESIDENT
    del held


def test_what_has_a_copy_goes_for_that_although_it_could_be_made_again(rig):
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    rig.manager._transfers.begin_out(y.storage)
    rig.manager.settle()
    assert give_up(rig, y) == UNIT
    assert y.storage.state is not State.DISCARDED
    assert x.storage.remaining_uses == 1
    assert rig.manager.counters.bytes_discarded == 0


def test_what_has_neither_a_copy_nor_a_recipe_is_not_given_up(rig):
    saved = rig.save(1.0)
    assert give_up(rig, saved) == 0
    assert saved.storage.state is State.RESIDENT


def test_on_demand_what_others_are_made_again_from_goes_with_a_copy(rig):
    """Or making those again would need it made again first."""
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    z = with_recipe(rig, y)
    assert give_up(rig, z) == UNIT
    assert y.storage.dependents
    rig.manager.move_all_out()
    assert y.storage.state is State.OUT
    assert [value(one) for one in (z, y, x)] == [3, 2, 1]


@pytest.mark.parametrize("first", [0, 1], ids=["inputs first", "outputs first"])
def test_a_plan_gives_up_what_others_are_made_again_from(rig, first):
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    z = with_recipe(rig, y)
    for one in (z, y) if first else (y, z):
        assert give_up(rig, one) == UNIT
    rig.manager.move_all_out()
    assert states([x, y, z]) == [State.OUT, State.DISCARDED, State.DISCARDED]
    assert outside(rig.manager._transfers, z.storage) == [x.storage]
    assert value(z) == 3
    assert states([y, z]) == [State.RESIDENT] * 2
    assert [len(one.storage.dependents or ()) for one in (x, y)] == [0, 0]
    assert [one.storage.remaining_uses for one in (x, y, z)] == [1, 1, 1]
    assert [value(one) for one in (y, x)] == [2, 1]


def test_copies_that_a_chain_begins_with_are_fetched_ahead_if_there_is_room(rig):
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    z = with_recipe(rig, y)
    for one in (y, z):
        give_up(rig, one)
    rig.manager.move_all_out()
    most = rig.pool.used_bytes() + UNIT
    assert not rig.manager._evictor.begin_ahead(z.storage, most - 1)
    assert x.storage.state is State.OUT
    assert rig.manager._evictor.begin_ahead(z.storage, most)
    assert x.storage.ahead
    assert states([y, z]) == [State.DISCARDED] * 2
    assert value(z) == 3


def test_what_only_serves_to_make_others_is_given_up_when_the_last_is_made(rig):
    runs = []
    x = rig.save(1.0)
    y = with_recipe(rig, x, [lambda: runs.append("y")])
    z = with_recipe(rig, y, [lambda: runs.append("z")])
    w = with_recipe(rig, y, [lambda: runs.append("w")])
    for one in (y, z, w):
        give_up(rig, one)
    plan = Plan("graph", (), evict_after_recompute=((0, 0),), need_bytes=(0,))
    saved = [y]
    rig.manager.run_plan(PlanExecutor(plan, lambda number: saved[number].storage), 0)
    arrays = rig.manager.fetch([z, w], read_only=True)
    assert [float(array.get()[0]) for array in arrays] == [3, 3]
    assert runs == ["y", "z", "w"]
    rig.manager.settle()
    assert y.storage.state is State.DISCARDED
    rig.manager.run_plan(None)
    assert value(y) == 2


def test_costly_recipes_are_for_plans(rig):
    x = rig.save(1.0)
    y = with_recipe(rig, x, costly=True)
    rig.manager.move_all_out()
    assert y.storage.state is State.OUT
    assert value(y) == 2
    rig.manager._transfers.mark_dirty(y.storage)
    assert give_up(rig, y) == UNIT
    assert y.storage.state is State.DISCARDED
    assert value(y) == 2


@pytest.fixture
def shallow_stack():
    """Allow 80 frames more than there are."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 80)
    yield
    sys.setrecursionlimit(before)


def test_a_long_chain_needs_no_deep_stack(make_rig, shallow_stack):
    rig = make_rig(limit=32 * UNIT)
    chain = [rig.save(0.0, 512)]
    for _ in range(100):
        array = rig.array(len(chain), 512)
        made = rig.manager.save(array, "y")
        rig.manager.add_use([made])
        looks = rig.manager.fingerprint(made), (rig.manager.fingerprint(chain[-1]),)

        def run(arrays):
            return rig.array(float(arrays[0].get()[0]) + 1, 512)

        rig.manager.give_recipe(made, Recipe((chain[-1],), run, made.layout, *looks))
        chain.append(made)
        del array
    for one in chain[1:]:
        give_up(rig, one)
    assert all(one.storage.state is State.DISCARDED for one in chain[1:])
    assert value(chain[-1]) == 100


@pytest.mark.parametrize("when", ["before", "after"])
def test_constants_are_what_they_were(rig, when):
    x, w = rig.save(1.0), rig.array(10.0)
    constant = Constant(rig.device, w)

    def run(arrays):
        return rig.array(float(arrays[0].get()[0]) + float(constant.array.get()[0]))

    array = rig.array(11.0)
    y = rig.manager.save(array, "y")
    rig.manager.add_use([y])
    looks = rig.manager.fingerprint(y), (rig.manager.fingerprint(x),)
    recipe = Recipe((x,), run, y.layout, *looks, constants=(constant,))
    assert recipe.bytes_to_keep() == UNIT
    rig.manager.give_recipe(y, recipe)
    del array
    if when == "before":
        w.fill(20)
        assert give_up(rig, y) == 0
        assert y.storage.state is State.RESIDENT
    else:
        assert give_up(rig, y) == UNIT
        w.fill(20)
        assert recipe.bytes_to_keep() == 0
    assert value(y) == 11


def test_room_for_constants_is_made_before_they_are_kept(rig):
    x, w = rig.save(1.0), rig.array(10.0)
    rig.allocator.install()
    recipe = {"constants": (Constant(rig.device, w),)}
    y = with_recipe(rig, x, **recipe)
    others = [rig.save(float(i)) for i in range(4)]
    assert 7 * UNIT <= rig.pool.used_bytes() < rig.manager.budget.high
    with rig.manager._lock:  # so that what is allocated does not ask for room itself
        assert give_up(rig, y) == UNIT
    assert State.OUT in states([x, *others])
    assert rig.pool.used_bytes() <= rig.manager.budget.high
    assert value(y) == 2


def test_what_a_recipe_allocates_finds_room(rig):
    rig.allocator.install()
    blocks = []
    y = with_recipe(rig, rig.save(1.0), [lambda: blocks.append(rig.array(0.0, 3 * UNIT))])
    rig.manager.move_all_out()
    assert y.storage.state is State.DISCARDED
    others = [rig.save(float(i)) for i in range(6)]
    assert value(y) == 2
    assert State.OUT in states(others)
    assert rig.pool.used_bytes() <= rig.manager.budget.high
    assert rig.manager.busy is False


def test_waits_of_a_recipe_are_no_time_of_running_it(rig):
    def wait():
        start = time.perf_counter()
        time.sleep(0.1)
        rig.manager._transfers.stalled("room", start)

    y = with_recipe(rig, rig.save(1.0), [wait])
    rig.manager.move_all_out()
    counters = rig.manager.counters
    start, before = time.perf_counter(), counters.lost_seconds
    assert value(y) == 2
    elapsed = time.perf_counter() - start
    assert counters.stall_room_seconds >= 0.1
    assert 0 <= counters.recompute_seconds <= elapsed - 0.1
    assert counters.lost_seconds - before <= elapsed


def test_a_recipe_that_fails_leaves_no_trace(rig):
    failures = [MemoryError("no")]

    def fail():
        if failures:
            assert not rig.manager.busy
            raise failures.pop()

    y = with_recipe(rig, rig.save(1.0), [fail])
    rig.manager.move_all_out()
    with pytest.raises(MemoryError, match="no"):
        value(y)
    with rig.manager._lock:
        assert rig.manager.busy
    assert value(y) == 2


def test_what_is_about_to_be_written_to_is_no_input_meanwhile(rig):
    """Room for what is made from it at the last moment is not made by giving up more of that kind."""
    rig.allocator.install()
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    rig.manager.move_all_out()
    z = with_recipe(rig, x)
    rest = [rig.array(0.0) for _ in range(5)]
    rig.manager.read(x).fill(7)
    assert [value(one) for one in (z, y, x)] == [2, 2, 7]
    w = with_recipe(rig, x)
    rig.manager.move_all_out()
    assert w.storage.state is State.DISCARDED
    assert rest


def test_what_others_are_made_from_is_not_dropped_however_often_it_was_used(rig):
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    for _ in range(3):
        rig.manager.release_use([x], drop=False)
    give_up(rig, y)
    rig.manager.release_use([x], drop=True)
    assert value(y) == 2
    rig.manager.release_use([x], drop=True)
    assert x.storage.state is State.DROPPED


def test_what_dies_with_a_recipe_that_died_is_forgotten_as_well(rig):
    y = with_recipe(rig, rig.save(1.0))
    rig.manager.move_all_out()
    assert y.storage.state is State.DISCARDED
    del y
    rig.manager._transfers.run_deferred_frees()
    assert set(rig.manager._transfers.nbytes.values()) == {0}


def test_room_for_constants_may_be_that_of_the_storage_itself(rig):
    x, w = rig.save(1.0), rig.array(10.0)
    y = with_recipe(rig, x, constants=(Constant(rig.device, w),), costly=True)
    rig.manager._transfers.begin_out(x.storage)
    rig.manager.settle()
    rig.manager._evictor.release_unless_held(x.storage)
    rest = [rig.array(0.0) for _ in range(5)]
    assert give_up(rig, y) == 0
    assert y.storage.state is State.OUT
    assert len(rest) == 5
    rest.clear()
    assert value(y) == 2


def test_with_room_enough_nothing_is_trimmed(rig, trims):
    rig.save(1.0)
    rig.manager._evictor.reclaim(UNIT)
    assert trims == []


def test_what_has_been_made_again_does_not_make_room_for_the_next(rig):
    rig.allocator.install()
    runs = []
    x = rig.save(1.0)
    y = with_recipe(rig, x, [lambda: runs.append("y")])
    z = with_recipe(rig, x, [lambda: rig.array(0.0, 3 * UNIT)])
    rig.manager.move_all_out()
    other, rest = rig.save(5.0, 3 * UNIT), rig.array(0.0)
    arrays = rig.manager.fetch([y, z], read_only=True)
    assert [float(array.get()[0]) for array in arrays] == [2, 2]
    assert runs == ["y"]
    assert other.storage.state is State.OUT
    assert rest is not None


def test_the_dead_need_nothing_any_more(rig):
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    give_up(rig, y)
    del y
    rig.manager.release_use([x], drop=True)
    assert x.storage.state is State.DROPPED


@pytest.mark.parametrize("why", ["another function", "a recipe"])
def test_who_holds_what_is_needed_still_may_write_to_it(rig, why):
    x = rig.save(1.0)
    y = with_recipe(rig, x) if why == "a recipe" else None
    if y is None:
        rig.manager.add_use([x])
    rig.manager.move_all_out()
    (held,) = rig.manager.fetch([x], read_only=True)
    assert x.storage.state is State.BOTH
    if y is not None:
        assert y.storage.state is State.DISCARDED
        x.storage.remaining_uses = 1  # as if it had been used once too often
    rig.manager.release_use([x], drop=True)
    assert x.storage.state in (State.RESIDENT, State.DROPPED)
    assert y is not None or x.storage.state is State.RESIDENT
    held.fill(7)
    if y is not None:
        assert value(y) == 2


def test_what_several_are_made_from_is_fetched_once(rig):
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    array = rig.array(3.0)
    both = rig.manager.save(array, "sum")
    looks = rig.manager.fingerprint(both), (rig.manager.fingerprint(x), rig.manager.fingerprint(y))

    def run(arrays):
        return rig.array(sum(float(one.get()[0]) for one in arrays))

    rig.manager.give_recipe(both, Recipe((x, y), run, both.layout, *looks))
    del array
    for one in (both, y):
        give_up(rig, one)
    rig.manager.move_all_out()
    assert outside(rig.manager._transfers, both.storage) == [x.storage]
    assert value(both) == 3
