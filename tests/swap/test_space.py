"""Space outside, and the books of what lives: no more is taken than must, and all comes back at once."""

from __future__ import annotations

import pytest

from chainer_ooc.planning import eviction
from chainer_ooc.swap.storage import State
from tests.swap.test_manager import MIB, machine, save, states

__all__ = ["machine"]  # the fixture


def test_no_more_is_copied_than_must_go(machine):
    save_and_hold = save(machine, 60)
    assert machine.manager.make_room(20 * MIB)
    gone = states(save_and_hold).count(State.OUT)
    assert machine.manager.counters.bytes_out == gone * MIB


@pytest.mark.parametrize("move", ["make_room", "move_all_out"])
def test_no_more_is_on_its_way_than_may_be(machine, monkeypatch, move):
    monkeypatch.setattr(eviction, "IN_FLIGHT", 4 * MIB)
    begin, most = machine.copy_out, []

    def copy_out(*arguments):
        most.append(machine.manager._transfers.nbytes[State.GOING_OUT])
        return begin(*arguments)

    monkeypatch.setattr(machine, "copy_out", copy_out)
    saved = save(machine, 60)
    machine.manager.make_room(40 * MIB) if move == "make_room" else machine.manager.move_all_out()
    assert states(saved).count(State.OUT) >= 37
    assert 3 * MIB <= max(most) <= 4 * MIB


def test_copies_behind_the_computation_go_on_when_the_first_have_ended(machine, monkeypatch):
    monkeypatch.setattr(eviction, "IN_FLIGHT", 2 * MIB)
    saved = save(machine, 60)
    for _ in range(10):
        machine.manager.make_room(0)
        for one in saved:
            if one.storage.transfer is not None:
                one.storage.transfer.wait()
    copied = states(saved).count(State.BOTH) + states(saved).count(State.OUT)
    assert copied >= 8, "what is above the low-water mark, of which two may be on their way"


def test_copies_behind_the_computation_are_not_waited_for(machine, monkeypatch):
    (saved,) = save(machine, nbytes=60 * MIB)
    machine.manager.make_room(0)
    transfer = saved.storage.transfer
    monkeypatch.setattr(type(transfer), "done", lambda _self: False)
    monkeypatch.setattr(type(transfer), "join", lambda _self: pytest.fail("waited"))
    machine.manager.make_room(0)
    assert saved.storage.state is State.GOING_OUT
    monkeypatch.undo()


@pytest.mark.parametrize("end", ["dropped", "dead"])
def test_what_ended_on_its_way_out_is_in_nobodys_way(machine, end):
    first, second = save(machine, 2, 28 * MIB)
    machine.manager.make_room(0)
    assert first.storage.state is State.GOING_OUT
    if end == "dropped":
        machine.manager.release_use([first], drop=True)
    else:
        del first
    other = save(machine, nbytes=28 * MIB)
    machine.manager.make_room(0)
    machine.manager.settle()
    assert states([second, *other]) == [State.BOTH, State.RESIDENT]


def test_dropping_gives_the_space_back_without_waiting_for_anything(machine):
    saved = save(machine, 3)
    machine.manager.move_all_out()
    assert machine.file.allocated > 0
    machine.manager.release_use(saved, drop=True)
    assert machine.file.allocated == 0


def test_saving_gives_back_the_space_of_what_died(machine):
    saved = save(machine, 3)
    machine.manager.move_all_out()
    assert machine.file.allocated > 0
    del saved
    other = save(machine)
    assert machine.file.allocated == 0
    assert states(other) == [State.RESIDENT]


def test_nothing_is_kept_of_what_died(machine):
    transfers = machine.manager._transfers
    saved = save(machine, 6)
    assert transfers.nbytes[State.RESIDENT] == 6 * MIB
    machine.manager.move_all_out()
    machine.manager._begin_in(saved[0].storage)
    saved[1].get()
    assert sum(transfers.nbytes.values()) == 6 * MIB
    del saved
    machine.manager.settle()
    assert set(transfers.nbytes.values()) == {0}
    assert not transfers._by_state.storages


def test_the_order_of_what_died_unused_is_forgotten(machine):
    """Predictions save and never run backward."""
    for _ in range(300):
        save(machine, nbytes=4096)
    saved, _ = machine.manager._order._saved_sequence.signature
    assert saved < 100
