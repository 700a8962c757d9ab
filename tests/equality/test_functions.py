"""Functions: what they give, and their first and second derivatives, from copies as from originals."""

from __future__ import annotations

import chainer
import chainer.functions as F
import numpy as np
import pytest

from chainer_ooc.swap.storage import PackedArray
from chainer_ooc.testing import assert_same_bits, force_copies
from tests.equality.function_cases import CASES


def run(case, force=False):
    """Run a case forward, backward and, where stock Chainer can, backward twice. Returns all results."""
    np.random.seed(1)
    given = case.inputs()
    leaves = [chainer.Variable(x) for x in given if _is_float(x)]
    # Not the leaves: what force_copies() does to those is done here on stock Chainer too, since with one more
    # function gradients may be summed in another order.
    rest = iter(leaves)
    outputs = case.call(*[_no_leaf(next(rest)) if _is_float(x) else x for x in given])
    outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    results = {"outputs": [_array(y) for y in outputs]}
    # Squared, so that what a function leaves to the next is saved as well, be it a view.
    ys = [F.square(y) for y in outputs if _is_differentiable(y)]
    if force:
        assert not unsaved(ys, case.kept)
    if not ys:
        return results
    del outputs
    gys = [_like(y, seed) for seed, y in enumerate(ys)]
    for y, gy in zip(ys, gys, strict=True):
        y.grad = gy.copy()
    chainer.backward(ys)
    results["gradients"] = [x.grad for x in leaves]
    if case.double:
        gys = [chainer.Variable(gy) for gy in gys]
        gxs = chainer.grad(ys, leaves, list(map(_no_leaf, gys)), enable_double_backprop=True)
        results["gradients by grad"] = [_array(gx) for gx in gxs]
        again = [gx for gx in gxs if gx is not None and gx.creator_node is not None]
        del gxs
        ggxs = [chainer.Variable(_like(gx, 100 + k)) for k, gx in enumerate(again)]
        if again:
            second = chainer.grad(again, leaves + gys, list(map(_no_leaf, ggxs)))
            results["second derivatives"] = [_array(gg) for gg in second]
    return results


def unsaved(ys, kept=()):
    """Return where in a graph there are arrays that are not saved, leaves excepted."""
    found, seen, todo = [], set(), [y.creator_node for y in ys if y.creator_node is not None]
    while todo:
        func = todo.pop()
        if id(func) in seen:
            continue
        seen.add(id(func))
        for name, value in {
            **func.__dict__,
            **getattr(func.__dict__.get("_function"), "__dict__", {}),
        }.items():
            items = value if isinstance(value, list | tuple) else [value]
            if any(type(item) is np.ndarray and item.size for item in items) and name not in kept:
                found.append(f"{func.label}.{name}")
        for node in func.inputs:
            if node.creator_node is not None:
                todo.append(node.creator_node)
                data = node.__dict__.get("_data")
                if data is not None and type(data) is not PackedArray and data.size:
                    found.append(f"an input of {func.label}")
    return found


def _no_leaf(x):
    return chainer.functions.identity(x)


def _array(x):
    return np.array(x.array) if isinstance(x, chainer.Variable) else x


def _is_float(x):
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def _is_differentiable(y):
    return isinstance(y, chainer.Variable) and y.dtype.kind == "f" and y.creator_node is not None


def _like(y, seed):
    return np.random.RandomState(seed).uniform(-1, 1, y.shape).astype(y.dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bits(case, moved_bytes):
    expected = run(case)
    with force_copies() as moved:
        actual = run(case, force=True)
    moved_bytes(moved)
    assert_same_bits(actual, expected)
    if case.still:
        assert not moved.bytes_in, "take it off the list"
    else:
        assert moved.bytes_in


def test_the_table_covers_chainer_functions():
    names = {case.name.split()[0] for case in CASES}
    functions = {name for name in vars(F) if name in names}
    assert len(functions) >= 200, sorted(
        name for name, f in vars(F).items() if callable(f) and name not in names
    )
