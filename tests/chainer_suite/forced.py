"""Pytest plugin under which each of Chainer's own tests runs inside ``chainer_ooc.testing.force_copies()``.

It counts the tests that run backward, those of them in which some function keeps an array that is no leaf (others,
such as tests of ``F.reshape``, have nothing that could move), and those in which bytes came back, and prints them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.graph.attributes import PackedTuple
from chainer_ooc.swap.storage import PackedArray
from chainer_ooc.testing import Moved, force_copies

# Tests of how many functions a graph has, and of which object an attribute is. They run in out-of-core mode itself,
# with all moved out that nobody holds: force_copies() adds functions to graphs, and reads copies of what a test holds.
PLAIN = (
    "exporters_tests/",
    "test_computational_graph.py",
    "test_function.py::TestFunction_",
    "test_function.py::TestFunctionRetaining",
    "test_function_node.py::TestFunctionNode_",
    "test_function_node.py::TestFunctionNodeInvalidBackwardChecks",
    "test_timer.py::TestTimerHookToLink",
    "test_variable.py::TestVariableDataAssign",
    "::test_backward_no_grad_required",
    "test_rrelu.py::TestRReLUR_",
    "test_dropout.py::TestDropoutMask",
    "test_precision.py::TestMixedPrecision",
)

counts: Counter[str] = Counter()
_in_test: Counter[str] = Counter()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Run one test inside."""
    _watch_backward()
    _in_test.clear()
    with _mode(item.nodeid) as moved:
        try:
            return (yield)
        finally:
            counts["tests"] += 1
            counts["ran backward"] += _in_test["steps"] > 0
            counts["kept arrays"] += _in_test["kept"] > 0
            if _in_test["kept"]:
                counts["moved bytes"] += moved.bytes_in > 0
            counts["bytes"] += moved.bytes_in


@contextlib.contextmanager
def _mode(test: str) -> Iterator[Any]:
    if not any(part in test for part in PLAIN):
        with force_copies() as moved:
            yield moved
        return
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1):
        (manager,) = state.managers()
        yield Moved(manager.counters)


def _watch_backward() -> None:
    """Have each step of backward counted."""
    from chainer import _backprop_utils

    from chainer_ooc.graph import hooks

    hooks.install()
    step = _backprop_utils.backprop_step
    if getattr(step, "counted", False):
        return

    def counting(func: Any, *arguments: Any) -> None:
        _in_test["steps"] += 1
        _in_test["kept"] += _keeps(func)
        step(func, *arguments)

    counting.counted = True  # type: ignore[attr-defined]
    _backprop_utils.backprop_step = counting


def _keeps(func: Any) -> bool:
    """Tell whether a function keeps arrays by what Chainer, not chainer_ooc, says of it."""
    inputs = [func.inputs[index] for index in func._input_indexes_to_retain or ()]
    if func._output_indexes_to_retain or any(x.creator_node is not None for x in inputs):
        return True
    attributes = {**vars(func), **vars(getattr(func, "_function", func))}
    return any(
        isinstance(value, np.ndarray | PackedArray | PackedTuple) for value in attributes.values()
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counts."""
    terminalreporter.write_line(
        f"forced: {counts['tests']} tests, {counts['ran backward']} ran backward, "
        f"{counts['kept arrays']} kept arrays for it, "
        f"{counts['moved bytes']} moved bytes, {counts['bytes']} bytes"
    )
