"""A context in which NumPy makes arrays without elements."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from chainer_ooc.estimating.ledger import Ledger, active_ledger, running
from chainer_ooc.estimating.shape_array import ShapeArray, broadcast, memory_of, new

__all__ = ["without_data"]

#: Integer arrays of fewer bytes that a program makes are real: their values may decide shapes.
SMALLEST = 16 << 10
#: Ranges of at least so many bytes have no elements.
LONGEST = 1 << 20

_lock = threading.Lock()
_users = 0
_undo: list[Callable[[], None]] = []


@contextlib.contextmanager
def without_data(ledger: Ledger) -> Iterator[None]:
    """Make the calling thread's large NumPy arrays without elements, and count them in ``ledger``.

    NumPy's functions that make arrays are replaced meanwhile. In other threads they work as always.
    """
    global _users
    with _lock:
        if not _users:
            _patch()
        _users += 1
    outer, running.ledger = running.ledger, ledger
    try:
        yield
    finally:
        running.ledger = outer
        with _lock:
            _users -= 1
            if not _users:
                while _undo:
                    _undo.pop()()


def _replace(module: Any, name: str, make: Callable[[Any], Any]) -> None:
    stock = getattr(module, name, None)
    if stock is not None:
        setattr(module, name, functools.wraps(stock)(make(stock)))
        _undo.append(lambda: setattr(module, name, stock))


def _patch() -> None:
    for name in ("empty", "zeros", "ones"):
        _replace(np, name, _maker)
    _replace(np, "full", _full)
    _replace(np, "arange", _arange)
    _replace(np, "linspace", _linspace)
    for name in ("eye", "identity", "tri"):
        _replace(np, name, _square)
    for name in ("array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray"):
        _replace(np, name, functools.partial(_converter, name))
    _replace(np.lib.stride_tricks, "as_strided", _as_strided)
    for name in ("rand", "randn"):
        _replace(np.random, name, _random_of_dimensions)
    for name in _RANDOM:
        _replace(np.random, name, functools.partial(_random, name))
    _patch_chainer()


#: Positions of ``size`` among the arguments of numpy.random's functions, and their dtype.
_RANDOM = {
    "random": (0, float), "random_sample": (0, float), "ranf": (0, float), "sample": (0, float),
    "standard_normal": (0, float), "standard_exponential": (0, float), "uniform": (2, float),
    "normal": (2, float), "gumbel": (2, float), "laplace": (2, float), "logistic": (2, float),
    "lognormal": (2, float), "exponential": (1, float), "poisson": (1, np.int64), "binomial": (2, np.int64),
    "gamma": (2, float), "beta": (2, float), "randint": (2, np.int64), "choice": (1, np.int64),
}  # fmt: skip


def _size(shape: Any) -> int:
    return math.prod(shape) if isinstance(shape, tuple | list) else operator.index(shape)


def _maker(stock: Any) -> Any:
    kind = "" if stock is np.empty else "fill"

    def make(shape: Any, dtype: Any = float, order: Any = "C", **kwargs: Any) -> Any:
        ledger = active_ledger()
        dtype = np.dtype(dtype)
        size = _size(shape)
        smallest = 2 * dtype.itemsize if dtype.kind in "fc" else SMALLEST
        if ledger is None or dtype.hasobject or size * dtype.itemsize < smallest:
            return stock(shape, dtype, order, **kwargs)
        result = new(shape, dtype, ledger, order=order)
        if kind:
            ledger.work(kind, result.nbytes)
        return result

    return make


def _full(stock: Any) -> Any:
    def full(
        shape: Any, fill_value: Any, dtype: Any = None, order: Any = "C", **kwargs: Any
    ) -> Any:
        if active_ledger() is None:
            return stock(shape, fill_value, dtype, order, **kwargs)
        dtype = np.asarray(fill_value).dtype if dtype is None else dtype
        result = np.empty(shape, dtype, order)
        result[...] = fill_value
        return result

    return full


def _arange(stock: Any) -> Any:
    """Make short ranges with elements: their values may decide shapes."""

    def arange(*args: Any, **kwargs: Any) -> Any:
        ledger = active_ledger()
        if ledger is None or not all(isinstance(a, int | float | np.number) for a in args):
            return stock(*args, **kwargs)
        start, stop, step = (
            (args if len(args) == 3 else (*args, 1)) if len(args) > 1 else (0, *args, 1)
        )
        length = max(0, math.ceil((stop - start) / step))
        if length * 8 < LONGEST:
            return stock(*args, **kwargs)
        dtype = kwargs.get("dtype") or np.result_type(stock(1), *map(type, args))
        ledger.work("fill", length * np.dtype(dtype).itemsize)
        return new((length,), dtype, ledger)

    return arange


def _linspace(stock: Any) -> Any:
    def linspace(start: Any, stop: Any, num: int = 50, *args: Any, **kwargs: Any) -> Any:
        ledger = active_ledger()
        known = {"dtype", "endpoint"} >= kwargs.keys() and not args
        if ledger is None or num < 2 or not known or np.ndim(start) or np.ndim(stop):
            return stock(start, stop, num, *args, **kwargs)
        return new((num,), kwargs.get("dtype") or float, ledger)

    return linspace


def _square(stock: Any) -> Any:
    def make(N: int, M: Any = None, *args: Any, dtype: Any = float, **kwargs: Any) -> Any:
        ledger = active_ledger()
        given = {} if stock.__name__ == "identity" else {"M": M}
        if ledger is None or N * (M or N) * np.dtype(dtype).itemsize < SMALLEST:
            return stock(N, *args, dtype=dtype, **given, **kwargs)
        return new((N, M or N), dtype, ledger)

    return make


def _converter(name: str, stock: Any) -> Any:
    def convert(a: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(a, ShapeArray):
            return stock(a, dtype, *args, **kwargs)
        order = kwargs.get("order") or "K"
        copy = name == "array" and kwargs.get("copy", True) is True
        if name in ("ascontiguousarray", "asfortranarray"):
            order = "C" if name == "ascontiguousarray" else "F"
        flags = a.flags
        fits = order in "KA" or (flags.c_contiguous if order == "C" else flags.f_contiguous)
        wanted = a.dtype if dtype is None else np.dtype(dtype)
        if copy or not fits or wanted != a.dtype:
            a = a.astype(wanted, order)
        extra = kwargs.get("ndmin", 0) - a.ndim
        return a.reshape((1,) * extra + a.shape) if extra > 0 else a

    return convert


def _as_strided(stock: Any) -> Any:
    def as_strided(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, ShapeArray):
            return stock(x, *args, **kwargs)
        return np.ndarray.view(stock(np.ndarray.view(x, np.ndarray), *args, **kwargs), ShapeArray)

    return as_strided


def _random_array(shape: Any, dtype: Any, ledger: Ledger) -> Any:
    shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    ledger.work("random", math.prod(shape))
    return new(shape, dtype, ledger)


def _random_of_dimensions(stock: Any) -> Any:
    def draw(*shape: int) -> Any:
        ledger = active_ledger()
        if ledger is None or not shape:
            return stock(*shape) if ledger is None else 0.5
        return _random_array(shape, float, ledger)

    return draw


def _random(name: str, stock: Any) -> Any:
    position, dtype = _RANDOM[name]

    def draw(*args: Any, **kwargs: Any) -> Any:
        ledger = active_ledger()
        if ledger is None:
            return stock(*args, **kwargs)
        size = kwargs.get("size", args[position] if len(args) > position else None)
        if size is None:
            size = broadcast(*(np.shape(a) for a in args[:position]))
        return _random_array(size, kwargs.get("dtype", dtype), ledger)

    return draw


class _NumpyWithoutData:
    """A stand-in for the module ``numpy`` in modules that call ``numpy.ndarray(...)``."""

    def __getattr__(self, name: str) -> Any:
        return _Ndarray if name == "ndarray" else getattr(np, name)


class _MakesShapeArrays(type):
    def __call__(
        cls, shape: Any, dtype: Any = float, buffer: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if buffer is None:
            return np.empty(shape, dtype, *args, **kwargs)
        result = np.ndarray(shape, dtype, buffer, *args, **kwargs)
        return result if memory_of(result) is None else np.ndarray.view(result, ShapeArray)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, np.ndarray)


class _Ndarray(metaclass=_MakesShapeArrays):
    """A stand-in for ``numpy.ndarray`` in calls and in ``isinstance()``."""


def _patch_chainer() -> None:
    from chainer.functions.array import as_strided
    from chainer.utils import conv, conv_nd

    for module, name in ((conv, "numpy"), (conv_nd, "numpy"), (as_strided, "np")):
        setattr(module, name, _NumpyWithoutData())
        _undo.append(functools.partial(setattr, module, name, np))
