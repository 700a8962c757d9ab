"""Random programs that are legal with single_backward: views, edits, arrays set anew, hooks, graphs of gradients."""

from __future__ import annotations

import gc

import chainer
import chainer.functions as F
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.testing import assert_same_bits

SHAPE = (6, 8)

UNARY = (
    *(F.exp, F.sin, F.tanh, F.relu, F.sigmoid, F.square, F.leaky_relu, F.elu, F.absolute),
    *(F.softmax, F.log_softmax, F.clipped_relu),
    lambda x: x * 0.75,
    lambda x: x + 0.25,
    lambda x: -x,
    lambda x: F.dropout(x, 0.3),
    lambda x: F.reshape(F.tanh(F.reshape(x, (2, -1))), x.shape),
    lambda x: F.transpose(F.sin(F.transpose(x))),
    lambda x: F.concat([x[3:], x[:3]], 0),
    lambda x: F.squeeze(F.square(F.expand_dims(x, 1)), 1),
    lambda x: F.broadcast_to(F.sum(x, axis=0, keepdims=True), x.shape),
    lambda x: F.tile(F.max_pooling_2d(x[None, None], 2)[0, 0], (2, 2)),
    lambda x: F.cast(F.tanh(F.cast(x, "d")), "f"),
    lambda x: F.tanh(F.local_response_normalization(x[None, :, None])[0, :, 0]),
    lambda x: F.batch_normalization(x, *(np.full(8, k, "f") for k in (1.5, 0.5))),
)
BINARY = (
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: a * b,
    F.maximum,
    lambda a, b: F.add(a, b, a),
    lambda a, b: F.matmul(F.matmul(a, b, transb=True), b) * 0.01,
    lambda a, b: F.where(a.array > b.array, a, b),
)


class Reads(chainer.FunctionHook):
    """Keeps a copy of what hooks get in backward."""

    name = "reads"

    def __init__(self, seen):
        self.seen = seen

    def backward_preprocess(self, function, in_data, out_grad):
        self.seen += [np.array(x) for x in in_data if x is not None]

    backward_postprocess = backward_preprocess


class Program:
    """Runs random steps. What is drawn does not depend on what is computed.

    Args:
        seed: Decides the steps.
        between: Called between two steps with a random state of its own.
    """

    def __init__(self, seed, between):
        self.random = np.random.RandomState(seed)
        self.between = between
        self.seen = []
        self.arrays = []
        self.leaves = [
            chainer.Variable(self.random.uniform(-1, 1, SHAPE).astype("f")) for _ in range(2)
        ]
        self.variables = [F.tanh(self.leaves[0]), self.leaves[1] * 1]

    def pick(self, things):
        return things[self.random.randint(len(things))]

    def add(self, y):
        self.variables.append(y)

    def compute(self):
        self.add(self.pick(UNARY)(self.pick(self.variables)))

    def combine(self):
        self.add(F.tanh(self.pick(BINARY)(self.pick(self.variables), self.pick(self.variables))))

    def forget(self):
        del self.variables[: self.random.randint(len(self.variables))]

    def edit(self):
        array = self.pick(self.variables).array
        row, how = self.random.randint(len(array)), self.random.randint(3)
        if array.flags.writeable:
            if how == 0:
                array[row] *= 0.5
            elif how == 1:
                array[row:].T[::2] += 0.125
            else:
                array[...] = -array

    def set_anew(self):
        v, how = self.pick(self.variables), self.random.randint(6)
        other = self.pick(self.variables)
        if how == 0:
            v.array = v.array * 0.5
        elif how == 1:
            v.data = v.array[::-1]
        elif how == 2:
            v.array = other.array
        elif how == 3:
            v.array = np.asfortranarray(v.array)
        elif how == 4:
            v.array = np.concatenate([v.array, other.array])[3:9]
        else:
            v.array = v.array.copy()

    def hold(self):
        self.arrays.append(self.pick(self.variables).array[1:])

    def edit_held(self):
        if self.arrays:
            array = self.pick(self.arrays)
            if array.flags.writeable:
                array[0] -= 0.25

    def let_go(self):
        self.arrays.clear()

    def look_inside(self):
        """Get, and perhaps edit, what the graph alone has."""
        node = self.pick(self.variables).node
        how = self.random.randint(4)
        for number in self.random.randint(0, 8, 3):
            if node.creator_node is None:
                return
            inputs = node.creator_node.inputs
            node = inputs[number % len(inputs)]
        data = None if node.creator_node is None else node.data
        if data is not None:
            self.seen.append(np.array(data))
            if how == 0 and data.flags.writeable:
                data[...] *= 0.75
            elif how == 1:
                self.arrays.append(data)

    def edit_attribute(self):
        function = self.pick(self.variables).creator_node
        for name in ("mask", "indexes", "mean", "inv_std"):
            value = getattr(function, name, None)
            if type(value) is np.ndarray and value.dtype == np.float32:
                value *= 0.5

    def gradient(self):
        """Take a gradient that has a graph of its own: backward goes through it later."""
        y, hooked = self.pick(self.variables), self.random.rand() < 0.2
        targets = self.leaves if self.random.rand() < 0.7 else [self.pick(self.variables)]
        y = F.sum(F.sin(y))
        if hooked:
            with Reads(self.seen):
                found = chainer.grad([y], targets, enable_double_backprop=True)
        else:
            found = chainer.grad([y], targets, enable_double_backprop=True)
        for g in found:
            if g is not None:
                self.seen.append(np.array(g.array))
                self.add(F.tanh(g))

    def backward_with_a_graph(self):
        y = F.sum(self.pick(self.variables))
        y.backward(enable_double_backprop=True, retain_grad=self.random.rand() < 0.3)
        for x in self.leaves:
            g, x.grad_var = x.grad_var, None
            if g is not None:
                self.add(F.sigmoid(g))

    def hook_one(self):
        function = self.pick(self.variables).creator_node
        if function is not None and "reads" not in function.local_function_hooks:
            function.add_hook(Reads(self.seen))

    STEPS = (
        *(compute,) * 7,
        *(combine,) * 4,
        *(forget, edit, edit, set_anew, set_anew, hold, edit_held, let_go),
        *(look_inside, edit_attribute, gradient, backward_with_a_graph, hook_one),
    )

    def run(self):
        """Return all that can be seen of it, with what it raises."""
        try:
            for _ in range(24):
                self.pick(self.STEPS)(self)
                self.between()
            total = sum(F.sum(v) for v in self.variables)
            hooked = self.random.rand() < 0.2
            self.variables.clear()
            self.arrays.clear()
            self.between()
            if hooked:
                with Reads(self.seen):
                    total.backward()
            else:
                total.backward()
            self.seen += [total.array, *(x.grad for x in self.leaves)]
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            self.seen.append(f"{type(error).__name__}: {str(error)[:60]}")
        return self.seen


def outcome(seed, between=lambda: None):
    np.random.seed(seed)
    with np.errstate(all="ignore"):
        return Program(seed, between).run()


def release_at_random(seed):
    """Return what does, at random moments, what a shortage of memory does; at first memory has been plenty."""
    random = np.random.RandomState(seed + 1)
    (manager,) = state.managers()
    manager.has_been_short = random.rand() < 0.5

    def release():
        if random.rand() < 0.3:
            manager.has_been_short = True
            with manager._lock:
                manager.save_pending()
                manager._evictor.push_out(1 << 60)
                manager._evictor.release_clean(1 << 60)

    return release


SETTINGS = {
    "all out": {"swap_all": True},
    "single": {"swap_all": True, "single_backward": True},
    "single, recompute": {"swap_all": True, "single_backward": True, "discard_all": True},
    "recompute": {"swap_all": True, "discard_all": True, "min_bytes": 100},
    "at random": {"limit": 1 << 40, "single_backward": True, "discard_all": True},
    "at random, all kept": {"limit": 1 << 40, "discard_all": True},
    "short": {"limit": "1MiB", "single_backward": True, "discard_all": True},
}


def compare(seed, names):
    expected = outcome(seed)
    for name in names:
        gc.collect()
        with chainer_ooc.out_of_core_mode(**{"min_bytes": 1, **SETTINGS[name]}):
            between = release_at_random(seed) if "random" in name else lambda: None
            actual = outcome(seed, between)
        assert_same_bits(actual, expected, name)


@pytest.mark.parametrize("seed", range(300))
def test_same_bits(seed):
    names = list(SETTINGS)
    compare(seed, [names[seed % len(names)], names[(seed + 4) % len(names)]])


@pytest.mark.exhaustive
@pytest.mark.parametrize("first", range(0, 300, 30))
def test_same_bits_with_all_settings(first):
    for seed in range(first, first + 30):
        compare(seed, SETTINGS)


def test_they_move_and_make_again():
    """The programs above are worth something: most of them end, and all that can happen happens in them."""
    before = chainer_ooc.stats()
    ended = 0
    for seed in range(40):
        with chainer_ooc.out_of_core_mode(min_bytes=1, **SETTINGS["single, recompute"]):
            ended += not isinstance(outcome(seed)[-1], str)
    after = chainer_ooc.stats()
    assert ended > 25
    assert after.bytes_in > before.bytes_in
    assert after.storages_remade > before.storages_remade
