"""Compare results bit for bit: NaNs equal themselves, and 0.0 does not equal -0.0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["assert_same_bits"]


def assert_same_bits(actual: Any, expected: Any, what: str = "result") -> None:
    """Check that two results are the same, bit for bit.

    Args:
        actual: An array, a :class:`chainer.Variable`, a number, ``None``, or dicts, lists and tuples of these.
        expected: The same. Arrays must agree in shape, dtype and every byte.
        what: A name for the result, for the error.

    Raises:
        AssertionError: If they differ. The message says where first.
    """
    actual, expected = _unwrapped(actual), _unwrapped(expected)
    if isinstance(expected, Mapping):
        assert isinstance(actual, Mapping), f"{what}: {type(actual)} is not a mapping"
        assert list(actual) == list(expected), f"{what}: {list(actual)} != {list(expected)}"
        for key in expected:
            assert_same_bits(actual[key], expected[key], f"{what}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert isinstance(actual, list | tuple), f"{what}: {type(actual)} is not a sequence"
        assert len(actual) == len(expected), f"{what}: {len(actual)} != {len(expected)} items"
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(a, b, f"{what}[{index}]")
    elif isinstance(expected, np.ndarray | np.generic):
        assert isinstance(actual, np.ndarray | np.generic), f"{what}: {type(actual)} is no array"
        _assert_same_array(np.asarray(actual), np.asarray(expected), what)
    else:
        assert type(actual) is type(expected), f"{what}: {type(actual)} != {type(expected)}"
        assert actual == expected, f"{what}: {actual!r} != {expected!r}"


def _unwrapped(value: Any) -> Any:
    """Return the array of a variable, and anything else unchanged."""
    if hasattr(value, "array") and hasattr(value, "grad_var"):
        return value.array
    return value


def _assert_same_array(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype} != {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} != {expected.shape}"
    if actual.tobytes() == expected.tobytes():
        return
    size = actual.dtype.itemsize
    rows = [np.frombuffer(a.tobytes(), f"V{size}") for a in (actual, expected)]
    wrong = np.flatnonzero(rows[0] != rows[1])
    where = tuple(int(i) for i in np.unravel_index(wrong[0], actual.shape))
    raise AssertionError(
        f"{what}: {wrong.size} of {actual.size} elements differ, first at {where}: "
        f"{actual[where]!r} != {expected[where]!r}"
    )
