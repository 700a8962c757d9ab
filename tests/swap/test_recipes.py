"""Recipes: what is given up with no copy, and made again."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from chainer_ooc.errors import CorruptCopyError
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.ram import RamDevice
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.recipe import Recipe
from chainer_ooc.swap.storage import State


@pytest.fixture
def manager(tmp_path):
    device = RamDevice(str(tmp_path))
    yield SwapManager(device, lambda: Settings(limit=1 << 40, min_bytes=1))
    device.close()


def save_pair(manager, run=lambda arrays: arrays[0] + 1):
    """Save ``x`` and ``y = x + 1``, with the recipe; nobody holds them."""
    x, y = np.arange(5000.0), np.arange(5000.0) + 1
    saved = manager.save(x, "x"), manager.save(y, "y")
    for one in saved:
        manager.add_use([one])
    looks = manager.fingerprint(saved[1]), (manager.fingerprint(saved[0]),)
    manager.give_recipe(saved[1], Recipe((saved[0],), run, saved[1].layout, *looks))
    return saved


def fits(manager, saved, planned=False):
    """Return whether the recipe of a saved array may be used now."""
    verdict = saved.storage.recipe.check(manager.device, saved.storage, planned)
    return verdict is not None and verdict.equal()


def test_it_goes_without_a_copy_and_comes_back(manager):
    x, y = save_pair(manager)
    manager.move_all_out()
    assert x.storage.state is State.OUT and x.storage.copy is not None
    assert y.storage.state is State.DISCARDED
    assert manager.counters.bytes_out == 40000 == manager.counters.bytes_discarded
    (array,) = manager.fetch([y], read_only=True)
    assert array.tolist() == (np.arange(5000.0) + 1).tolist()
    assert not x.storage.dependents
    assert (x.storage.remaining_uses, y.storage.remaining_uses) == (1, 1)


def test_what_is_needed_for_it_is_not_dropped_before(manager):
    x, y = save_pair(manager)
    manager.move_all_out()
    manager.release_use([x], drop=True)
    assert x.storage.state is State.OUT
    assert manager.read(y, read_only=True)[10] == 11
    manager.release_use([y], drop=True)
    assert y.storage.state is State.DROPPED
    assert x.storage.used


@pytest.mark.parametrize("way", ["in", "out"])
def test_nothing_is_left_of_what_a_dead_recipe_held_in_the_midst_of_a_copy(manager, way):
    x, y = save_pair(manager)
    if way == "in":
        manager.move_all_out()
        manager._transfers.begin_in(x.storage)
    else:
        manager._transfers.begin_out(x.storage)
        manager._evictor.give_up(y.storage)
    del x, y
    manager.settle()
    assert (sum(manager._transfers.nbytes.values()), manager.device.file.allocated) == (0, 0)


@pytest.mark.parametrize("end", ["dies", "is dropped"])
def test_what_ends_needs_nothing_any_more(manager, end):
    x, y = save_pair(manager)
    manager.move_all_out()
    assert x.storage.remaining_uses == 2
    if end == "dies":
        del y
        gc.collect()
    else:
        manager.release_use([y], drop=True)
        assert not x.storage.dependents
    manager.settle()
    assert x.storage.remaining_uses == 1
    assert manager.read(x)[3] == 3


def test_what_dies_as_it_is_here_needed_nothing(manager):
    x, y = save_pair(manager)
    del y
    gc.collect()
    manager.settle()
    assert x.storage.remaining_uses == 1


def test_who_may_write_to_the_input_gets_it_after_it_was_used(manager):
    x, y = save_pair(manager)
    manager.move_all_out()
    manager.read(x)[:] = 7
    assert manager.read(y, read_only=True)[10] == 11
    assert set(manager.read(x)) == {7}


@pytest.mark.parametrize("written", [0, 1])
def test_what_was_written_to_before_goes_with_a_copy(manager, written):
    saved = save_pair(manager)
    saved[written].alive()[:] = 7
    manager.move_all_out()
    assert saved[1].storage.state is not State.DISCARDED
    assert manager.read(saved[1])[10] == (7 if written else 11)


def test_an_input_that_somebody_holds_may_change(manager):
    x, y = save_pair(manager)
    held = x.alive()
    manager.move_all_out()
    assert y.storage.state is not State.DISCARDED
    held[:] = 7
    assert manager.read(y)[10] == 11


def test_nor_is_a_held_one_what_its_own_recipe_makes(manager):
    """A plan may give up what is made from what is made again; but this is here, and somebody writes to it."""
    _, y = save_pair(manager)
    z = manager.save(np.arange(5000.0) + 2, "z")
    looks = manager.fingerprint(z), (manager.fingerprint(y),)
    manager.give_recipe(z, Recipe((y,), lambda arrays: arrays[0] + 1, z.layout, *looks))
    assert fits(manager, z, planned=True)
    held = manager.read(y)
    held[:] = 7
    assert not fits(manager, z, planned=True)


def test_memory_lies_as_it_lay(manager):
    """In the page, and with its strides, whatever the recipe returns."""
    x = np.random.rand(40, 50)
    y = np.empty((50, 40)).T
    y[...] = x
    saved = [manager.save(x, "x"), manager.save(y, "y")]
    address, strides = y.__array_interface__["data"][0], y.strides
    looks = manager.fingerprint(saved[1]), (manager.fingerprint(saved[0]),)
    run = lambda arrays: arrays[0].copy()  # noqa: E731
    manager.give_recipe(saved[1], Recipe((saved[0],), run, saved[1].layout, *looks))
    expected = y.copy()
    del x, y
    manager.move_all_out()
    assert saved[1].storage.state is State.DISCARDED
    again = manager.read(saved[1], read_only=True)
    assert again.strides == strides
    assert (again.__array_interface__["data"][0] - address) % 4096 == 0
    assert (again == expected).all()


def test_a_recipe_is_no_input_of_another(manager):
    x, y = save_pair(manager)
    z = manager.save(np.arange(5000.0) + 2, "z")
    looks = manager.fingerprint(z), (manager.fingerprint(y),)
    add = lambda arrays: arrays[0] + 1  # noqa: E731
    manager.give_recipe(z, Recipe((y,), add, z.layout, *looks))
    manager.move_all_out()
    assert [one.storage.state is State.DISCARDED for one in (x, y, z)] == [False, True, False]
    assert manager.read(z)[10] == 12


def test_what_it_is_made_from_is_fetched_ahead(manager):
    x, y = save_pair(manager)
    last = manager.save(np.zeros(5000), "last")
    manager.add_use([last], rank=5)
    manager.move_all_out()
    manager.fetch([last], read_only=True)
    manager.prefetch([last])
    assert x.storage.state in (State.COMING_IN, State.BOTH)
    assert y.storage.state is State.DISCARDED
    assert manager.read(y, read_only=True)[10] == 11
    assert manager.counters.prefetch_hits == 1


def offered(manager, saved, needed=None):
    """Offer a recipe that gives zeros; return whether it was taken."""
    needed = needed or manager.save(np.arange(5000.0), "x")
    recipe = Recipe((needed,), lambda arrays: arrays[0] * 0, saved.layout, 0, (0,))
    manager.give_recipe(saved, recipe)
    return saved.storage.recipe is recipe


def test_a_recipe_is_taken_for_a_whole_resident_array_once(manager, tmp_path):
    whole = np.zeros(5000)
    saved = manager.save(whole, "y")
    assert offered(manager, saved)
    assert not offered(manager, saved)
    # A part of its storage, from the beginning or not.
    other = np.zeros(5000)
    head, tail = other[:100], other[100:]
    assert not offered(manager, manager.save(head, "head"))
    assert not offered(manager, manager.save(tail, "tail"))
    died = manager.save(other[:], "died")
    assert offered(manager, died)
    assert not offered(manager, manager.save(other, "whole"))
    backwards = np.zeros(5000)[::-1]
    assert not offered(manager, manager.save(backwards, "backwards"))
    # Somebody else's storages.
    device = RamDevice(str(tmp_path))
    stranger = SwapManager(device, manager.settings).save(np.arange(5000.0), "x")
    y = np.zeros(5000)
    assert not offered(manager, manager.save(y, "y"), stranger)
    device.close()


@pytest.mark.parametrize("state", [State.BOTH, State.OUT])
def test_a_recipe_comes_too_late_for_what_has_a_copy(manager, state):
    y = np.zeros(5000)
    saved = manager.save(y, "y")
    if state is State.OUT:
        del y
    manager._transfers.begin_out(saved.storage)
    manager.settle()
    if state is State.OUT:
        manager._transfers.release(saved.storage)
    assert saved.storage.state is state
    assert not offered(manager, saved)


def test_a_look_at_what_is_nowhere_tells_what_it_was(manager):
    _, y = save_pair(manager)
    before = manager.fingerprint(y)
    manager.move_all_out()
    assert y.storage.state is State.DISCARDED
    assert manager.fingerprint(y) == before


def test_several_are_made_from_one(manager):
    """Who may write to that gets it after all of them were made."""
    x, y = save_pair(manager)
    z = manager.save(np.arange(5000.0) * 2, "z")
    looks = manager.fingerprint(z), (manager.fingerprint(x),)
    double = lambda arrays: arrays[0] * 2  # noqa: E731
    manager.give_recipe(z, Recipe((x,), double, z.layout, *looks))
    manager.move_all_out()
    assert y.storage.state is State.DISCARDED and z.storage.state is State.DISCARDED
    manager.read(x)[:] = 7
    assert [manager.read(one, read_only=True)[10] for one in (y, z)] == [11, 20]


def test_an_input_that_is_written_to_as_it_goes_out_is_no_input(manager):
    """Its copy will be worth nothing."""
    x, y = save_pair(manager)
    manager._transfers.begin_out(x.storage)
    manager.read(x)  # by somebody who may write
    assert x.storage.dirty
    assert not fits(manager, y)
    manager.settle()


@pytest.mark.parametrize("held", [False, True])
def test_what_was_dropped_is_no_input(manager, held):
    x, y = save_pair(manager)
    array = x.alive() if held else None
    manager.release_use([x], drop=True)
    assert x.storage.state is State.DROPPED
    assert not fits(manager, y, planned=True)
    manager.move_all_out()
    assert y.storage.state is State.OUT
    assert manager.read(y)[10] == 11
    assert (array is not None) is held


def test_what_is_dropped_as_it_is_here_needs_nothing_and_holds_nothing(manager):
    x, y = save_pair(manager)
    manager.release_use([y], drop=True)
    assert y.storage.state is State.DROPPED
    assert x.storage.remaining_uses == 1
    del x
    gc.collect()
    assert manager.storages() == [y.storage]


def test_other_bits_are_an_error_and_it_stays_out(manager):
    _, y = save_pair(manager, lambda arrays: arrays[0] + 2)
    manager.move_all_out()
    with pytest.raises(CorruptCopyError, match='recompute="never"'):
        manager.read(y, read_only=True)
    assert y.storage.state is State.DISCARDED


def test_what_was_made_again_is_known_by_its_memory(manager):
    _, y = save_pair(manager)
    manager.move_all_out()
    array = manager.read(y, read_only=True)
    assert y.storage.state is State.RESIDENT
    assert manager._transfers.moved_bytes == 0  # two given up, two have come
    assert manager.save(array, "again").storage is y.storage
