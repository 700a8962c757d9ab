"""Random programs: whatever is held, edited, dropped and run backward in any order, the bits are those of stock."""

from __future__ import annotations

import chainer
import chainer.functions as F
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.testing import assert_same_bits

UNARY = (
    F.exp,
    F.sin,
    F.tanh,
    F.relu,
    F.sigmoid,
    lambda x: F.reshape(x, x.shape[::-1]),
    F.transpose,
    lambda x: F.concat([x, x[:1]], 0)[1:],
    lambda x: F.dropout(x, 0.3),
    lambda x: F.broadcast_to(F.sum(x, axis=0, keepdims=True), x.shape),
    lambda x: F.forget(lambda h: F.tanh(F.sin(h)), x),
    lambda x: x[::-1],
    lambda x: F.max_pooling_2d(F.tile(x[None, None], (1, 1, 2, 1)), (2, 1))[0, 0],
)
BINARY = (
    lambda a, b: a * b if a.shape == b.shape else a * b.T,
    lambda a, b: F.maximum(a, b if a.shape == b.shape else b.T),
    lambda a, b: F.matmul(F.matmul(a, b, transb=a.shape == b.shape), a) * 0.01,
)


def inner_node(y, rng):
    """Return the node of a variable some functions before ``y`` that is no leaf, or ``None``."""
    node = y.node
    for _ in range(rng.randint(1, 4)):
        if node.creator_node is None:
            return None
        inputs = node.creator_node.inputs
        node = inputs[rng.randint(len(inputs))]
    return None if node.creator_node is None else node


def program(seed, limit_memory):
    """Interpret random steps. What is drawn does not depend on what is computed."""
    rng = np.random.RandomState(seed)
    np.random.seed(seed)
    leaves = [chainer.Variable(rng.uniform(-1, 1, (3, 4)).astype(np.float32)) for _ in range(2)]
    variables = [F.copy(leaves[0], -1), F.copy(leaves[1], -1)]
    arrays, seen = [], []

    def pick(things):
        return things[rng.randint(len(things))]

    for _ in range(60):
        step = rng.randint(13)
        if step < 5:
            variables.append(pick(UNARY)(pick(variables)))
        elif step < 7:
            a, b = pick(variables), pick(variables)
            variables.append(F.tanh(pick(BINARY)(a, b)))
        elif step == 7:
            del variables[: rng.randint(len(variables))]  # the graph alone has their arrays now
        elif step == 8:
            arrays.append(pick(variables).array)
        elif step == 9 and arrays:
            array = pick(arrays)
            if array.flags.writeable:
                array[rng.randint(len(array))] *= 0.5
        elif step == 10 and arrays:
            del arrays[rng.randint(len(arrays))]
        elif step == 11:
            # Arrays that the graph alone has, taken out of it: to be looked at, kept and edited.
            node = inner_node(pick(variables), rng)
            if node is not None and node.data is not None:
                seen.append(np.array(node.data))
                what = rng.randint(3)
                if what == 0:
                    arrays.append(node.data)
                elif what == 1 and node.data.flags.writeable:
                    node.data[0] += 0.5
        elif step == 12:
            y = pick(variables)
            if rng.rand() < 0.5:
                F.sum(y).backward()
            else:
                gxs = chainer.grad([F.sum(F.sin(y))], leaves, enable_double_backprop=False)
                seen += [None if gx is None else np.array(gx.array) for gx in gxs]
        limit_memory(rng)
    total = sum(F.sum(v) for v in variables)
    del variables
    arrays.clear()
    total.backward()
    return seen, [x.grad for x in leaves], total.array


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("seed", range(60))
def test_same_bits(seed):
    expected = program(seed, lambda rng: rng.rand())

    def random_release(rng):
        # What a shortage of memory does, at a moment of its own choosing.
        (manager,) = state.managers()
        if rng.rand() < 0.5:
            with manager._lock:
                manager.save_pending()
                manager._evictor.push_out(1 << 60)
                manager._evictor.release_clean(1 << 60)

    before = None
    for settings in ({"swap_all": True}, {"limit": 1 << 40}):
        with chainer_ooc.out_of_core_mode(min_bytes=1, **settings):
            before = before or chainer_ooc.stats().bytes_in
            actual = program(seed, random_release)
        assert_same_bits(actual, expected)
    assert chainer_ooc.stats().bytes_in > before
