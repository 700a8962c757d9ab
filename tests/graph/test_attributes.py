"""All that a function keeps is expected, used and dropped, wherever it keeps it."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import chainer
import chainer.functions as F
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc.graph import hooks
from chainer_ooc.graph.attributes import PackedTuple
from chainer_ooc.swap.storage import PackedArray, State

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
        items = value if type(value) in (PackedTuple, list) else [value]
        found += [item for item in items if type(item) is PackedArray]
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
        assert [one.storage.remaining_uses for one in saved] == [1, 1, 1, 1]
        assert {one.storage.state for one in saved} == {State.OUT}
        y.backward()
    np.testing.assert_array_equal(x.grad, ONES * 2 * 3)
    assert {one.storage.state for one in saved} == {State.DROPPED}


class Given(chainer.FunctionNode):
    """Keeps a list that its maker has."""

    def __init__(self, things):
        self.things = things

    def forward(self, inputs):
        self.things.append(inputs[0] + 1)
        return (inputs[0] * self.things[-1],)

    def backward(self, indexes, gradients):
        return (gradients[0] * self.things[-1],)


HOLDERS_OF_LISTS = {
    "nobody": lambda things: None,
    "a variable": lambda things: things,
    "two": lambda things: (things, things),
    "an attribute": lambda things: SimpleNamespace(things=things),
    "another function": Given,
    "an iterator": iter,
    "a partial": lambda things: functools.partial(len, things),
    "a closure": lambda things: lambda: things,
    "a suspended generator": lambda things: (thing for thing in things),
}


@pytest.mark.parametrize("name", HOLDERS_OF_LISTS)
def test_a_list_that_somebody_else_has_keeps_its_arrays(name):
    things = [ONES + 1]
    held = HOLDERS_OF_LISTS[name](things)
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1):
        func = Given(things)
        del things
        x = chainer.Variable(ONES)
        (h,) = func.apply((x,))
        y = F.sum(h)
        del h
        F.exp(ONES)
        kinds = {type(thing) for thing in vars(func)["things"]}
        assert kinds == ({PackedArray} if name == "nobody" else {np.ndarray})
        y.backward()
    np.testing.assert_array_equal(x.grad, ONES * 2)
    del held


class Two(chainer.FunctionNode):
    """Retains two outputs."""

    def forward(self, inputs):
        self.retain_outputs((0, 1))
        return np.exp(inputs[0]), np.sqrt(inputs[0])

    def backward(self, indexes, gradients):
        first, second = self.get_retained_outputs()
        gradient = 0
        if gradients[0] is not None:
            gradient += gradients[0] * first
        if gradients[1] is not None:
            gradient += gradients[1] * 0.5 / second
        return (gradient,)


def test_an_output_whose_variable_died_is_expected_and_dropped_too():
    with chainer_ooc.out_of_core_mode(limit="1TiB", min_bytes=1, single_backward=True):
        func = Two()
        x = chainer.Variable(ONES * 4)
        y, dead = func.apply((x,))
        del dead  # before memory gets short, and anybody looks at what the function keeps
        hooks.save_pending()
        y = F.sum(y)
        saved = vars(func)["_retained_output_data"]
        assert [one.storage.remaining_uses for one in saved] == [1, 1]
        y.backward()
    np.testing.assert_array_equal(x.grad, np.exp(ONES * 4))
    assert {one.storage.state for one in saved} == {State.DROPPED}


def test_functions_that_died_are_forgotten_once_there_are_many(monkeypatch):
    """While memory is plenty nobody looks at what functions keep: only who they are is remembered."""
    calls = []
    monkeypatch.setattr(hooks, "_forget_dead", lambda: calls.append(len(hooks._pending)))
    monkeypatch.setattr(hooks, "_pending", type(hooks._pending)())
    monkeypatch.setattr(hooks, "_most_pending", 16)
    with chainer_ooc.out_of_core_mode(limit="1TiB", plan=False):
        for _ in range(20):
            F.exp(ONES)
    assert calls == [17, 18, 19, 20]


def test_a_function_of_chainers_that_edits_what_it_keeps():
    """F.hinge turns a sign in backward, so that a second backward gives another gradient."""

    def gradients():
        x = chainer.Variable(np.array([[2, -1, 0.5], [0.1, 3, -2]], "f"))
        loss = F.hinge(F.identity(x), np.array([1, 0], "i"))
        found = []
        for _ in range(2):
            x.cleargrad()
            loss.backward()
            found.append(x.grad.tolist())
            F.exp(ONES)  # what nobody holds goes out now
        return found

    expected = gradients()
    assert expected[0] != expected[1]
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1):
        assert gradients() == expected
