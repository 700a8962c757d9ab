"""What can be run again instead of moved: functions that give the same bits, and how.

A saved array that another function made is made again by running that function, and if its inputs were not
kept those before it, from arrays that are saved. What runs is a copy of the node with its attributes: nothing
of the graph changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from chainer_ooc import mode
from chainer_ooc.swap.recipe import Constant, Recipe
from chainer_ooc.swap.storage import Saved

__all__ = ["STEP", "install", "offer_recipes", "recomputable"]

#: Functions in a row that are run again for one array.
_LONGEST = 4
#: Arrays that are not saved, such as the scales of a normalization, are copied up to this size (bytes).
_SMALL = 64 << 10
#: Larger ones, such as the filters of a convolution, are copied when what needs them is given up, if they are this many
#: times smaller.
_SMALLER = 4
#: What a node has that belongs to the graph.
_SEEN = "_ooc_seen"
#: The number of a function's step in its iteration, where iterations are followed: (iteration, number).
STEP = "_ooc_step"
_OF_THE_GRAPH = (
    *("inputs", "outputs", "_retained_output_data", "lazy_grad_sum"),
    *("_ooc_record", _SEEN, STEP),
)

#: Computes an array from those of the leaves.
_Expression = Callable[[Sequence[Any]], Any]
#: Given a copy of a function that has been applied and the list of its input arrays, returns its outputs.
Rerun = Callable[[Any, list[Any]], Sequence[Any]]


class _Rule(NamedTuple):
    rerun: Rerun
    when: Callable[[Any], bool]
    unused: Collection[str]
    costly: bool
    makes: Collection[str]


_rules: dict[type, _Rule] = {}


def recomputable(
    cls: type,
    rerun: Rerun | None = None,
    when: Callable[[Any], bool] | None = None,
    unused: Collection[str] = (),
    costly: bool = False,
    makes: Collection[str] = (),
) -> None:
    """Let ``recompute`` run functions of class ``cls`` again instead of moving their outputs.

    That must give the same bits each time, and do nothing but return outputs and set attributes of the function: no
    random numbers, no communication, no statistics kept elsewhere.

    Args:
        cls: A subclass of :class:`chainer.FunctionNode`.
        rerun: For a function whose ``forward`` cannot just be called again. It is given a copy of the function, with
            the attributes that it had after ``forward``, and the list of its input arrays, and returns its outputs, a
            tuple of arrays.
        when: Tells of a function that has been applied whether it can be run again. Default: always.
        unused: Attributes that ``rerun`` does not need, and will not find.
        costly: Run it again only where a plan finds that this takes less time than to move what it made.
        makes: Attributes, arrays, that running it sets anew: they are not moved either.

    Raises:
        TypeError: If ``cls`` is not such a class.
    """
    import chainer

    if not (isinstance(cls, type) and issubclass(cls, chainer.FunctionNode)):
        raise TypeError(f"cls={cls!r} is not a subclass of chainer.FunctionNode")
    _rules[cls] = _Rule(rerun or _forward, when or (lambda func: True), unused, costly, makes)


def install() -> None:
    """Register Chainer's own functions."""
    from chainer.functions.activation import (
        clipped_relu,
        elu,
        leaky_relu,
        log_softmax,
        relu,
        sigmoid,
        softmax,
        tanh,
    )
    from chainer.functions.array import cast, concat, expand_dims, reshape, squeeze, transpose
    from chainer.functions.connection import (
        convolution_2d,
        convolution_nd,
        deconvolution_2d,
        deconvolution_nd,
        linear,
    )
    from chainer.functions.math import basic_math, square
    from chainer.functions.noise import dropout
    from chainer.functions.normalization import batch_normalization as bn
    from chainer.functions.normalization import local_response_normalization as lrn
    from chainer.functions.pooling import (
        average_pooling_2d,
        average_pooling_nd,
        max_pooling_nd,
        unpooling_2d,
    )
    from chainer.functions.rnn import lstm

    for cls in (
        *(relu.ReLU, clipped_relu.ClippedReLU, leaky_relu.LeakyReLU, elu.ELU),
        *(sigmoid.Sigmoid, tanh.Tanh, square.Square, lstm.LSTM),
        *(softmax.Softmax, log_softmax.LogSoftmax),
        *(basic_math.Add, basic_math.AddConstant, basic_math.MultiAdd, basic_math.Sub),
        *(basic_math.Mul, basic_math.MulConstant, basic_math.Neg),
        *(cast.Cast, concat.Concat, expand_dims.ExpandDims, reshape.Reshape),
        *(squeeze.Squeeze, transpose.Transpose),
        *(average_pooling_nd.AveragePoolingND, average_pooling_2d.AveragePooling2D),
        *(unpooling_2d.Unpooling2D, bn.FixedBatchNormalization),
    ):
        recomputable(cls)
    recomputable(max_pooling_nd.MaxPoolingND, makes=("indexes",))
    recomputable(lrn.LocalResponseNormalization, makes=("unit_scale", "scale"))
    for cls in (
        *(convolution_2d.Convolution2DFunction, deconvolution_2d.Deconvolution2DFunction),
        *(convolution_nd.ConvolutionND, deconvolution_nd.DeconvolutionND, linear.LinearFunction),
    ):
        recomputable(cls, when=_is_deterministic, costly=True)
    # With its mask, which it has after forward, dropout draws no random numbers; cuDNN keeps no mask.
    recomputable(dropout.Dropout, when=lambda func: not func._use_cudnn)
    recomputable(
        bn.BatchNormalization,
        _batch_normalization,
        lambda func: isinstance(func._impl, bn.GeneralBatchNormalizationImpl),
        ("running_mean", "running_var", "var", "_impl"),
    )


class _Leaves:
    """The arrays from which something is made again, checksums of the saved ones, and the steps that do it."""

    def __init__(self) -> None:
        self.saved: list[Saved] = []
        self.checksums: list[int] = []
        self.constants: dict[int, Constant] = {}
        self.steps: list[Any] = []
        self.costly = False

    def add(self, saved: Saved, checksum: Any) -> _Leaf | None:
        """Return what gives the array of ``saved``, ``None`` if its content at the time is not known."""
        if type(checksum) is not int:
            return None
        self.saved.append(saved)
        self.checksums.append(checksum)
        return _Leaf(len(self.saved) - 1)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """The array at a place among those of the leaves."""

    place: int

    def __call__(self, arrays: Sequence[Any]) -> Any:
        return arrays[self.place]


def offer_recipes(func: Any) -> None:
    """Give recipes to what a function has just saved: its inputs, which others made, outputs and attributes.

    To be called for each function when it has been applied, before anybody can write to what it has used.
    """
    rule = _rules.get(type(func))
    if rule is not None:
        func.__dict__[_SEEN] = _look(func)
        for name in rule.makes:
            leaves = _Leaves()
            _offer(func.__dict__.get(name), _attribute(func, name, leaves), leaves)
    nodes = [func.inputs[index] for index in func._input_indexes_to_retain or ()]
    nodes += [func.outputs[index]() for index in func._output_indexes_to_retain or ()]
    for node in nodes:
        saved = None if node is None else node.__dict__.get("_data")
        if type(saved) is Saved and saved.storage.recipe is None:
            leaves = _Leaves()
            _offer(saved, _expression_of(node, leaves, _LONGEST), leaves)


def _offer(saved: Any, expression: _Expression | None, leaves: _Leaves) -> None:
    """Give a saved array the recipe that computes ``expression`` from ``leaves``, if it can have one."""
    if type(saved) is not Saved or expression is None:
        return
    # A view is not made from what it is a view of.
    if any(leaf.storage is saved.storage for leaf in leaves.saved):
        return
    manager = saved.storage.manager
    checksum = manager.look_at(saved)
    constants = tuple(leaves.constants.values())
    if sum(one.array.nbytes for one in constants) * _SMALLER > saved.storage.nbytes:
        return
    if checksum is not None and (leaves.saved or constants):
        recipe = Recipe(
            inputs=tuple(leaves.saved),
            run=_as_configured_now(expression),
            layout=saved.layout,
            checksum=checksum,
            input_checksums=tuple(leaves.checksums),
            functions=tuple(leaves.steps),
            constants=constants,
            costly=leaves.costly,
        )
        manager.give_recipe(saved, recipe)


def _look(func: Any) -> dict[Any, int | Constant | None]:
    """Return the checksums of the saved arrays that a function has used: inputs by index, attributes by name.

    For large inputs that are not saved, and have been made by no function, it is their :class:`Constant`.
    """
    used = {index: _data_of(node) for index, node in enumerate(func.inputs)}
    seen: dict[Any, int | Constant | None] = {
        key: value.storage.manager.look_at(value)
        for key, value in (*used.items(), *func.__dict__.items())
        if type(value) is Saved
    }
    most = max((_nbytes(node) for ref in func.outputs if (node := ref())), default=0) // _SMALLER
    for index, array in used.items():
        is_leaf = type(array) is not Saved and func.inputs[index]._creator_node is None
        if is_leaf and array is not None and _SMALL < array.nbytes <= most:
            manager = mode.manager_for(array)
            location = None if manager is None else manager.device.locate(array)
            if manager is not None and location is not None and array.flags.c_contiguous:
                seen[index] = Constant(manager.device, array)
    return seen


def _data_of(node: Any) -> Any:
    """Return the array of an input of a function, or what stands in for it; ``None`` if nobody has it."""
    data = node.__dict__.get("_data")
    if data is None and node._creator_node is None:
        variable = node.get_variable_or_none()
        data = None if variable is None else variable.array
    return data


def _nbytes(node: Any) -> int:
    return math.prod(node.shape) * node.dtype.itemsize


def _expression_of(node: Any, leaves: _Leaves, longest: int) -> _Expression | None:
    """Return what computes the array of a node from those of ``leaves``, which it adds to."""
    func = node._creator_node
    rerun = _rerun_of(func, leaves, longest)
    if rerun is None:
        return None
    index = next(i for i, output in enumerate(func.outputs) if output() is node)
    return lambda arrays: rerun(arrays)[1][index]


def _attribute(func: Any, name: str, leaves: _Leaves) -> _Expression | None:
    """Return what computes an attribute of a function."""
    rerun = _rerun_of(func, leaves, _LONGEST)
    return None if rerun is None else lambda arrays: rerun(arrays)[0].__dict__[name]


def _rerun_of(
    func: Any, leaves: _Leaves, longest: int
) -> Callable[[Sequence[Any]], tuple[Any, Sequence[Any]]] | None:
    """Return what runs a copy of a function again, from the arrays of ``leaves``: the copy, and its outputs."""
    rule = _rules.get(type(func))
    seen = None if rule is None else func.__dict__.get(_SEEN)
    if rule is None or seen is None or longest == 0 or not rule.when(func):
        return None
    inputs = []
    for position, source in enumerate(func.inputs):
        read = _source(source, seen.get(position), leaves, longest - 1)
        if read is None:
            return None
        inputs.append(read)
    attributes = _attributes(func, {*rule.unused, *rule.makes}, seen, leaves)
    if attributes is None:
        return None
    leaves.steps.append(func.__dict__.get(STEP))
    leaves.costly |= rule.costly
    cls = type(func)

    def run(arrays: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        again = object.__new__(cls)
        for name, value in attributes.items():
            again.__dict__[name] = value(arrays) if type(value) is _Leaf else value
        return again, rule.rerun(again, [read(arrays) for read in inputs])

    return run


def _source(node: Any, seen: Any, leaves: _Leaves, longest: int) -> _Expression | None:
    """Return what gives an input: a saved array, a constant, or what is computed itself."""
    data = _data_of(node)
    if type(data) is Saved:
        return leaves.add(data, seen)
    if data is None:
        return None if node._creator_node is None else _expression_of(node, leaves, longest)
    if data.nbytes <= _SMALL:
        small = data.copy()
        return lambda arrays: small
    if type(seen) is not Constant:
        return None
    constant = leaves.constants.setdefault(id(seen.array), seen)
    return lambda arrays: constant.array


def _attributes(
    func: Any, unused: Collection[str], seen: dict[Any, Any], leaves: _Leaves
) -> dict[str, Any] | None:
    """Return the attributes of a function, with leaves for what is saved of them; ``None`` if that cannot be."""
    attributes = {}
    for name, value in func.__dict__.items():
        if name in _OF_THE_GRAPH or name in unused:
            continue
        if type(value) is Saved:
            value = leaves.add(value, seen.get(name))
            if value is None:
                return None
        elif isinstance(value, tuple | list) and any(type(item) is Saved for item in value):
            return None
        elif isinstance(getattr(value, "nbytes", None), int):  # an array, or a scalar
            if value.nbytes > _SMALL:
                return None
            value = value.copy()
        attributes[name] = value
    return attributes


def _as_configured_now(expression: _Expression) -> _Expression:
    """Return what computes an expression with the configuration of Chainer that is in force now."""
    import chainer

    config = chainer.config
    now = {name: getattr(config, name) for name in ("use_cudnn", "use_ideep", "autotune")}

    def run(arrays: Sequence[Any]) -> Any:
        with contextlib.ExitStack() as stack:
            for name, value in now.items():
                if getattr(config, name) != value:
                    stack.enter_context(chainer.using_config(name, value))
            return expression(arrays)

    return run


def _is_deterministic(func: Any) -> bool:
    """Tell whether a product gives the same bits each time: cuDNN's does where it is asked to."""
    import chainer

    on_cpu = mode.array_types() == {np.ndarray}
    return on_cpu or bool(chainer.config.cudnn_deterministic)


def _forward(func: Any, inputs: list[Any]) -> Sequence[Any]:
    outputs: Sequence[Any] = func.forward(tuple(inputs))
    return outputs


def _batch_normalization(func: Any, inputs: list[Any]) -> Sequence[Any]:
    """Normalize with the statistics that are there: forward would update the running ones once more."""
    from chainer import backend
    from chainer.functions.normalization import batch_normalization as bn

    x, gamma, beta = inputs
    dtype, place = np.promote_types(x.dtype, gamma.dtype), func.expander
    scale, shift = (array[place].astype(dtype, copy=False) for array in (gamma, beta))
    xp = backend.get_array_module(x)
    return (bn._apply_bn_fwd(xp, x, func.mean[place], func.inv_std[place], scale, shift),)
