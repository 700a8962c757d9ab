"""What happens to an array, and to what it is made from, while nobody knows yet whether it may be discarded."""

from __future__ import annotations

import gc

import pytest

from chainer_ooc.errors import CorruptCopyError
from chainer_ooc.planning.executor import PlanExecutor
from chainer_ooc.planning.plan import Plan
from chainer_ooc.swap.recipe import Constant, Recipe
from chainer_ooc.swap.storage import State
from tests.swap.cuda.conftest import UNIT, give_up, states
from tests.swap.cuda.test_eviction import value, with_recipe


@pytest.fixture
def rig(make_rig):
    """A rig that does nothing before it must."""
    rig = make_rig(limit=16 * UNIT)
    rig.cupy.eagerness = 0
    return rig


def begin(rig, saved):
    """Begin to discard an array."""
    assert rig.manager._evictor.give_up(saved.storage) == 0
    assert saved.storage.state is State.CHECKING
    return saved


def settle(rig):
    """Let the GPU do all that it has been given, and the engine take note of it."""
    rig.cupy.synchronize()
    rig.manager._evictor.settle()


@pytest.fixture
def pair(rig):
    """What is being checked, and what it is made from."""
    x = rig.save(1.0)
    return x, begin(rig, with_recipe(rig, x))


def needs_nothing(x):
    return x.storage.remaining_uses == 1 and not x.storage.dependents


def test_it_is_discarded_once_that_is_known(rig, pair):
    x, y = pair
    rig.manager._evictor.settle()
    assert y.storage.state is State.CHECKING
    assert x.storage.remaining_uses == 2
    settle(rig)
    assert y.storage.state is State.DISCARDED
    assert rig.manager.counters.bytes_discarded == UNIT
    assert value(y) == 2


@pytest.mark.parametrize("seed", range(8))
def test_it_is_discarded_in_the_end_under_any_schedule(make_rig, seed):
    rig = make_rig(seed=seed)
    y = with_recipe(rig, rig.save(1.0))
    rig.manager._evictor.give_up(y.storage)
    rig.manager.settle()
    assert y.storage.state is State.DISCARDED
    assert value(y) == 2


@pytest.mark.parametrize("which", [0, 1], ids=["input", "itself"])
def test_what_was_written_to_before_stays(rig, which):
    """By somebody who had it before, and whom nobody sees."""
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    array = (x, y)[which].get()
    array.add(5)
    del array
    begin(rig, y)
    settle(rig)
    assert y.storage.state is State.RESIDENT
    assert y.storage.recipe is y.storage.verdict is None
    assert needs_nothing(x)
    assert value(y) == (2 + 5 * which)


def test_who_reads_it_meanwhile_has_it_at_once(rig, pair):
    _, y = pair
    time = rig.cupy.time
    array = y.get()
    assert rig.cupy.time == time  # no wait
    settle(rig)
    assert y.storage.state is State.RESIDENT  # it is held
    assert needs_nothing(pair[0])
    assert float(array.get()[0]) == 2


def test_who_has_read_it_and_let_it_go_does_not_keep_it(rig, pair):
    _, y = pair
    assert value(y) == 2
    assert y.storage.state in (State.CHECKING, State.DISCARDED)
    settle(rig)
    assert y.storage.state is State.DISCARDED
    assert value(y) == 2


@pytest.mark.parametrize("which", [0, 1], ids=["input", "itself"])
def test_who_may_write_to_it_ends_it(rig, pair, which):
    x, y = pair
    rig.manager.read(pair[which], read_only=False).add(5)
    assert y.storage.state is State.RESIDENT
    assert needs_nothing(x)
    settle(rig)
    rig.manager.move_all_out()
    assert y.storage.state is State.OUT
    assert (value(x), value(y)) == ((1, 7) if which else (6, 2))


def test_who_has_got_an_input_from_backward_ends_it(rig, pair):
    x, y = pair
    held = rig.manager.fetch([x], read_only=True)
    rig.manager.release_use([x], drop=False)
    assert y.storage.state is State.RESIDENT
    held[0].fill(9)
    settle(rig)
    assert value(y) == 2


def test_what_it_is_made_from_stays_until_it_is_made(rig, pair):
    x, y = pair
    rig.manager.release_use([x], drop=True)
    assert x.storage.state is State.RESIDENT
    settle(rig)
    rig.manager.move_all_out()
    assert (x.storage.state, y.storage.state) == (State.OUT, State.DISCARDED)
    assert value(y) == 2
    assert x.storage.remaining_uses == 0


def test_what_is_not_discarded_after_all_does_not_keep_its_inputs(rig):
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    y.get().add(1)
    begin(rig, y)
    settle(rig)
    rig.manager.release_use([x], drop=True)
    assert x.storage.state is State.DROPPED
    assert value(y) == 3


@pytest.mark.parametrize("end", ["dies", "is dropped"])
def test_what_ends_meanwhile_needs_nothing(rig, end):
    x = rig.save(1.0)
    y = begin(rig, with_recipe(rig, x))
    used = rig.pool.used_bytes()
    if end == "dies":
        del y
        gc.collect()
    else:
        rig.manager.release_use([y], drop=True)
        assert y.storage.state is State.DROPPED
    rig.manager._transfers.run_deferred_frees()
    assert x.storage.remaining_uses == 1
    assert rig.pool.used_bytes() == used - UNIT
    rig.array(9.0)  # where it was
    settle(rig)
    assert not rig.manager._transfers.leaving
    assert rig.manager._transfers.nbytes[State.CHECKING] == 0


def test_what_is_forgotten_meanwhile_with_its_inputs_leaves_nothing(rig):
    begin(rig, with_recipe(rig, rig.save(1.0)))
    gc.collect()
    rig.manager.settle()
    assert set(rig.manager._transfers.nbytes.values()) == {0}
    assert rig.pool.used_bytes() == 0
    assert rig.manager.storages() == []


def test_a_chain_is_discarded_whatever_is_known_first(rig):
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    z = with_recipe(rig, y)
    for one in (y, z):
        begin(rig, one)
    settle(rig)
    assert states([x, y, z]) == [State.RESIDENT, State.DISCARDED, State.DISCARDED]
    assert value(z) == 3
    assert value(y) == 2


def test_a_chain_of_which_the_first_may_not_be_discarded(rig):
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    z = with_recipe(rig, y)
    x.get().fill(9)
    for one in (y, z):
        begin(rig, one)
    settle(rig)
    assert states([y, z]) == [State.RESIDENT, State.DISCARDED]
    rig.manager.move_all_out()
    assert states([y, z]) == [State.OUT, State.DISCARDED]
    assert [value(one) for one in (z, y, x)] == [3, 2, 9]


# Room.


def fill(rig, *kept):
    """Fill memory up to the limit."""
    filled = []
    while rig.pool.used_bytes() + UNIT <= rig.manager.budget.high:
        filled.append(rig.array(0.0))
    return filled


def test_room_is_made_by_waiting_for_verdicts(rig, pair):
    rest = fill(rig)
    assert rig.manager.make_room(UNIT)
    assert states(pair) == [State.RESIDENT, State.DISCARDED]
    assert rig.manager.counters.stall_room_seconds > 0
    assert rest
    rest.clear()
    assert value(pair[1]) == 2


def test_no_more_is_checked_than_room_is_needed(rig):
    x = rig.save(1.0)
    made = [with_recipe(rig, x) for _ in range(4)]
    rest = fill(rig)
    rig.manager._evictor.push_out(2 * UNIT)
    assert states([x, *made]).count(State.RESIDENT) == 3
    assert rest


def test_what_may_not_be_discarded_makes_room_by_a_copy(rig):
    x = rig.save(1.0)
    made = [with_recipe(rig, x) for _ in range(3)]
    held = x.get()
    for one in made[:2]:
        one.get().add(10)
    rest = fill(rig)
    del held
    assert rig.manager._evictor.push_out(4 * UNIT) >= 4 * UNIT
    assert rig.manager.make_room(UNIT)
    rest.clear()
    assert states(made)[:2] == [State.OUT] * 2
    assert [value(one) for one in made] == [12, 12, 2]


@pytest.mark.parametrize("which", [0, 1], ids=["input", "itself"])
def test_room_is_made_around_who_has_just_got_it(rig, pair, which):
    held = pair[which].get()
    rest = fill(rig)
    rig.manager.make_room(8 * UNIT)
    assert pair[which].storage.state.in_memory
    assert float(held.get()[0]) == 1 + which
    rest.clear()
    assert value(pair[1]) == 2


def test_memory_of_the_discarded_is_used_after_the_fingerprint_on_another_stream(rig):
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    other = rig.cupy.cuda.Stream(non_blocking=True)
    with other:
        begin(rig, y)
    rig.manager.settle()
    assert y.storage.state is State.DISCARDED
    rig.array(9.0)
    assert value(y) == 2


# Dependents.


def plus(rig, *needed):
    """Save the sum of what was saved, with its recipe, and discard it."""
    array = rig.array(sum(value(one) for one in needed))
    saved = rig.manager.save(array, "sum")
    rig.manager.add_use([saved])

    def run(arrays):
        return rig.array(sum(float(one.get()[0]) for one in arrays))

    looks = rig.manager.fingerprint(saved), tuple(rig.manager.fingerprint(one) for one in needed)
    rig.manager.give_recipe(saved, Recipe(needed, run, saved.layout, *looks))
    return saved


def test_who_may_write_to_an_input_finds_what_others_re_runs_have_made(make_rig):
    """In whatever order its dependents come: some are made for others."""
    rig = make_rig(limit=24 * UNIT)
    x = rig.save(1.0)
    firsts = [with_recipe(rig, x) for _ in range(6)]
    lasts = [plus(rig, x, y) for y in firsts]
    for one in (*lasts, *firsts):
        give_up(rig, one)
    assert set(states(firsts + lasts)) == {State.DISCARDED}
    rig.manager.read(x, read_only=False).fill(7)
    assert set(states(firsts + lasts)) == {State.RESIDENT}
    assert [value(one) for one in (x, *firsts, *lasts)] == [7, *[2] * 6, *[3] * 6]
    assert needs_nothing(x)


@pytest.mark.parametrize("seed", range(12))
def test_who_may_write_to_an_input_when_room_is_short(make_rig, seed):
    """Making one dependent waits for what is known of others."""
    rig = make_rig(seed=seed, limit=8 * UNIT)
    rig.allocator.install()
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    z = plus(rig, x, y)
    for one in (z, y):
        give_up(rig, one)
    late = with_recipe(rig, x)
    if seed % 3:
        late.get().add(1)
    rig.manager._evictor.give_up(late.storage)
    rest = fill(rig)[2:]
    rig.manager.read(x, read_only=False).fill(7)
    assert [value(one) for one in (x, y, z)] == [7, 2, 3]
    assert value(late) == 2 + bool(seed % 3)
    assert rest


# Constants.


def test_a_constant_that_was_written_to_is_not_trusted_once_it_is_copied(rig):
    """Several recipes have it, and the copy is made before the first verdict is known."""
    x, w = rig.save(1.0), rig.array(10.0)
    constant = Constant(rig.device, w)

    def run(arrays):
        return rig.array(float(arrays[0].get()[0]) + float(constant.array.get()[0]))

    made = []
    for _ in range(2):
        array = rig.array(11.0)
        y = rig.manager.save(array, "y")
        rig.manager.add_use([y])
        looks = rig.manager.fingerprint(y), (rig.manager.fingerprint(x),)
        rig.manager.give_recipe(y, Recipe((x,), run, y.layout, *looks, constants=(constant,)))
        made.append(y)
        del array
    w.fill(20)
    for y in made:
        begin(rig, y)
    settle(rig)
    assert states(made) == [State.RESIDENT] * 2
    assert [value(y) for y in made] == [11, 11]


def test_a_constant_that_is_written_to_between_the_check_and_the_copy(rig, monkeypatch):
    """By another thread."""
    x, w = rig.save(1.0), rig.array(10.0)
    constant = Constant(rig.device, w)
    y = with_recipe(rig, x, constants=(constant,))
    real = rig.device.duplicate

    def duplicate(*args):
        w.fill(20)
        return real(*args)

    monkeypatch.setattr(rig.device, "duplicate", duplicate)
    begin(rig, y)
    settle(rig)
    assert y.storage.state is State.RESIDENT


# What was made again.


def wrong(rig, x):
    """Return what is discarded, and of which another is made."""
    array = rig.array(2.0)
    y = rig.manager.save(array, "Noisy")
    rig.manager.add_use([y])
    looks = rig.manager.fingerprint(y), (rig.manager.fingerprint(x),)
    noise = iter((2.5, 2.0, 2.0))
    recipe = Recipe((x,), lambda arrays: rig.array(next(noise)), y.layout, *looks)
    rig.manager.give_recipe(y, recipe)
    del array
    give_up(rig, y)
    assert y.storage.state is State.DISCARDED
    return y


def test_other_bits_are_an_error_that_names_the_function_when_that_is_known(rig):
    x, other = rig.save(1.0), rig.save(5.0)
    y = wrong(rig, x)
    rig.manager.fetch([y], read_only=True)
    rig.manager.fetch([other], read_only=True)  # not known yet
    rig.cupy.synchronize()
    for _ in range(2):  # as long as it lives
        with pytest.raises(CorruptCopyError, match=r'Noisy was run again: .*recompute="never"'):
            rig.manager.fetch([other], read_only=True)
    del y
    gc.collect()
    with pytest.raises(CorruptCopyError):
        rig.manager.fetch([other], read_only=True)
    rig.manager.fetch([other], read_only=True)


def test_who_died_with_other_bits_is_reported_once(rig):
    x, other = rig.save(1.0), rig.save(5.0)
    y = wrong(rig, x)
    rig.manager.fetch([y], read_only=True)
    del y
    gc.collect()
    rig.cupy.synchronize()
    with pytest.raises(CorruptCopyError, match="Noisy was run again"):
        rig.manager.fetch([other], read_only=True)
    rig.manager.fetch([other], read_only=True)


def test_the_last_ones_are_waited_for_in_the_end(rig):
    x = rig.save(1.0)
    good = with_recipe(rig, x)
    give_up(rig, good)
    y = wrong(rig, x)
    rig.manager.fetch([good, y], read_only=True)
    with pytest.raises(CorruptCopyError, match="Noisy was run again"):
        rig.manager.check_remade()
    del y
    gc.collect()
    with pytest.raises(CorruptCopyError):
        rig.manager.check_remade()
    rig.manager.check_remade()


def test_readers_of_what_is_made_again_are_told_as_well(rig):
    """They fetch nothing."""
    x = rig.save(1.0)
    y, z = wrong(rig, x), with_recipe(rig, x)
    give_up(rig, z)
    assert value(y) == 2.5
    rig.cupy.synchronize()
    with pytest.raises(CorruptCopyError, match="Noisy was run again"):
        value(z)
    assert z.storage.state is State.DISCARDED
    del y
    gc.collect()
    with pytest.raises(CorruptCopyError):
        value(z)
    assert value(z) == 2


def test_the_right_bits_are_no_error(rig):
    x = rig.save(1.0)
    made = [with_recipe(rig, x) for _ in range(3)]
    for y in made:
        give_up(rig, y)
        rig.manager.fetch([y], read_only=True)
    rig.cupy.synchronize()
    assert rig.manager._transfers._remade
    rig.manager.fetch(made, read_only=True)
    assert not rig.manager._transfers._remade


# Plans.


def test_a_plan_goes_on_looking_until_it_knows(rig):
    x = rig.save(1.0)
    y, z = with_recipe(rig, x), with_recipe(rig, x)
    z.get().add(1)
    saved = [y, z]
    plan = Plan("graph", (), need_bytes=(0,) * 9, discard=((0, 0), (0, 1)))
    executor = PlanExecutor(plan, lambda number: saved[number].storage)
    rig.manager.run_plan(executor, 0)
    assert states(saved) == [State.CHECKING] * 2
    assert not executor.is_idle(1)
    assert executor.refused == set()
    rig.cupy.synchronize()
    rig.manager.run_plan(executor, 1)
    assert states(saved) == [State.DISCARDED, State.RESIDENT]
    assert executor.refused == {1}
    assert executor.is_idle(2)
    assert [value(one) for one in saved] == [2, 3]
