"""An array with a shape, a dtype and strides but no elements.

``ShapeArray`` is a ``numpy.ndarray`` over addresses without memory. So views, transposes and reshapes are
NumPy's own, and real strides decide whether a reshape copies. An operation that would compute elements
returns another ``ShapeArray`` with the shape, dtype and layout of NumPy's result.
"""

# The methods are those of numpy.ndarray, which documents them; their types are wider.
# ruff: noqa: D102
# mypy: disable-error-code="override, misc, assignment, return-value"

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from chainer_ooc.estimating.errors import DependsOnDataError
from chainer_ooc.estimating.ledger import Ledger, Memory, active_ledger

__all__ = ["MASK", "ShapeArray", "memory_of", "new"]

#: The note that a shape depends on the values of a mask, and they are not there.
MASK = "a mask was taken to select everything"

_INTEGERS = (int, np.integer)
#: Arrays that a function without a rule may really compute on, all together (bytes).
REALLY_RUN = 64 << 20


def ledger_of(*arrays: Any) -> Ledger:
    """Return the ledger that counts the memory of the first array without elements, or else the active one."""
    for array in arrays:
        memory = memory_of(array)
        if memory is not None:
            return memory.ledger
    return active_ledger() or _detached


_detached = Ledger()


def memory_of(array: Any) -> Memory | None:
    """Return the allocation that holds ``array``; ``None`` if it is a real array."""
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, memoryview):
        return memory_of(array.obj)
    return array if isinstance(array, Memory) else None


def new(
    shape: Any, dtype: Any, ledger: Ledger, axes: Sequence[int] | None = None, order: str = "C"
) -> ShapeArray:
    """Allocate an array without elements.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        ledger: The ledger that counts it.
        axes: The axes in the order of memory, the outermost first; ``None``: C order.
        order: ``"F"`` for Fortran order, if there are no ``axes``.
    """
    shape = tuple(map(operator.index, shape)) if isinstance(shape, Sequence) else (int(shape),)
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return np.empty(shape, dtype).view(ShapeArray)
    if axes is None:
        axes = range(len(shape)) if order != "F" else range(len(shape) - 1, -1, -1)
    strides, step = [0] * len(shape), dtype.itemsize
    for axis in reversed(axes):
        strides[axis] = step
        step *= shape[axis]
    return np.ndarray.__new__(ShapeArray, shape, dtype, ledger.allocate(nbytes), 0, strides)


def layout_axes(array: np.ndarray) -> list[int]:
    """Return an array's axes in the order of memory, the outermost first ("K" order)."""
    return sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))


def new_like(
    array: np.ndarray, dtype: Any = None, order: str = "K", shape: Any = None
) -> ShapeArray:
    """Allocate an array without elements as :func:`numpy.empty_like` does."""
    shape = array.shape if shape is None else shape
    dtype = array.dtype if dtype is None else dtype
    flags = array.flags
    if order == "K" and len(shape) == array.ndim and not flags.c_contiguous:
        return new(shape, dtype, ledger_of(array), layout_axes(array))
    fortran = order == "F" or (order in "AK" and flags.fnc)
    return new(shape, dtype, ledger_of(array), order="F" if fortran else "C")


#: What NumPy's ufuncs and other functions do with these arrays: filled by the modules that know.
_calls: dict[str, Callable[..., Any]] = {}


def register(kind: str, call: Callable[..., Any]) -> None:
    """Let ``call`` compute NumPy's ``"ufunc"`` or ``"function"`` calls on these arrays."""
    _calls[kind] = call


class ShapeArray(np.ndarray):
    """An array without elements. See the module."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return _calls["ufunc"](ufunc, method, inputs, kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _calls["function"](func, args, kwargs)

    # Methods that NumPy computes in C.

    def copy(self, order: Any = "C") -> ShapeArray:
        result = new_like(self, order=order or "K")
        same = order not in ("C", "F") or self.flags.c_contiguous
        ledger_of(self).work("copy" if same else "gather", 2 * self.nbytes)
        return result

    def __copy__(self) -> ShapeArray:
        return self.copy("K")

    def __deepcopy__(self, memo: Any) -> ShapeArray:
        return self.copy("K")

    def astype(
        self,
        dtype: Any,
        order: Any = "K",
        casting: Any = "unsafe",
        subok: bool = True,
        copy: Any = True,
    ) -> ShapeArray:
        if not copy and np.dtype(dtype) == self.dtype and order in "KA":
            return self
        result = new_like(self, dtype, order)
        ledger_of(self).work("copy", self.nbytes + result.nbytes)
        return result

    def reshape(self, *shape: Any, order: Any = "C", copy: Any = None) -> ShapeArray:
        wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], _INTEGERS) else shape
        wanted = [int(n) for n in wanted]
        if -1 in wanted and wanted.count(-1) == 1:
            rest = math.prod(n for n in wanted if n != -1)
            if rest and self.size % rest == 0:
                wanted[wanted.index(-1)] = self.size // rest
        if math.prod(wanted) != self.size or min(wanted, default=0) < 0:
            raise ValueError(f"cannot reshape array of size {self.size} into shape {tuple(wanted)}")
        if not _reshape_copies(self, wanted, order):
            return np.ndarray.reshape(self, wanted, order=order)
        fortran = order == "F" or (order == "A" and self.flags.fnc)
        ledger_of(self).work("gather", 2 * self.nbytes)
        return new(wanted, self.dtype, ledger_of(self), order="F" if fortran else "C")

    def ravel(self, order: Any = "C") -> ShapeArray:
        return self.reshape(-1, order=order if order != "K" else "A")

    def flatten(self, order: Any = "C") -> ShapeArray:
        ledger_of(self).work("copy", 2 * self.nbytes)
        return new((self.size,), self.dtype, ledger_of(self))

    def fill(self, value: Any) -> None:
        ledger_of(self).work("fill", self.nbytes)

    def dot(self, other: Any, out: Any = None) -> Any:
        return np.dot(self, other) if out is None else np.dot(self, other, out)

    def take(self, indices: Any, axis: Any = None, out: Any = None, mode: Any = "raise") -> Any:
        shape = np.shape(indices)
        if axis is not None:
            axis = range(self.ndim)[axis]
            shape = self.shape[:axis] + shape + self.shape[axis + 1 :]
        return _indexed(self, shape) if out is None else out

    def repeat(self, repeats: Any, axis: Any = None) -> ShapeArray:
        a = self.ravel() if axis is None else self
        axis = range(a.ndim)[axis or 0]
        counts = np.broadcast_to(np.asarray(repeats), (a.shape[axis],))
        return _indexed(a, (*a.shape[:axis], int(counts.sum()), *a.shape[axis + 1 :]))

    def argmax(self, axis: Any = None, out: Any = None, *, keepdims: bool = False) -> Any:
        ledger_of(self).work("reduce", self.nbytes)
        shape = _reduced(self.shape, axis, keepdims)
        # NumPy moves the axis to the end, and copies if the elements are not in order then.
        moved = self if axis is None else np.moveaxis(self, axis, -1)
        copied = None if moved.flags.c_contiguous else moved.copy()
        result = new(shape, np.intp, ledger_of(self)) if out is None else out
        del copied
        return result

    argmin = argmax

    def argsort(self, axis: Any = -1, kind: Any = None, order: Any = None, **_: Any) -> ShapeArray:
        ledger_of(self).work("heavy", self.size * max(1, self.size.bit_length() // 4))
        return new(self.shape, np.intp, ledger_of(self))

    def argpartition(self, kth: Any, axis: Any = -1, kind: Any = None, order: Any = None) -> Any:
        return self.argsort(axis)

    def sort(self, axis: Any = -1, kind: Any = None, order: Any = None, **_: Any) -> None:
        ledger_of(self).work("heavy", self.size * max(1, self.size.bit_length() // 4))

    def partition(self, kth: Any, axis: Any = -1, kind: Any = None, order: Any = None) -> None:
        self.sort(axis)

    def cumsum(self, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
        a = self.ravel() if axis is None else self
        return np.add.accumulate(a, axis or 0, dtype, out)

    def cumprod(self, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
        a = self.ravel() if axis is None else self
        return np.multiply.accumulate(a, axis or 0, dtype, out)

    def round(self, decimals: int = 0, out: Any = None) -> Any:
        return np.rint(self, out=out)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        return self.diagonal(*args).sum(-1)

    def nonzero(self) -> Any:
        raise DependsOnDataError(
            f"{_here(self)}the positions of nonzero elements depend on data, and there is none; give "
            "estimate() real arrays as inputs where shapes depend on values"
        )

    compress = searchsorted = choose = put = nonzero

    def item(self, *args: Any) -> Any:
        _read(self)
        return self.dtype.type(0).item()

    def tolist(self) -> Any:
        _read(self)
        zero = np.ndarray((), self.dtype, bytes(self.itemsize))
        return np.broadcast_to(zero, self.shape).tolist()

    def __bool__(self) -> bool:
        _read(self)
        return False

    def __int__(self) -> int:
        _read(self)
        return 0

    def __float__(self) -> float:
        _read(self)
        return 0.0

    def __round__(self, ndigits: int | None = None) -> float:
        _read(self)
        return 0 if ndigits is None else 0.0

    def __index__(self) -> int:
        if self.dtype.kind not in "iu" or self.ndim:
            raise TypeError("only integer scalar arrays can be converted to a scalar index")
        _read(self)
        return 0

    def __repr__(self) -> str:
        return f"<ShapeArray {self.shape} {self.dtype}>"

    __str__ = __repr__

    def __getitem__(self, index: Any) -> Any:
        if type(index) is str:
            return np.ndarray.__getitem__(self, index)
        parts = index if type(index) is tuple else (index,)
        if all(map(_is_basic, parts)):
            # With an ellipsis the result is a 0-d array, not a scalar.
            whole = parts if Ellipsis in parts else (*parts, Ellipsis)
            return np.ndarray.__getitem__(self, whole)
        shape, first, count = _indexed_shape(self, parts)
        # NumPy makes the axes of index arrays the outermost in memory.
        chosen = range(first, first + count)
        axes = [*chosen, *(axis for axis in range(len(shape)) if axis not in chosen)]
        return _indexed(self, shape, axes)

    def __setitem__(self, index: Any, value: Any) -> None:
        parts = index if type(index) is tuple else (index,)
        if all(map(_is_basic, parts)):
            whole = parts if any(part is Ellipsis for part in parts) else (*parts, Ellipsis)
            nbytes = np.ndarray.__getitem__(self, whole).nbytes
            # Check as NumPy does that the value broadcasts.
            shape = np.ndarray.__getitem__(self, whole).shape
            given = np.shape(value)
            if given and given != shape and math.prod(given) != 1:
                broadcast(shape, given[-len(shape) :] if shape else ())
        else:
            nbytes = math.prod(_indexed_shape(self, parts)[0]) * self.itemsize
        read = getattr(value, "nbytes", 0)
        ledger_of(self).work("copy" if read else "fill", nbytes + read)


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that shapes broadcast to. It is faster than NumPy's for equal shapes.

    Raises:
        ValueError: If they do not broadcast.
    """
    different = {shape for shape in shapes if shape}
    if len(different) > 1:
        return np.broadcast_shapes(*different)
    return different.pop() if different else ()


def _is_basic(part: Any) -> bool:
    return (
        part is None
        or part is Ellipsis
        or type(part) is slice
        or (isinstance(part, _INTEGERS) and not isinstance(part, bool | np.bool_))
    )


def _read(array: np.ndarray) -> None:
    ledger_of(array).note(
        "the program reads computed values; they were taken to be 0 (False), which may have decided "
        "what it did next"
    )


def _here(array: np.ndarray) -> str:
    name = ledger_of(array).segment.name
    return f"{name}: " if name else ""


def _indexed(array: np.ndarray, shape: Any, axes: Sequence[int] | None = None) -> ShapeArray:
    result = new(tuple(shape), array.dtype, ledger_of(array), axes)
    ledger_of(array).work("index", result.size)
    return result


def _reduced(shape: Sequence[int], axis: Any, keepdims: bool) -> tuple[int, ...]:
    axes = range(len(shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = [operator.index(a) for a in axes]
    for a in axes:
        if not -len(shape) <= a < len(shape):
            raise np.exceptions.AxisError(a, len(shape))
    gone = {range(len(shape))[a] for a in axes}
    if keepdims:
        return tuple(1 if i in gone else n for i, n in enumerate(shape))
    return tuple(n for i, n in enumerate(shape) if i not in gone)


def _indexed_shape(array: np.ndarray, parts: tuple[Any, ...]) -> tuple[tuple[int, ...], int, int]:
    """Return the shape of ``array[parts]``, if a part is an array or a list.

    Return also the first axis from index arrays, and the number of such axes.
    """
    items: list[Any] = []
    taken = 0
    for part in parts:
        if _is_basic(part):
            items.append(part)
            taken += part is not None and part is not Ellipsis
            continue
        given = part if isinstance(part, np.ndarray) else np.asarray(part)
        if given.dtype == bool:
            taken += given.ndim
            items += _chosen(given)
        else:
            taken += 1
            items.append(given)
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)
    shape: list[Any] = []
    advanced: list[tuple[int, ...]] = []
    where: list[int] = []
    axis = 0
    for item in items:
        if item is None:
            shape.append(1)
        elif item is Ellipsis:
            count = array.ndim - taken
            shape += array.shape[axis : axis + count]
            axis += count
        elif type(item) is slice:
            shape.append(len(range(*item.indices(array.shape[axis]))))
            axis += 1
        else:
            advanced.append(np.shape(item))
            where.append(len(shape))
            axis += 1
    middle = broadcast(*advanced)
    kinds = [isinstance(i, np.ndarray | int | np.integer) for i in items]
    first, last = kinds.index(True), len(kinds) - 1 - kinds[::-1].index(True)
    at = where[0] if all(kinds[first : last + 1]) else 0
    return (*shape[:at], *middle, *shape[at:]), at, len(middle)


def _chosen(mask: np.ndarray) -> list[np.ndarray]:
    """Return the indexes that a mask selects. A mask without elements is assumed to select everything."""
    if not isinstance(mask, ShapeArray):
        return list(mask.nonzero())
    ledger_of(mask).note(MASK)
    axis = np.ndarray.__new__(np.ndarray, (mask.size,), np.intp, np.zeros(1, np.intp), 0, (0,))
    return [axis] * mask.ndim


def _reshape_copies(array: np.ndarray, shape: Sequence[int], order: Any) -> bool:
    view = np.ndarray.view(array, np.ndarray)
    if _CAN_REFUSE:
        try:
            np.reshape(view, tuple(shape), order=order, copy=False)
        except ValueError:
            return True
        return False
    if order == "F" or (order == "A" and array.flags.fnc):
        view, shape = view.T, shape[::-1]
    try:
        view.shape = tuple(shape)
    except AttributeError:
        return True
    return False


#: numpy.reshape takes copy=False.
_CAN_REFUSE = np.lib.NumpyVersion(np.__version__) >= "2.1.0"
