"""Signs in place of a copy: when they do, when they do not any more, and what comes back."""

from __future__ import annotations

import numpy as np
import pytest

from chainer_ooc.errors import GraphReleasedError
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.ram import RamDevice
from chainer_ooc.swap.devices.signs import SignCopy
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.recipe import Recipe
from chainer_ooc.swap.storage import State

X = np.random.RandomState(0).randn(3, 5000).astype("f")


@pytest.fixture
def manager(tmp_path):
    device = RamDevice(str(tmp_path))
    yield SwapManager(device, lambda: Settings(limit=1 << 40, min_bytes=1))
    device.close()


def save(manager, *signs, array=None):
    """Save an array for as many functions; each tells whether it needs signs only."""
    saved = manager.save(np.maximum(X, 0) if array is None else array, "f")
    for one in signs:
        manager.expect([saved], signs=one)
    return saved


def packed(manager, saved):
    """Move all out; tell whether of this signs were kept."""
    before = manager.counters.bytes_as_signs, manager.counters.bytes_out
    manager.move_all_out()
    assert saved.storage.state is State.OUT
    after = manager.counters.bytes_as_signs, manager.counters.bytes_out
    as_signs, out = (b - a for a, b in zip(before, after, strict=True))
    assert (as_signs, out) in ((saved.nbytes, 0), (0, saved.storage.nbytes))
    return as_signs > 0


def test_signs_go_and_come_back(manager):
    saved = save(manager, True)
    assert packed(manager, saved)
    assert saved.storage.lossy
    array = manager.read(saved, trusted=True)
    assert array.dtype == X.dtype and array.shape == X.shape
    assert ((array > 0) == (X > 0)).all()
    assert set(np.unique(array)) == {0, 1}
    counters = manager.counters
    assert (counters.bytes_in, counters.storages_in, counters.storages_out) == (0, 0, 0)


@pytest.mark.parametrize("signs", [(False,), (True, False), (False, True), ()], ids=str)
def test_one_that_wants_values_is_enough(manager, signs):
    saved = save(manager, *signs)
    assert not packed(manager, saved)
    assert not saved.storage.lossy
    assert (saved.get() == np.maximum(X, 0)).all()


def test_several_that_want_signs_do(manager):
    assert packed(manager, save(manager, True, True))


def test_a_part_of_a_storage_has_no_signs(manager):
    whole = np.maximum(X, 0)
    saved = save(manager, True, array=whole[:2])
    del whole
    assert not packed(manager, saved)
    assert (saved.get() == np.maximum(X, 0)[:2]).all()


def test_on_a_gpu_all_goes(make_rig):
    rig = make_rig()
    saved = rig.save(3.0)
    rig.manager.expect([saved], signs=True)
    saved.storage.wants_values = False
    rig.manager.move_all_out()
    assert rig.manager.counters.bytes_out == saved.nbytes
    assert float(saved.get().get()[0]) == 3


@pytest.mark.parametrize("state", [State.GOING_OUT, State.BOTH])
def test_a_copy_of_signs_is_worth_nothing_to_who_wants_values(manager, state):
    saved = save(manager, True)
    manager._mover.begin_out(saved.storage)
    if state is State.BOTH:
        manager.settle()
        assert isinstance(saved.storage.copy, SignCopy)
    manager.expect([saved])
    manager.settle()
    assert saved.storage.state is State.RESIDENT
    assert not packed(manager, saved)
    assert (saved.get() == np.maximum(X, 0)).all()


@pytest.mark.parametrize("signs", [(False,), (True, False)], ids=str)
def test_a_whole_copy_stays_worth_what_it_is(manager, signs):
    """When one more wants values."""
    saved = save(manager, *signs)
    manager._mover.begin_out(saved.storage)
    manager.settle()
    manager.expect([saved])
    assert saved.storage.state is State.BOTH


def test_signs_that_came_back_stay_when_somebody_wants_values(manager):
    """There are none any more."""
    saved = save(manager, True)
    packed(manager, saved)
    array = manager.read(saved, trusted=True)
    manager.expect([saved])
    assert saved.storage.state is State.BOTH
    assert ((array > 0) == (X > 0)).all()


def test_only_who_is_trusted_reads_them(manager):
    saved = save(manager, True)
    packed(manager, saved)
    for _ in range(2):  # out, and here
        with pytest.raises(GraphReleasedError, match="only signs"):
            manager.read(saved)
        manager.read(saved, trusted=True)
    held = save(manager, True)
    manager._mover.begin_out(held.storage)
    manager.settle()
    assert (manager.read(held) == np.maximum(X, 0)).all()  # its values are there still


@pytest.mark.parametrize("state", [State.RESIDENT, State.BOTH])
def test_what_is_made_from_values_is_not_made_from_signs(manager, state):
    x = save(manager, True)
    y = np.maximum(X, 0) + 1
    made = manager.save(y, "y")
    looks = manager.look_at(made), (manager.look_at(x),)
    add = lambda arrays: arrays[0] + 1  # noqa: E731
    manager.give_recipe(made, Recipe((x,), add, made.layout, *looks))
    del y
    if state is State.BOTH:
        manager._mover.begin_out(x.storage)
        manager.settle()
        manager._reclaimer.give_up(made.storage)
        assert made.storage.state is State.RESIDENT
    else:
        manager._reclaimer.give_up(made.storage)
        assert made.storage.forgone
        manager.move_all_out()
        assert not x.storage.lossy
    assert (manager.read(made, trusted=True) == np.maximum(X, 0) + 1).all()


@pytest.mark.parametrize("ask", ["push_out", "give_up"])
def test_signs_are_cheaper_than_making_it_again(manager, ask):
    x = manager.save(X.copy(), "x")
    y = np.maximum(X, 0)
    saved = save(manager, True, array=y)
    looks = manager.look_at(saved), (manager.look_at(x),)
    relu = lambda arrays: np.maximum(arrays[0], 0)  # noqa: E731
    manager.give_recipe(saved, Recipe((x,), relu, saved.layout, *looks))
    assert saved.storage.recipe is not None
    held = y
    del y
    assert manager._reclaimer.give_up(saved.storage) == 0
    assert saved.storage.state is State.RESIDENT
    del held
    if ask == "give_up":
        assert manager._reclaimer.give_up(saved.storage) == saved.nbytes
    else:
        manager.move_all_out()
    assert saved.storage.lossy
    assert not saved.storage.forgone
    assert manager.counters.bytes_forgone == 0


def test_they_are_not_compared_with_what_went_out(manager):
    manager.settings = lambda: Settings(limit=1 << 40, min_bytes=1, verify=True)
    saved = save(manager, True)
    assert packed(manager, saved)
    for _ in range(2):
        manager.fetch([saved], trusted=True)
    assert saved.storage.checksum is None and not saved.storage.verified


def test_after_a_release_they_come_once_more(manager):
    saved = save(manager, True)
    packed(manager, saved)
    for _ in range(2):
        assert ((manager.read(saved, trusted=True) > 0) == (X > 0)).all()
        manager._mover.release(saved.storage)
        assert saved.storage.lossy
    manager.finish([saved], drop=True)
    assert saved.storage.state is State.DROPPED


def test_what_has_a_whole_copy_loses_nothing(manager):
    """Released when nothing wants its values: its copy has them."""
    saved = save(manager, False)
    manager._mover.begin_out(saved.storage)
    manager.settle()
    manager._mover.release(saved.storage)
    assert not saved.storage.lossy
    assert (saved.get() == np.maximum(X, 0)).all()


def test_how_long_signs_take_is_measured(manager):
    """There and back; until it is known a gigabyte per second is assumed."""
    assert manager.sign_seconds(10**9) == 2.0
    saved = save(manager, True)
    packed(manager, saved)
    manager.read(saved, trusted=True)
    signs = manager._mover._signs
    assert signs.nbytes == 2 * X.nbytes
    assert manager.sign_seconds(X.nbytes) == pytest.approx(signs.seconds)
