"""The inputs of a step without data, for any batch size and image size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from chainer_ooc.estimating.errors import EstimateError
from chainer_ooc.estimating.ledger import active_ledger
from chainer_ooc.estimating.shape_array import memory_of, new

__all__ = ["Inputs", "images", "parse"]

_FORMS = "give (insize, batchsize), or the model's arguments: arrays, (shape, dtype) pairs, or lists of them"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments for a model.

    Attributes:
        arguments: Arrays, (shape, dtype) pairs, lists and tuples of them, or other values.
        batchsize: The first dimension that all arrays share, ``None`` if there is none.
        insize: The height and width of images (batch, channels, height, width), ``None`` if there are none.
    """

    arguments: tuple[Any, ...]
    batchsize: int | None
    insize: int | None

    def make(
        self,
        batchsize: int | None = None,
        insize: int | None = None,
        values: bool = False,
    ) -> Callable[[], list[Any]]:
        """Return a function that makes the arguments, in another size if given.

        Args:
            batchsize: The first dimension of arrays that share one.
            insize: The height and width of images.
            values: Float arrays, too, have the values that were given.
        """
        return lambda: [
            self._make(argument, batchsize, insize, values) for argument in self.arguments
        ]

    @property
    def has_values(self) -> bool:
        """Whether float arrays with values were given."""

        def has(argument: Any) -> bool:
            if type(argument) is Spec:
                return argument.dtype.kind == "f" and argument.values is not None
            return type(argument) in (list, tuple) and any(map(has, argument))

        return has(self.arguments)

    def _make(self, argument: Any, batchsize: int | None, insize: int | None, keep: bool) -> Any:
        if type(argument) is Spec:
            shape = list(argument.shape)
            if insize is not None and self.insize and shape[-2:] == [self.insize] * 2:
                shape[-2:] = [insize, insize]
            if batchsize is not None and self.batchsize:
                shape[0] = batchsize
            if argument.values is not None and (keep or argument.dtype.kind != "f"):
                values = argument.values
                return values.copy() if tuple(shape) == values.shape else np.resize(values, shape)
            ledger = active_ledger()
            if argument.dtype.kind == "f" and ledger is not None:
                return new(shape, argument.dtype, ledger)
            return np.zeros(shape, argument.dtype)
        if type(argument) in (list, tuple):
            return type(argument)(self._make(item, None, None, keep) for item in argument)
        return argument


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """The shape and dtype of an array, and its values if there are any."""

    shape: tuple[int, ...]
    dtype: np.dtype
    values: np.ndarray | None = None


def images(insize: int, batchsize: int) -> Inputs:
    """Return images (batchsize, 3, insize, insize), float32, and labels (batchsize,), int32."""
    for name, value in (("insize", insize), ("batchsize", batchsize)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise EstimateError(f"{name}={value!r} is not allowed; give a whole number >= 1")
    x = Spec((batchsize, 3, insize, insize), np.dtype(np.float32))
    return Inputs((x, Spec((batchsize,), np.dtype(np.int32))), batchsize, insize)


def parse(inputs: Any) -> Inputs:
    """Return the inputs for what a user gave.

    Raises:
        EstimateError: If it has none of the known forms.
    """
    if isinstance(inputs, Inputs):
        return inputs
    if isinstance(inputs, np.ndarray) or hasattr(inputs, "array"):
        inputs = (inputs,)
    if not isinstance(inputs, Sequence) or isinstance(inputs, str) or not inputs:
        raise EstimateError(f"inputs={inputs!r} is not allowed; {_FORMS}")
    if len(inputs) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in inputs):
        return images(*inputs)
    if _is_pair(inputs):
        inputs = (inputs,)
    arguments = tuple(_spec(item) for item in inputs)
    arrays = [a for a in arguments if type(a) is Spec and a.shape]
    nested = any(type(a) in (list, tuple) for a in arguments)
    sizes = {a.shape[0] for a in arrays}
    batchsize = sizes.pop() if len(sizes) == 1 and not nested else None
    squares = {a.shape[2] for a in arrays if len(a.shape) == 4 and a.shape[2] == a.shape[3]}
    insize = squares.pop() if len(squares) == 1 else None
    return Inputs(arguments, batchsize, insize)


def _is_pair(item: Any) -> bool:
    return (
        type(item) is tuple
        and len(item) == 2
        and isinstance(item[0], tuple)
        and all(isinstance(n, int) for n in item[0])
        and isinstance(item[1], str | type | np.dtype)
    )


def _spec(item: Any) -> Any:
    if _is_pair(item):
        return Spec(item[0], np.dtype(item[1]))
    array = getattr(item, "array", item)
    if isinstance(array, np.ndarray):
        return Spec(array.shape, array.dtype, array if memory_of(array) is None else None)
    if type(item) in (list, tuple):
        return type(item)(_spec(one) for one in item)
    if hasattr(array, "shape"):
        raise EstimateError(
            f"an input is of type {type(array).__name__}, not a NumPy array; {_FORMS}"
        )
    return item
