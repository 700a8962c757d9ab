"""Any reader, at any time, gets an array."""

from __future__ import annotations

import copy
import pickle

import chainer
import chainer.functions as F
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc.swap.storage import PackedArray, State

ONES = np.ones((3, 4), np.float32)


def raw(holder, name):
    return holder.__dict__[name]


def is_out(saved):
    return type(saved) is PackedArray and saved.storage.state is State.OUT


class Keeper(chainer.FunctionNode):
    """Keeps arrays in all the ways in which functions do."""

    mask = None
    factor = np.full(3, 2.0, np.float32)
    here = "a class's own"

    def __init__(self, shared=None):
        self.shared = shared

    def forward(self, inputs):
        (x,) = inputs
        self.retain_inputs((0,))
        self.retain_outputs((0,))
        self.mask = x > 0
        self.pair = (x + 1, "text", None, x + 2)
        self.items = [x + 3, None, x + 4]
        if self.shared is not None:
            self.shared.append(x + 5)
        self.nothing = ()
        return (x * 2,)

    def backward(self, indexes, gradients):
        (x,) = self.get_retained_inputs()
        (y,) = self.get_retained_outputs()
        return (gradients[0] * x * y * self.pair[0] * self.items[2] * self.mask,)


def test_attributes_are_out_and_every_reader_gets_arrays(everything_out):
    func = Keeper()
    (y,) = func.apply((F.exp(ONES),))
    y = F.sum(y)
    F.exp(ONES)  # now nobody holds what the functions above gave
    x = np.exp(ONES)
    assert is_out(raw(func, "mask"))
    assert is_out(raw(func, "pair")[0]) and is_out(raw(func, "pair")[3])
    assert is_out(raw(func, "items")[0]) and is_out(raw(func, "items")[2])
    assert is_out(raw(func, "_retained_output_data")[0])
    assert is_out(raw(func.inputs[0], "_data"))
    np.testing.assert_array_equal(func.mask, x > 0)
    assert type(func.pair) is tuple and func.pair[1:3] == ("text", None)
    np.testing.assert_array_equal(func.pair[3], x + 2)
    assert type(func.items) is list and func.items is func.items and func.items[1] is None
    np.testing.assert_array_equal(func.items[0], x + 3)
    np.testing.assert_array_equal(func.inputs[0].data, x)
    np.testing.assert_array_equal(func.output_data[0], x * 2)
    assert func.pair[0] is not None and vars(func).keys() >= {"mask", "pair", "items"}


def test_a_list_that_somebody_else_holds_stays(everything_out):
    shared = []
    func = Keeper(shared)
    (y,) = func.apply((F.exp(ONES),))
    del y
    assert func.shared is shared
    assert type(shared[0]) is np.ndarray


def test_class_attributes_and_missing_ones_are_as_before(everything_out):
    func = Keeper()
    func.apply((F.exp(ONES),))
    assert Keeper.mask is None
    assert Keeper.factor is func.factor
    assert Keeper().mask is None
    with pytest.raises(AttributeError, match="'Keeper' object has no attribute 'pair'"):
        Keeper().pair  # noqa: B018
    with pytest.raises(AttributeError, match="pair"):
        Keeper.pair  # noqa: B018
    assert not hasattr(Keeper(), "items")
    del func.mask
    assert func.mask is None
    with pytest.raises(AttributeError, match="mask"):
        del func.mask
    func.mask = "mine"
    assert func.mask == "mine"


def test_a_subclass_with_a_default_of_its_own(everything_out):
    class Child(Keeper):
        mask = "the child's"

    for cls in (Keeper, Child, Keeper):
        func = cls()
        func.apply((F.exp(ONES),))
        assert func.mask.dtype == bool
    assert Child().mask == "the child's"


def test_properties_and_slots_are_left_alone(everything_out):
    class Guarded(Keeper):
        @property
        def items(self):
            return self.__dict__["items"]

        @items.setter
        def items(self, value):
            self.__dict__["items"] = value

    func = Guarded()
    func.apply((F.exp(ONES),))
    assert all(item is None or type(item) is np.ndarray for item in func.items)
    assert type(vars(Guarded)["items"]) is property


def test_saved_attributes_reaches_nested_objects(everything_out):
    class Statistics:
        def __init__(self, x):
            self.mean = x + 1
            self.rest = (x + 2,)

    class Nested(Keeper):
        def forward(self, inputs):
            self.statistics = Statistics(inputs[0])
            return super().forward(inputs)

    for opted in (False, True):
        if opted:
            chainer_ooc.saved_attributes(Nested, ["statistics"])
        func = Nested()
        func.apply((F.exp(ONES),))
        statistics = func.statistics
        assert is_out(raw(statistics, "mean")) is opted
        np.testing.assert_array_equal(statistics.mean, np.exp(ONES) + 1)
        np.testing.assert_array_equal(statistics.rest[0], np.exp(ONES) + 2)


def test_saved_attributes_of_what_is_no_function():
    with pytest.raises(TypeError, match="is not a subclass of"):
        chainer_ooc.saved_attributes(int, ["x"])
    with pytest.raises(TypeError, match="names='mask' is not a list"):
        chainer_ooc.saved_attributes(Keeper, "mask")
    with pytest.raises(TypeError, match="not a list of attribute names"):
        chainer_ooc.saved_attributes(Keeper, [1])


def test_old_style_functions_behind_their_adapter(everything_out):
    class Old(chainer.Function):
        mask = None

        def forward(self, inputs):
            self.mask = inputs[0] > 1
            self.retain_outputs((0,))
            return (inputs[0] * self.mask,)

        def backward(self, inputs, gradients):
            return (gradients[0] * self.mask * self.output_data[0] * inputs[0],)

    old = Old()
    h = F.exp(ONES)
    y = F.sum(old(h))
    del h
    assert is_out(raw(old, "mask"))
    assert old.mask.all()
    np.testing.assert_array_equal(old.output_data[0], np.exp(ONES))
    assert Old.mask is None
    y.backward()


def test_copies_of_functions_have_arrays_of_their_own(everything_out):
    func = Keeper()
    func.apply((F.exp(ONES),))
    for other in (copy.copy(func), copy.deepcopy(func)):
        np.testing.assert_array_equal(other.mask, func.mask)
        np.testing.assert_array_equal(other.pair[0], func.pair[0])
        np.testing.assert_array_equal(other.items[2], func.items[2])
    other = copy.deepcopy(func)
    other.mask[:] = False
    assert func.mask.all()
    mask = pickle.loads(pickle.dumps(raw(func, "mask")))
    assert type(mask) is np.ndarray and mask.all()


def test_a_deep_copy_of_a_function_runs_backward(everything_out):
    func = Keeper()
    func.apply((F.exp(ONES),))
    other = copy.deepcopy(func)
    gy = chainer.Variable(ONES)
    (expected,) = func.backward((0,), (gy,))
    gradients = {other.inputs[0]: []}
    chainer._backprop_utils.backprop_step(other, (0,), (gy,), gradients, False)
    np.testing.assert_array_equal(gradients[other.inputs[0]][0].array, expected.array)


def test_a_replaced_array_is_the_one_that_is_read(everything_out):
    x = chainer.Variable(ONES)
    h = F.copy(x, -1) * 1
    y = F.sin(h)
    h.array = ONES * 3  # that of the node is replaced as well
    del h
    F.sum(y).backward()
    np.testing.assert_array_equal(x.grad, np.cos(ONES * 3))
