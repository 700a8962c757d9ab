"""The rules for NumPy functions other than ufuncs: the shape and dtype of the result, without elements.

Functions that NumPy composes in Python of methods and ufuncs run as they are. Functions that compute in C,
or that drop subclasses of ``ndarray``, have a rule here, by name. A function without a rule really runs, on
zeros, if its arguments are small; otherwise :class:`EstimateError` names it.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from chainer_ooc.estimating import shape_array
from chainer_ooc.estimating.errors import DependsOnDataError, EstimateError
from chainer_ooc.estimating.ledger import Ledger
from chainer_ooc.estimating.shape_array import ShapeArray, ledger_of, memory_of, new, new_like
from chainer_ooc.estimating.ufuncs import small

__all__ = ["call", "really_run"]

_rules: dict[str, Callable[..., Any]] = {}

#: Composed in Python of what has rules: they run as they are.
_COMPOSED = frozenset(
    (
        "sum", "mean", "std", "var", "prod", "max", "min", "amax", "amin", "any", "all", "ptp",
        "average", "cumsum", "cumprod", "round", "around", "clip", "reshape", "ravel",
        "transpose", "swapaxes", "moveaxis", "rollaxis", "squeeze", "expand_dims", "stack",
        "vstack", "hstack", "dstack", "column_stack", "split", "array_split", "vsplit",
        "hsplit", "dsplit", "atleast_1d", "atleast_2d", "atleast_3d", "take", "repeat",
        "argmax", "argmin", "argsort", "sort", "argpartition", "flip", "flipud", "fliplr",
        "rot90", "roll", "tile", "diagonal", "trace", "shape", "ndim", "size", "real", "imag",
        "iscomplexobj", "isrealobj", "matrix_transpose", "append", "tril", "triu", "nan_to_num",
        "outer", "cross", "diff", "sinc", "fix",
    )
)  # fmt: skip
#: They look at dtypes, and at no elements.
_OF_DTYPES = ("result_type", "can_cast", "min_scalar_type", "common_type")


def call(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of ``func(*args, **kwargs)`` without its elements."""
    if func.__name__ in _OF_DTYPES:
        return func(*_plain(args, []), **kwargs)
    rule = _rules.get(_name(func))
    if rule is not None:
        return rule(*args, **kwargs)
    implementation = getattr(func, "_implementation", None) or getattr(func, "__wrapped__", None)
    if func.__name__ in _COMPOSED and implementation is not None:
        return implementation(*args, **kwargs)
    return really_run(func, implementation or func, args, kwargs)


def really_run(func: Any, implementation: Any, args: Any, kwargs: Any) -> Any:
    """Run a function without a rule on zeros, if its arguments are small.

    Raises:
        EstimateError: If the arguments are large, or the function fails on zeros.
    """
    arrays: list[np.ndarray] = []
    args = _plain(args, arrays)
    kwargs = {key: _plain(value, arrays) for key, value in kwargs.items()}
    ledger = ledger_of(*arrays)
    nbytes = sum(array.nbytes for array in arrays)
    where = f"{ledger.segment.name}: " if ledger.segment.name else ""
    if nbytes > shape_array.REALLY_RUN:
        raise EstimateError(
            f"{where}numpy's {_name(func)} has no rule that tells its result's shape, and its arguments of "
            f"{nbytes >> 20} MiB are too large to run it on zeros; estimate with a smaller batch or insize, "
            "or replace the function"
        )
    try:
        result = implementation(*args, **kwargs)
    except Exception as error:
        raise EstimateError(
            f"{where}numpy's {_name(func)} has no rule that tells its result's shape, and fails on zeros: {error}"
        ) from error
    ledger.note(f"numpy's {_name(func)} ran on zeros to know its result's shape")
    ledger.work("heavy", sum(array.size for array in arrays))
    return _wrap(result, ledger)


def _name(func: Any) -> str:
    module = getattr(func, "__module__", "") or ""
    prefix = "linalg." if "linalg" in module else ""
    return prefix + func.__name__


def _plain(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, ShapeArray):
        arrays.append(value)
        return np.ndarray.view(value, np.ndarray)
    if type(value) in (list, tuple):
        return type(value)(_plain(item, arrays) for item in value)
    return value


def _wrap(value: Any, ledger: Ledger) -> Any:
    if isinstance(value, np.ndarray):
        if memory_of(value) is not None:
            return np.ndarray.view(value, ShapeArray)
        return new(value.shape, value.dtype, ledger, shape_array.layout_axes(value))
    if isinstance(value, tuple) and type(value) is not tuple:  # a named tuple
        return type(value)(*(_wrap(item, ledger) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_wrap(item, ledger) for item in value)
    return value


def _rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            _rules[name] = function
        return function

    return register


@_rule("empty_like", "zeros_like", "ones_like")
def _like(
    a: Any, dtype: Any = None, order: str = "K", subok: bool = True, shape: Any = None, **_: Any
) -> Any:
    if shape is not None:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
    result = new_like(a, dtype, order, shape)
    ledger_of(a).work("fill", result.nbytes)
    return result


@_rule("full_like")
def _full_like(a: Any, fill_value: Any, *args: Any, **kwargs: Any) -> Any:
    return _like(a, *args, **kwargs)


@_rule("copy")
def _copy(a: Any, order: str = "K", subok: bool = False) -> Any:
    return a.copy(order)


@_rule("copyto")
def _copyto(dst: Any, src: Any, casting: str = "same_kind", where: Any = True) -> None:
    ledger_of(dst, src).work("copy", dst.nbytes + getattr(src, "nbytes", 0))


@_rule("concatenate")
def _concatenate(
    arrays: Any, axis: Any = 0, out: Any = None, dtype: Any = None, casting: Any = None
) -> Any:
    arrays = [a if isinstance(a, np.ndarray) else np.asarray(a) for a in arrays]
    ledger = ledger_of(*arrays)
    if axis is None:
        arrays, axis = [a.ravel() for a in arrays], 0
    axis = range(arrays[0].ndim)[axis]
    for a in arrays:
        rest = [n for i, n in enumerate(a.shape) if i != axis]
        if rest != [n for i, n in enumerate(arrays[0].shape) if i != axis]:
            raise ValueError(
                f"concatenate: shapes {[a.shape for a in arrays]} differ beside axis {axis}"
            )
    tiny = np.concatenate(
        [small(a) for a in arrays if a.size] or [small(arrays[0])], axis, dtype=dtype
    )
    total = sum(a.shape[axis] for a in arrays)
    shape = (*arrays[0].shape[:axis], total, *arrays[0].shape[axis + 1 :])
    result = new(shape, tiny.dtype, ledger, shape_array.layout_axes(tiny)) if out is None else out
    ledger.work("copy", 2 * result.nbytes)
    return result


@_rule("where")
def _where(condition: Any, *choices: Any) -> Any:
    if not choices:
        return condition.nonzero()
    operands = (condition, *choices)
    shape = shape_array.broadcast(*map(np.shape, operands))
    tiny = np.where(*map(small, operands))
    ledger = ledger_of(*operands)
    result = new(shape, tiny.dtype, ledger, shape_array.layout_axes(tiny))
    ledger.work("simple", result.nbytes + sum(getattr(o, "nbytes", 0) for o in operands))
    return result


@_rule(
    "nonzero",
    "flatnonzero",
    "argwhere",
    "unique",
    "extract",
    "compress",
    "searchsorted",
    "bincount",
)
def _depends_on_data(a: Any, *args: Any, **kwargs: Any) -> Any:
    for argument in (a, *args):
        if isinstance(argument, ShapeArray):
            argument.nonzero()
    raise DependsOnDataError("a shape depends on data, and there is none")


@_rule("bincount")
def _bincount(x: Any, /, weights: Any = None, minlength: int = 0) -> Any:
    known = isinstance(x, ShapeArray) or not np.size(x)
    length = max(minlength, 0 if known else int(np.max(x)) + 1)
    ledger = ledger_of(x, weights)
    ledger.work("index", int(np.size(x)))
    arrays = [(x, np.intp), (weights, np.float64)]
    converted = [new(a.shape, t, ledger) for a, t in arrays if a is not None and a.dtype != t]
    result = new((length,), np.intp if weights is None else np.float64, ledger)
    del converted
    return result


@_rule("vdot")
def _vdot(a: Any, b: Any, /) -> Any:
    return np.dot(a.ravel(), b.ravel())


@_rule("inner")
def _inner(a: Any, b: Any, /) -> Any:
    return np.tensordot(a, b, (-1, -1)) if np.ndim(a) and np.ndim(b) else np.multiply(a, b)


@_rule("fill_diagonal")
def _fill_diagonal(a: Any, val: Any, wrap: bool = False) -> None:
    ledger_of(a).work("fill", min(a.shape) * a.itemsize)


@_rule("dot")
def _dot(a: Any, b: Any, out: Any = None) -> Any:
    a, b = np.asanyarray(a), np.asanyarray(b)
    if not a.ndim or not b.ndim:
        return np.multiply(a, b)
    core = a.shape[-1]
    rows = a.shape[:-1]
    columns = b.shape[:-2] + b.shape[-1:] if b.ndim > 1 else ()
    if core != (b.shape[-2] if b.ndim > 1 else b.shape[0]):
        raise ValueError(f"shapes {a.shape} and {b.shape} not aligned")
    ledger = ledger_of(a, b)
    dtype = np.result_type(a.dtype, b.dtype)
    # For BLAS NumPy copies arrays of another dtype, and arrays that are not contiguous.
    held = [_for_blas(x, dtype, ledger) for x in (a, b)]
    result = new(rows + columns, dtype, ledger) if out is None else out
    ledger.gemm(math.prod(rows), math.prod(columns), core, dtype.itemsize)
    del held
    return result


def _for_blas(a: Any, dtype: Any, ledger: Ledger) -> Any:
    if a.dtype != dtype:
        return a.astype(dtype)
    if dtype.kind not in "fc" or dtype.itemsize < 4 or a.ndim != 2 or memory_of(a) is None:
        return a
    return a if a.flags.forc else a.copy()


@_rule("tensordot")
def _tensordot(a: Any, b: Any, axes: Any = 2) -> Any:
    a, b = (x if isinstance(x, np.ndarray) else np.asarray(x) for x in (a, b))
    if isinstance(axes, int | np.integer):
        axes_a, axes_b = list(range(-axes, 0)), list(range(axes))
    else:
        axes_a, axes_b = (
            [operator.index(i) for i in (x if isinstance(x, list | tuple) else [x])] for x in axes
        )
    axes_a = [range(a.ndim)[i] for i in axes_a]
    axes_b = [range(b.ndim)[i] for i in axes_b]
    if [a.shape[i] for i in axes_a] != [b.shape[i] for i in axes_b]:
        raise ValueError("shape-mismatch for sum")
    free_a = [i for i in range(a.ndim) if i not in axes_a]
    free_b = [i for i in range(b.ndim) if i not in axes_b]
    core = math.prod(a.shape[i] for i in axes_a)
    rows, columns = [a.shape[i] for i in free_a], [b.shape[i] for i in free_b]
    left = a.transpose(free_a + axes_a).reshape(math.prod(rows), core)
    right = b.transpose(axes_b + free_b).reshape(core, math.prod(columns))
    return np.dot(left, right).reshape(rows + columns)


@_rule("einsum")
def _einsum(
    *operands: Any, out: Any = None, optimize: Any = False, dtype: Any = None, **_: Any
) -> Any:
    core = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core"
    parse = importlib.import_module(f"{core}.einsumfunc")._parse_einsum_input
    arrays = [x for x in operands if isinstance(x, np.ndarray)]
    ledger = ledger_of(*arrays)
    # The parser needs plain arrays: give it arrays of these shapes with zero strides.
    dummies = [
        np.broadcast_to(np.zeros((), x.dtype), x.shape) if isinstance(x, np.ndarray) else x
        for x in operands
    ]
    inputs, output, parsed = parse(dummies)
    sizes: dict[str, int] = {}
    for term, array in zip(inputs.split(","), parsed, strict=True):
        for letter, size in zip(term, array.shape, strict=True):
            if sizes.get(letter, 1) in (1, size):
                sizes[letter] = size
            elif size != 1:
                raise ValueError(f"einsum: sizes {sizes[letter]} and {size} of {letter!r} differ")
    shape = tuple(sizes[letter] for letter in output)
    result = out if out is not None else new(shape, dtype or np.result_type(*parsed), ledger)
    products = math.prod(sizes.values())
    ledger.work("simple", 2 * products * result.itemsize)
    ledger.segment.flops += 2.0 * products
    return result


@_rule("pad")
def _pad(array: Any, pad_width: Any, mode: Any = "constant", **kwargs: Any) -> Any:
    if isinstance(pad_width, dict):
        pad_width = [pad_width.get(i, (0, 0)) for i in range(array.ndim)]
        pad_width = [(w, w) if isinstance(w, int) else w for w in pad_width]
    widths = np.broadcast_to(np.asarray(pad_width), (array.ndim, 2)).tolist()
    shape = [n + before + after for n, (before, after) in zip(array.shape, widths, strict=True)]
    ledger = ledger_of(array)
    result = new(shape, array.dtype, ledger, order="F" if array.flags.fnc else "C")
    ledger.work("copy", array.nbytes + result.nbytes)
    return result


@_rule("broadcast_to")
def _broadcast_to(array: Any, shape: Any, subok: bool = False) -> Any:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if shape_array.broadcast(array.shape, shape) != shape:
        raise ValueError(f"cannot broadcast shape {array.shape} to {shape}")
    lead = len(shape) - array.ndim
    strides = [0] * lead + [
        0 if n == 1 and m != 1 else stride
        for n, m, stride in zip(array.shape, shape[lead:], array.strides, strict=True)
    ]
    memory = memory_of(array)
    if memory is None or 0 in shape:
        return new(shape, array.dtype, ledger_of(array))
    start = _address(array) - _address(np.ndarray((1,), np.uint8, memory))
    return np.ndarray.__new__(ShapeArray, shape, array.dtype, memory, start, strides)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


@_rule("broadcast_arrays")
def _broadcast_arrays(*arrays: Any, subok: bool = False) -> Any:
    shape = shape_array.broadcast(*map(np.shape, arrays))
    result = [np.broadcast_to(a, shape) for a in arrays]
    return tuple(result) if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else result


@_rule("may_share_memory", "shares_memory")
def _shares_memory(a: Any, b: Any, max_work: Any = None) -> bool:
    plain = [np.ndarray.view(x, np.ndarray) if isinstance(x, np.ndarray) else x for x in (a, b)]
    return np.may_share_memory(plain[0], plain[1])


@_rule("array_equal", "allclose", "array_equiv")
def _compare(a: Any, b: Any, *args: Any, **kwargs: Any) -> bool:
    shape_array._read(a if isinstance(a, ShapeArray) else b)
    return np.shape(a) == np.shape(b)


@_rule("isclose")
def _isclose(a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
    return np.less_equal(np.abs(np.subtract(a, b)), 0)


@_rule("meshgrid")
def _meshgrid(*arrays: Any, copy: bool = True, sparse: bool = False, indexing: str = "xy") -> Any:
    sizes = [np.size(a) for a in arrays]
    if indexing == "xy" and len(sizes) > 1:
        sizes[:2] = sizes[1::-1]
    ledger = ledger_of(*arrays)
    return [new(sizes, a.dtype, ledger) for a in arrays]


@_rule("linalg.inv", "linalg.cholesky", "linalg.pinv")
def _same(a: Any, *args: Any, **kwargs: Any) -> Any:
    ledger = ledger_of(a)
    ledger.work("heavy", a.size * a.shape[-1])
    return new(a.shape, a.dtype, ledger)


@_rule("linalg.det")
def _det(a: Any) -> Any:
    ledger = ledger_of(a)
    ledger.work("heavy", a.size * a.shape[-1])
    return new(a.shape[:-2], a.dtype, ledger)


@_rule("linalg.eigh")
def _eigh(a: Any, UPLO: str = "L") -> Any:
    ledger = ledger_of(a)
    ledger.work("heavy", a.size * a.shape[-1])
    result = new(a.shape[:-1], a.dtype, ledger), new(a.shape, a.dtype, ledger)
    kind = getattr(np.linalg, "linalg", np.linalg)
    kind = getattr(kind, "EighResult", None)
    return kind(*result) if kind else result


@_rule("linalg.norm")
def _norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
    return np.sqrt(np.square(x).sum(axis=axis, keepdims=keepdims))


shape_array.register("function", call)
