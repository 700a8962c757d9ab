"""What the executor of a plan refers to."""

from __future__ import annotations

import unittest.mock
import weakref

from chainer_ooc.planning.executor import PlanExecutor
from chainer_ooc.planning.plan import Plan
from chainer_ooc.planning.states import State


class Held:
    """A storage to which other code refers."""

    state, used, nbytes, referenced_externally = State.RESIDENT, False, 1, True


def test_storages_that_wait_for_their_moves_die_with_their_graph():
    storages = {0: Held(), 1: Held()}
    alive = [weakref.ref(one) for one in storages.values()]
    plan = Plan("g", (0, 0), copy_out=((0, 0),), discard=((0, 1),))
    moves, evictor = unittest.mock.Mock(), unittest.mock.Mock()
    moves.inputs = lambda storage: ()
    executor = PlanExecutor(plan, storages.get)
    executor.step(0, moves, evictor, 100)
    assert not executor.is_idle(1)  # they wait
    storages.clear()
    assert [reference() for reference in alive] == [None, None]
    executor.step(1, moves, evictor, 100)
    assert executor.is_idle(1)
    moves.begin_out.assert_not_called()
