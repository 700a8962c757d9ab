"""Every function of Chainer: without data it gives, keeps and differentiates to what it does with data."""

from __future__ import annotations

import chainer
import chainer.functions as F
import numpy as np
import pytest

from chainer_ooc.estimating.ledger import Ledger
from chainer_ooc.estimating.shape_array import ShapeArray, layout_axes, new
from chainer_ooc.estimating.without_data import without_data
from chainer_ooc.graph.attributes import _holders
from tests.equality.function_cases import CASES

#: What these return, or how they go on, depends on values.
DEPENDS_ON_DATA = {"r2_score"}
#: It reaches for the memory behind the array.
NOT_TAKEN = {"as_strided"}
#: SciPy's Python code makes plain arrays of what it is given.
COMPUTED = {"polygamma"}

CHOSEN = [case for case in CASES if case.name not in DEPENDS_ON_DATA | NOT_TAKEN]


def describe(array):
    """Return what must be equal: shape, dtype and, along axes that have a length, strides."""
    strides = [s for s, n in zip(array.strides, array.shape, strict=True) if n > 1]
    return array.shape, array.dtype.str, strides


def kept(function):
    """Return descriptions of the arrays that a function keeps for backward, leaves excepted."""
    arrays = []
    for index in function._input_indexes_to_retain or ():
        node = function.inputs[index]
        if node is not None and node._creator_node is not None and node.data is not None:
            arrays.append(describe(node.data))
    arrays += [describe(a) for a in function._retained_output_data or () if a is not None]
    for holder in _holders(function):
        for name, value in holder.__dict__.items():
            items = value if type(value) in (tuple, list) else (value,)
            arrays += [(name, *describe(a)) for a in items if isinstance(a, np.ndarray)]
    return sorted(map(str, arrays))


def graph(outputs):
    """Return what each function of a graph keeps."""
    seen = {}
    todo = [y.creator_node for y in outputs if getattr(y, "creator_node", None) is not None]
    while todo:
        function = todo.pop()
        if id(function) not in seen:
            seen[id(function)] = function
            todo += [x._creator_node for x in function.inputs if x._creator_node is not None]
    return sorted((function.label, kept(function)) for function in seen.values())


def run(case, make, ones):
    np.random.seed(1)
    leaves, given = [], []
    for x in case.inputs():
        if isinstance(x, np.ndarray) and x.dtype.kind == "f":
            leaves.append(chainer.Variable(make(x)))
            x = F.identity(leaves[-1])
        given.append(x)
    outputs = case.call(*given)
    outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    arrays = [getattr(y, "array", y) for y in outputs if hasattr(y, "shape")]
    results = {"outputs": [describe(a) for a in arrays], "graph": graph(outputs)}
    ys = [F.square(y) for y in outputs if isinstance(y, chainer.Variable) and y.dtype.kind == "f"]
    ys = [y for y in ys if y.creator_node is not None]
    if ys:
        for y in ys:
            y.grad = ones(y)
        chainer.backward(ys)
        results["gradients"] = [None if x.grad is None else describe(x.grad) for x in leaves]
    return results, arrays


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_without_data_as_with(case):
    expected, _ = run(case, np.asarray, lambda y: np.ones(y.shape, y.dtype))
    ledger = Ledger()
    with without_data(ledger):
        results, arrays = run(
            case,
            lambda x: new(x.shape, x.dtype, ledger, layout_axes(x)),
            lambda y: new(y.shape, y.dtype, ledger),
        )
    assert results == expected
    # Of what has elements nothing is inferred.
    if case.name not in COMPUTED:
        assert all(type(a) is ShapeArray for a in arrays if a.dtype.kind == "f")
