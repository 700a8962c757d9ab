"""Arrays among a function's attributes are used, and dropped, like what it retains."""

from __future__ import annotations

import chainer
import chainer.functions as F
import numpy as np

import chainer_ooc
from chainer_ooc.graph.attributes import SavedTuple
from chainer_ooc.swap.storage import Saved, State

ONES = np.ones((3, 4), np.float32)


class Keeper(chainer.FunctionNode):
    """Keeps nothing but attributes."""

    def forward(self, inputs):
        (x,) = inputs
        self.mask = x > 0
        self.pair = (x + 1, None)
        self.items = [x + 2, "text"]
        return (x * self.mask * self.pair[0] * self.items[0],)

    def backward(self, indexes, gradients):
        return (gradients[0] * self.mask * self.pair[0] * self.items[0],)


class Old(chainer.Function):
    """The same as an old-style function."""

    def forward(self, inputs):
        self.mask = inputs[0] > 0
        self.retain_inputs(())
        return (inputs[0] * self.mask,)

    def backward(self, inputs, gradients):
        return (gradients[0] * self.mask,)


def stand_ins(holder):
    """Return what is saved of the attributes of an object."""
    found = []
    for value in vars(holder).values():
        items = value if type(value) in (SavedTuple, list) else [value]
        found += [item for item in items if type(item) is Saved]
    return found


def test_they_are_expected_once_and_dropped_after_it():
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1, single_backward=True):
        func, old = Keeper(), Old()
        x = chainer.Variable(ONES)
        (h,) = func.apply((x,))
        y = F.sum(old(h))
        del h
        F.exp(ONES)
        saved = [*stand_ins(func), *stand_ins(old)]
        assert len(saved) == 4
        assert [one.storage.expected for one in saved] == [1, 1, 1, 1]
        assert {one.storage.state for one in saved} == {State.OUT}
        y.backward()
    np.testing.assert_array_equal(x.grad, ONES * 2 * 3)
    assert {one.storage.state for one in saved} == {State.DROPPED}
