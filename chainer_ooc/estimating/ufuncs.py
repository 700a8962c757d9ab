"""Find the result of a ufunc without computing it.

The ufunc really runs, on arrays with at most two elements along each axis, with the dtypes of the operands
and the order of their strides. So the dtype and the layout of the result are NumPy's own decision.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import numpy as np

from chainer_ooc.estimating import shape_array
from chainer_ooc.estimating.errors import EstimateError
from chainer_ooc.estimating.ledger import Ledger
from chainer_ooc.estimating.shape_array import broadcast, ledger_of, new

__all__ = ["call", "small"]

_SIMPLE = frozenset(
    (
        "add", "subtract", "multiply", "negative", "positive", "absolute", "fabs", "maximum",
        "minimum", "fmax", "fmin", "greater", "greater_equal", "less", "less_equal", "equal",
        "not_equal", "logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and",
        "bitwise_or", "bitwise_xor", "invert", "sign", "square", "clip", "rint", "floor",
        "ceil", "trunc", "isfinite", "isnan", "isinf", "signbit", "conjugate", "divide",
        "true_divide", "reciprocal", "sqrt",
    )
)  # fmt: skip


def call(ufunc: Any, method: str, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of ``ufunc.method(*inputs, **kwargs)`` without its elements."""
    out = kwargs.get("out")
    operands = [*inputs, *(out or ())]
    ledger = ledger_of(*operands)
    if method == "at":
        ledger.work("index", int(np.size(inputs[1] if not _is_tuple(inputs[1]) else inputs[1][0])))
        return None
    if method == "__call__":
        if ufunc.signature is not None:
            return _generalized(ufunc, inputs, kwargs, ledger)
        return _elementwise(ufunc, inputs, kwargs, ledger)
    if method == "reduce":
        return _reduce(ufunc, inputs[0], kwargs, ledger)
    array = inputs[0]
    if method == "accumulate":
        result = _small_result(ufunc.accumulate, (small(array),), {"dtype": kwargs.get("dtype")})
        shape = array.shape
    elif method == "reduceat":
        axis = range(array.ndim)[kwargs.get("axis", 0)]
        result = _small_result(ufunc.reduce, (small(array),), {"keepdims": True})
        shape = (*array.shape[:axis], len(inputs[1]), *array.shape[axis + 1 :])
    else:
        result = _small_result(ufunc.outer, tuple(map(small, inputs)), {})
        shape = np.shape(inputs[0]) + np.shape(inputs[1])
    ledger.work("simple", array.nbytes)
    return out[0] if out else new(shape, result.dtype, ledger, _axes(result))


def _is_tuple(thing: Any) -> bool:
    return type(thing) is tuple and bool(thing)


def _elementwise(
    ufunc: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], ledger: Ledger
) -> Any:
    out = kwargs.pop("out", None)
    where = kwargs.pop("where", True)
    shape = broadcast(*map(np.shape, inputs), np.shape(where))
    results = _small_result(ufunc, tuple(map(small, inputs)), kwargs)
    results = results if isinstance(results, tuple) else (results,)
    arrays = []
    for index, result in enumerate(results):
        given = out[index] if out else None
        if given is not None and broadcast(given.shape, shape) != given.shape:
            raise ValueError(
                f"non-broadcastable output operand with shape {given.shape} doesn't match the "
                f"broadcast shape {shape}"
            )
        arrays.append(
            given if given is not None else new(shape, result.dtype, ledger, _axes(result))
        )
    name = ufunc.__name__
    if name in _SIMPLE:
        nbytes = sum(getattr(x, "nbytes", 0) for x in (*inputs, *arrays))
        ledger.work("simple", nbytes)
    else:
        ledger.work("heavy", math.prod(shape))
    return arrays[0] if len(arrays) == 1 else tuple(arrays)


def _reduce(ufunc: Any, array: Any, kwargs: dict[str, Any], ledger: Ledger) -> Any:
    array = array if isinstance(array, np.ndarray) else np.asarray(array)
    axis = kwargs.get("axis", 0)
    keepdims = bool(kwargs.get("keepdims", False))
    shape = shape_array._reduced(array.shape, axis, keepdims)
    ledger.work("reduce", array.nbytes)
    out = kwargs.get("out")
    if out:
        return out[0]
    given = {"axis": axis, "dtype": kwargs.get("dtype"), "keepdims": keepdims}
    if "initial" in kwargs:
        given["initial"] = kwargs["initial"]
    elif array.size == 0:
        given["initial"] = 0
    result = _small_result(ufunc.reduce, (small(array),), given)
    return new(shape, result.dtype, ledger, _axes(result))


def _generalized(
    ufunc: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], ledger: Ledger
) -> Any:
    """Return the result of a ufunc whose core is an array. Its signature gives the shapes."""
    left, right = ufunc.signature.split("->")
    arrays = [x if isinstance(x, np.ndarray) else np.asarray(x) for x in inputs]
    sizes: dict[str, int] = {}
    batches = []
    missing: set[str] = set()
    for array, core in zip(arrays, _cores(left), strict=True):
        names = list(core)
        while len(names) > array.ndim and any(name.endswith("?") for name in names):
            gone = next(name for name in names if name.endswith("?"))
            names.remove(gone)
            missing.add(gone)
        start = array.ndim - len(names)
        batches.append(array.shape[:start])
        for name, size in zip(names, array.shape[start:], strict=True):
            if sizes.setdefault(name, size) != size:
                raise ValueError(
                    f"{ufunc.__name__}: shapes {[a.shape for a in arrays]} do not fit {ufunc.signature}"
                )
    batch = broadcast(*batches)
    out = kwargs.get("out")
    dtypes = _result_dtypes(ufunc, tuple(array.dtype for array in arrays))
    results = []
    for index, core in enumerate(_cores(right)):
        shape = batch + tuple(sizes[name] for name in core if name not in missing)
        given = out[index] if out else None
        results.append(new(shape, dtypes[index], ledger) if given is None else given)
    if ufunc.__name__ == "matmul":
        rows, columns = sizes.get("n?", 1), sizes.get("m?", sizes.get("p?", 1))
        inner = sizes.get("k", sizes.get("n", 1))
        ledger.gemm(rows, columns, inner, arrays[0].itemsize, math.prod(batch))
    else:
        ledger.work("heavy", sum(array.size for array in arrays))
    return results[0] if len(results) == 1 else tuple(results)


def _cores(text: str) -> list[tuple[str, ...]]:
    return [
        tuple(name for name in core.split(",") if name) for core in re.findall(r"\(([^)]*)\)", text)
    ]


def _result_dtypes(ufunc: Any, dtypes: tuple[np.dtype, ...]) -> list[np.dtype]:
    return list(ufunc.resolve_dtypes((*dtypes, *[None] * ufunc.nout))[ufunc.nin :])


def _small_result(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with np.errstate(all="ignore"):
        result = function(*args, **kwargs)
    if isinstance(result, np.ndarray | tuple):
        return result
    return np.asarray(result)


def _axes(result: Any) -> list[int]:
    return shape_array.layout_axes(result)


def small(operand: Any) -> Any:
    """Return a small operand with the dtype and the order of strides of another, at most two elements an axis."""
    if not isinstance(operand, np.ndarray):
        return operand
    return _small_like(operand.dtype, operand.shape, operand.strides)


@functools.lru_cache(4096)
def _small_like(dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    if dtype.hasobject:
        raise EstimateError(
            "arrays of Python objects have no shape to infer from; use numeric ones"
        )
    ranks = sorted({abs(stride) for stride in strides if stride})
    strides = tuple([1 << ranks.index(abs(stride)) if stride else 0 for stride in strides])
    shape = tuple([min(n, 2) for n in shape])
    elements = 1 + sum(stride * (n - 1) for stride, n in zip(strides, shape, strict=True) if n)
    memory = bytearray(max(elements, 1) * dtype.itemsize)  # NumPy's arrays have no elements here
    return np.ndarray(shape, dtype, memory, 0, [stride * dtype.itemsize for stride in strides])


shape_array.register("ufunc", call)
