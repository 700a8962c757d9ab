"""SwapManager: who goes when, what a copy is worth, and what happens when there is no room."""

from __future__ import annotations

import errno
import gc

import numpy as np
import pytest

from chainer_ooc.errors import GraphReleasedError, OutOfCoreError, SwapSpaceError
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.ram import RamDevice
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.storage import State

MIB = 1 << 20


class Machine(RamDevice):
    """RAM in which only what the test says counts against the limit."""

    other = 0

    def used_bytes(self):
        return self.other + sum(s.nbytes for s in self.manager.storages() if s.owner is not None)


@pytest.fixture
def machine(tmp_path):
    settings = Settings(limit=64 * MIB, min_bytes=1)
    device = Machine(str(tmp_path))
    device.manager = SwapManager(device, lambda: settings)
    yield device
    device.close()


def save(machine, number=1, nbytes=MIB):
    """Save arrays that nobody holds, the n-th filled with n, each expected by one function."""
    saved = [machine.manager.save(np.full(nbytes, n, np.uint8), f"f{n}") for n in range(number)]
    for one in saved:
        machine.manager.add_use([one])
    return saved


def states(saved):
    return [one.storage.state for one in saved]


def test_nothing_moves_while_memory_is_plenty(machine):
    saved = save(machine, 40)
    assert machine.manager.make_room(8 * MIB)
    assert machine.manager.counters.bytes_out == 0
    assert set(states(saved)) == {State.RESIDENT}


def test_past_the_low_mark_the_oldest_are_copied_and_stay(machine):
    saved = save(machine, 56)
    assert machine.manager.make_room(0)
    machine.manager.settle()
    copied = [s.storage.state is State.BOTH for s in saved]
    assert copied == sorted(copied, reverse=True)
    assert 4 <= sum(copied) <= 8
    assert all(s.storage.state.in_memory for s in saved)


def test_when_there_is_no_room_the_oldest_go(machine):
    saved = save(machine, 60)
    assert machine.manager.make_room(20 * MIB)
    out = [s.storage.state is State.OUT for s in saved]
    assert out == sorted(out, reverse=True)
    assert 17 <= sum(out) <= 19
    assert machine.used_bytes() + 20 * MIB <= machine.manager.budget.high


def test_used_and_clean_before_unused_and_clean(machine):
    saved = save(machine, 50)
    machine.manager.move_all_out()
    arrays = machine.manager.fetch(saved, read_only=True)
    del arrays
    machine.manager.release_use(saved[40:], drop=False)
    machine.manager.make_room(20 * MIB)
    assert set(states(saved[:40])) == {State.BOTH}
    assert 7 <= states(saved[40:]).count(State.OUT) <= 8


def test_what_is_held_is_not_copied_in_vain_and_goes_when_it_is_let_go(machine):
    (saved,) = save(machine)
    array = saved.get()
    machine.manager.move_all_out()
    assert saved.storage.state is State.RESIDENT
    assert machine.manager.counters.bytes_out == 0
    view = array[5:]
    del array
    machine.manager.move_all_out()
    assert saved.storage.state is State.RESIDENT
    del view
    machine.manager.move_all_out()
    assert saved.storage.state is State.OUT


def test_an_edit_after_release_is_kept(machine):
    (saved,) = save(machine)
    machine.manager.move_all_out()
    saved.get()[:] = 7
    machine.manager.move_all_out()
    assert saved.storage.state is State.OUT
    assert set(saved.get()) == {7}


def test_an_edit_while_it_goes_out_is_kept(machine):
    (saved,) = save(machine)
    manager = machine.manager
    manager._transfers.begin_out(saved.storage)
    saved.get()[:] = 7
    manager._transfers.end_out(saved.storage)
    assert saved.storage.state is State.RESIDENT
    manager.move_all_out()
    assert set(saved.get()) == {7}


def test_backward_leaves_the_copy_valid(machine):
    saved = save(machine, 4)
    manager = machine.manager
    manager.move_all_out()
    written = manager.counters.bytes_out
    for _ in range(3):
        arrays = manager.fetch(saved, read_only=True)
        assert [a[0] for a in arrays] == [0, 1, 2, 3]
        del arrays
        manager.release_use(saved, drop=False)
        manager.move_all_out()
        manager.make_room(64 * MIB)
    assert manager.counters.bytes_out == written
    assert set(states(saved)) == {State.OUT}


def test_what_backward_gives_away_is_copied_again(machine):
    (saved,) = save(machine)
    manager = machine.manager
    manager.move_all_out()
    (gradient,) = manager.fetch([saved], read_only=True)
    manager.release_use([saved], drop=False)
    gradient += 1
    del gradient
    manager.move_all_out()
    manager._evictor.release_clean(1 << 60)
    assert set(saved.get()) == {1}


def test_after_its_last_use_it_is_dropped_with_no_copy(machine):
    saved = save(machine, 2)
    manager = machine.manager
    manager.add_use([saved[0]])  # a second function uses the first
    manager.release_use(saved, drop=True)
    assert states(saved) == [State.RESIDENT, State.DROPPED]
    manager.release_use(saved[:1], drop=True)
    assert manager.counters.bytes_out == 0
    with pytest.raises(GraphReleasedError, match=r"f0 saved was dropped.*single_backward=False"):
        saved[0].get()


def test_dropping_gives_the_space_back(machine):
    saved = save(machine, 3)
    manager = machine.manager
    manager.move_all_out()
    manager.fetch(saved[:1], read_only=True)
    manager._begin_in(saved[1].storage)
    manager.release_use(saved, drop=True)
    manager.settle()
    assert machine.file.allocated == 0


@pytest.mark.parametrize("moment", ["resident", "going out", "both", "out", "coming in"])
def test_dying_gives_the_space_back(machine, moment):
    saved = save(machine, 5, 3 * MIB)
    manager = machine.manager
    if moment == "going out":
        for one in saved:
            manager._transfers.begin_out(one.storage)
    elif moment != "resident":
        manager.move_all_out()
        assert machine.file.allocated > 0
    if moment == "coming in":
        for one in saved:
            manager._begin_in(one.storage)
    elif moment == "both":
        for one in saved:
            one.get()
    one = None
    del saved, one
    gc.collect()
    manager.settle()
    assert manager.storages() == []
    assert machine.file.allocated == 0


def test_fetching_ahead_goes_backward_and_leaves_room(machine):
    saved = save(machine, 60)
    manager = machine.manager
    manager.move_all_out()
    manager.budget.note_growth(30 * MIB)
    manager.fetch(saved[50:51], read_only=True)
    manager.prefetch(saved[50:51])
    manager.settle()
    come = [n for n, one in enumerate(saved) if one.storage.state.in_memory]
    assert come == list(range(come[0], 51))
    assert 30 <= len(come) <= 33
    assert machine.used_bytes() + 30 * MIB <= manager.budget.high


def test_a_full_disk_loses_nothing(machine, monkeypatch):
    import os

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    saved = save(machine, 60)
    with pytest.raises(SwapSpaceError, match="no data was lost"):
        machine.manager.make_room(20 * MIB)
    assert [one.get()[0] for one in saved] == list(range(60))


def test_a_failed_write_is_tried_again_then_raised_here(machine, monkeypatch):
    real = machine.file.write
    failures = []

    def flaky(offset, buffer):
        if len(failures) < allowed:
            failures.append(offset)
            raise OSError(errno.EIO, "Input/output error")
        real(offset, buffer)

    monkeypatch.setattr(machine.file, "write", flaky)
    allowed = 1
    (saved,) = save(machine)
    machine.manager.move_all_out()
    assert saved.storage.state is State.OUT
    (other,) = save(machine)
    failures.clear()
    allowed = 2
    with pytest.raises(SwapSpaceError, match=r"could not be written.*stays in memory"):
        machine.manager.move_all_out()
    assert other.storage.state is State.RESIDENT
    assert set(other.get()) == {0}
    assert machine.file.allocated <= MIB  # the first one's block, and none of the second's


def test_a_failed_read_is_tried_again_then_raised_here(machine, monkeypatch):
    (saved,) = save(machine)
    machine.manager.move_all_out()
    real = machine.file.read
    failures = []

    def flaky(offset, buffer):
        if len(failures) < allowed:
            failures.append(offset)
            raise OSError(errno.EIO, "Input/output error")
        real(offset, buffer)

    monkeypatch.setattr(machine.file, "read", flaky)
    allowed = 2
    with pytest.raises(OSError, match="Input/output error"):
        saved.get()
    assert saved.storage.state is State.OUT
    failures.clear()
    allowed = 1
    assert set(saved.get()) == {0}


def test_illegal_transitions_raise(machine):
    (saved,) = save(machine)
    with pytest.raises(OutOfCoreError, match="cannot become 'coming in'"):
        saved.storage.move_to(State.COMING_IN)


def test_no_leak_over_many_rounds(machine):
    for _ in range(300):
        saved = save(machine, 4, 8192)
        machine.manager.move_all_out()
        machine.manager.fetch(saved, read_only=True)
        machine.manager.release_use(saved, drop=False)
        del saved
    machine.manager.settle()
    assert machine.manager.storages() == []
    assert machine.file.allocated == 0
    assert not machine.manager._transfers._by_owner
    assert len(machine.manager._transfers.leaving) <= 4


def test_between_graphs_free_memory_is_kept_up_to_the_low_mark_only(machine):
    """What others allocate then, as for a snapshot, is not announced."""
    manager, held = machine.manager, []
    machine.set_cached_limit = held.append
    saved = save(machine, 56)
    manager.make_room(0)
    assert held[-1] == manager.budget.high
    del saved[8:]
    gc.collect()
    manager.make_room(0)
    assert held[-1] == manager.budget.high  # a graph lives
    saved.clear()
    gc.collect()
    assert held[-1] == manager.budget.low  # at once: nothing may be announced before the snapshot
    manager.make_room(0)
    assert held[-1] == manager.budget.low
    saved = save(machine, 56)
    manager.make_room(0)
    assert held[-1] == manager.budget.high
    manager.keep_no_free_memory()  # as when the mode ends
    saved.clear()
    gc.collect()
    assert held[-1] == 0


def test_what_is_fetched_together_comes_in_once_even_where_it_does_not_fit(machine):
    saved = save(machine, 3, 30 * MIB)
    machine.manager.move_all_out()
    arrays = machine.manager.fetch(saved, read_only=True)
    assert [array[0] for array in arrays] == [0, 1, 2]
    assert machine.manager.counters.storages_in == 3
