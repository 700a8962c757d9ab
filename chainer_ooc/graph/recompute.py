"""Decide which functions run again in backward instead of moving their results, and write the recipes.

A recipe runs the function that made a saved array again, and earlier functions too if its inputs were not
kept, from arrays that are saved. It runs a copy of the node with its attributes: the graph does not change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from chainer_ooc import state
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.protocol import bytes_of_array
from chainer_ooc.swap.recipe import PRIVATE, Constant, PrivateContent, Recipe
from chainer_ooc.swap.storage import PackedArray
from chainer_ooc.wording import repr_of

__all__ = [
    "STEP",
    "Recipes",
    "expose",
    "expose_inputs",
    "install",
    "is_unwatched",
    "note_private",
    "offer_recipes",
    "recomputable",
]

#: The longest chain of functions that run again for one array.
_LONGEST = 4
#: Arrays that are not saved, such as the scales of a normalization, are copied up to this size (bytes).
_SMALL = 64 << 10
#: Larger ones, such as the filters of a convolution, are copied when an array that needs them is discarded, if they
#: are this many times smaller.
_SMALLER = 4
#: The entries of Chainer's configuration that select the code of a function.
_CONFIGURATION = ("use_cudnn", "use_ideep", "autotune")
#: The attribute with a function's :class:`_Run`; ``None`` in a copy of the function.
_RUN = "_ooc_run"
#: The module that chooses cuDNN's algorithms, if it is in use, and the attribute of a function with that of its run.
_CUDNN, _ALGORITHM = "chainer_ooc.compat.cudnn.algorithms", "_ooc_algorithm"
#: Run products again on a GPU where cuDNN calls the algorithm deterministic, or cuBLAS has one of these workspaces and
#: one stream: NVIDIA promises the same bits then. Off until they have been seen on hardware.
_TRUSTS_LIBRARIES = False
_FIXED_WORKSPACES = (":16:8", ":4096:8")
#: The attribute with a function's step, if iterations are tracked: (iteration, number).
STEP = "_ooc_step"
#: A function's attributes that belong to the graph.
_OF_THE_GRAPH = (
    *("inputs", "outputs", "_retained_output_data", "lazy_grad_sum", "_local_function_hooks"),
    *("_ooc_record", "_ooc_used", "_ooc_twice", _RUN, STEP),
)

#: Takes the leaves' arrays and computes an array.
_Expression = Callable[[Sequence[Any]], Any]
#: Takes a copy of a function that has run forward and the list of its input arrays; returns the outputs.
RerunFunction = Callable[[Any, list[Any]], Sequence[Any]]


class _Rule(NamedTuple):
    """How functions of a class run again: see :func:`recomputable`.

    Attributes:
        is_chainers: The class is Chainer's: it keeps no reference to its output, nor lets others have it.
        trusted: Each run gives the same bits, whatever threads compute them.
        crops: The output may be a part of a larger array that it has made, all bytes of which it sets.
    """

    rerun: RerunFunction
    when: Callable[[Any], bool]
    unused: Collection[str]
    costly: bool
    makes: Collection[str]
    is_chainers: bool = False
    trusted: bool = False
    crops: bool = False


_rules: dict[type, _Rule] = {}


def recomputable(
    cls: type,
    rerun: RerunFunction | None = None,
    when: Callable[[Any], bool] | None = None,
    unused: Collection[str] = (),
    costly: bool = False,
    makes: Collection[str] = (),
) -> None:
    """Let ``recompute`` run functions of class ``cls`` again instead of moving their outputs.

    Each run must give the same bits. It must do nothing but return outputs and set attributes of the
    function: no random numbers, no communication, no statistics kept elsewhere.

    Args:
        cls: A subclass of :class:`chainer.FunctionNode`.
        rerun: For a function whose ``forward`` cannot simply be called again. It takes a copy of the
            function, with the attributes that it had after ``forward``, and the list of its input arrays.
            It returns the outputs, a tuple of arrays.
        when: Takes a function that has run forward and returns whether it can be run again. Default:
            always.
        unused: Attributes that ``rerun`` does not need. The copy lacks them.
        costly: Run it again only if a plan finds that this takes less time than moving the result.
        makes: Attributes (arrays) that a run sets anew. They are not moved either.

    Raises:
        TypeError: If ``cls`` is not such a class.
    """
    import chainer

    if not (isinstance(cls, type) and issubclass(cls, chainer.FunctionNode)):
        raise TypeError(f"cls={repr_of(cls)} is not a subclass of chainer.FunctionNode")
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
        unpooling_nd,
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
        *(unpooling_2d.Unpooling2D, unpooling_nd.UnpoolingND, bn.FixedBatchNormalization),
    ):
        recomputable(cls)
    recomputable(max_pooling_nd.MaxPoolingND, makes=("indexes",))
    recomputable(lrn.LocalResponseNormalization, makes=("unit_scale", "scale"))
    for cls in (
        *(convolution_2d.Convolution2DFunction, deconvolution_2d.Deconvolution2DFunction),
        *(convolution_nd.ConvolutionND, deconvolution_nd.DeconvolutionND, linear.LinearFunction),
    ):
        recomputable(cls, _product, _is_deterministic, costly=True)
    for cls in (  # col2im adds patches up in an array of zeros, with the padding around the result
        *(unpooling_2d.Unpooling2D, unpooling_nd.UnpoolingND),
        *(deconvolution_2d.Deconvolution2DFunction, deconvolution_nd.DeconvolutionND),
    ):
        _rules[cls] = _rules[cls]._replace(crops=True)
    # Given its mask of forward, dropout draws no random numbers; cuDNN keeps no mask.
    recomputable(dropout.Dropout, when=lambda func: not func._use_cudnn)
    recomputable(
        bn.BatchNormalization,
        _batch_normalization,
        lambda func: isinstance(func._impl, bn.GeneralBatchNormalizationImpl),
        ("running_mean", "running_var", "var", "_impl"),
    )
    for cls, rule in _rules.items():
        if cls.__module__.startswith("chainer."):
            _rules[cls] = rule._replace(is_chainers=True, trusted=not rule.costly)


class Recipes(enum.Enum):
    """Which recipes :func:`offer_recipes` writes."""

    #: They tell a plan what can be computed again, from what, and may not be used.
    OUTLINED = "outlined"
    #: It is known whether what the function reads and makes is unchanged: they may be used.
    GUARDED = "guarded"
    #: Only for what the function saves, not for what is made from it.
    OF_SAVED = "of saved"


class _Content(NamedTuple):
    """The content of an array at one moment.

    Attributes:
        bytes: A :class:`~chainer_ooc.swap.recipe.PrivateContent`, or else the fingerprint of the bytes, or of the
            whole storage if the array is saved; ``None`` if nobody has taken it.
        layout: The dtype, shape, strides and offset.
    """

    bytes: Any
    layout: tuple[Any, ...]


class _Seen(NamedTuple):
    """An array at the moment when a function used it.

    Attributes:
        content: Its content.
        saved: Its stand-in, if it is saved.
        constant: A large array that is neither saved nor made by a function.
        small: A copy of a small array that is not saved.
    """

    content: _Content | None
    saved: PackedArray | None = None
    constant: Constant | None = None
    small: _Copy | None = None


@dataclasses.dataclass(eq=False)
class _Run:
    """A function's run: the contents to which all its recipes are bound.

    Attributes:
        inputs: The arrays that it read.
        made: The contents of its outputs, ``None`` if unknown.
        attributes: The attributes that a re-run needs, with :class:`_Seen` for arrays.
        configuration: The values of :data:`_CONFIGURATION`.
        guarded: Everything is known that a re-run needs; else recipes only tell what could be run again.
    """

    inputs: list[_Seen]
    made: list[_Content | None]
    attributes: dict[str, Any]
    configuration: dict[str, Any]
    guarded: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return ``None``: a copy of a function owns its arrays and has not run."""

    def __reduce__(self) -> Any:
        return type(None), ()


class _Leaves:
    """The arrays that an expression reads, the contents of the saved ones, and the steps that compute it."""

    def __init__(self) -> None:
        self.saved: list[PackedArray] = []
        self.contents: list[Any] = []
        self.conditions: list[tuple[Any, Any]] = []
        self.constants: dict[int, Constant] = {}
        self.steps: list[Any] = []
        self.costly = False
        self.trusted = self.guarded = True

    def add(self, saved: PackedArray, content: Any) -> _Leaf:
        """Add a saved array and the content that its storage had. Return the expression that reads it."""
        self.saved.append(saved)
        self.contents.append(content)
        return _Leaf(len(self.saved) - 1)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """An expression that returns one of the leaves' arrays."""

    place: int

    def __call__(self, arrays: Sequence[Any]) -> Any:
        return arrays[self.place]


def offer_recipes(func: Any, inputs: Sequence[Any], outputs: Sequence[Any], how: Recipes) -> None:
    """Give recipes to the arrays that a function has just saved: inputs, outputs and attributes.

    Call this for each function as soon as its arrays are saved, before code can write to them. A recipe is
    bound to their present contents and is used only while those still hold.

    Args:
        func: The function.
        inputs: The variables or arrays that it read.
        outputs: The variables that it returned.
        how: Which recipes.
    """
    guarded = how is Recipes.GUARDED
    rule = None if how is Recipes.OF_SAVED else _rules.get(type(func))
    if rule is not None and rule.when(func) and is_unwatched(func):
        most = max((_nbytes(y) for y in outputs), default=0) // _SMALLER
        seen = [
            _see(node, _array_of(x), most, guarded)
            for node, x in zip(func.inputs, inputs, strict=True)
        ]
        run = _note_run(func, rule, seen, outputs, guarded)
        if run is not None:
            func.__dict__[_RUN] = run
            for name in rule.makes:
                leaves, value = _Leaves(), func.__dict__.get(name)
                if type(value) is PackedArray:
                    made = _content_of(value, guarded)
                    _offer(value, made, _attribute(func, name, leaves), leaves, func)
            for index in func._output_indexes_to_retain or ():
                node = func.outputs[index]()
                if node is not None:
                    _offer_node(node)
    for index in func._input_indexes_to_retain or ():
        _offer_node(func.inputs[index])


def discards_all(settings: Settings) -> bool:
    """Return whether all that can be made again is discarded, without a plan."""
    return settings.discard_all and settings.recompute != "never"


def note_private(func: Any, inputs: Sequence[Any], outputs: Sequence[Any], fresh: bool) -> None:
    """Note which outputs of a function that has just run forward nobody but Chainer's functions can have had.

    They are what functions known to :func:`install` have made, and views of such arrays by any function.

    Args:
        func: The function.
        inputs: Its inputs.
        outputs: Its outputs.
        fresh: It matters who gets new arrays, not only views; the function is Chainer's, and no hook of the user's has
            had its inputs.
    """
    rule = _rules.get(type(func)) if fresh else None
    fresh = rule is not None and rule.is_chainers
    given = [_array_of(x) for x in inputs]
    owners = None
    for y in outputs:
        array = y._data[0]
        if array.base is None and not _is_one_of(array, given):
            if fresh and (manager := state.manager_for(array)) is not None:
                y._node.__dict__[PRIVATE] = PrivateContent(manager.device, array)
            continue
        if owners is None:  # not all functions need all inputs
            owners = [None if one is None else _owner_of(one) for one in given]
        owner = _owner_of(array)
        pairs = zip(owners, inputs, strict=True)
        shared = [getattr(x, "_node", None) for one, x in pairs if one is owner]
        if shared:
            for node in shared:
                if node is not None and PRIVATE in node.__dict__:
                    y._node.__dict__[PRIVATE] = node.__dict__[PRIVATE]
        elif fresh and (manager := state.manager_for(array)) is not None:
            y._node.__dict__[PRIVATE] = PrivateContent(manager.device, array)


def are_private(inputs: Sequence[Any]) -> bool:
    """Return whether nobody but Chainer's functions has had the array of one of these variables."""
    for x in inputs:
        node = getattr(x, "_node", None)
        if node is not None and PRIVATE in node.__dict__:
            return True
    return False


def expose(node: Any) -> None:
    """Note that other code than Chainer's functions gets a node's array."""
    private = node.__dict__.get(PRIVATE)
    if private is not None and not private.is_exposed:
        data = node.__dict__.get("_data")
        if type(data) is PackedArray:
            data.storage.manager.expose(private)
        else:
            private.expose()


def expose_inputs(inputs: Sequence[Any]) -> None:
    """Note that a function that is not Chainer's, or a hook, gets these variables' arrays."""
    for x in inputs:
        node = getattr(x, "_node", None)
        if node is not None:
            expose(node)


def _array_of(x: Any) -> Any:
    """Return the array of a variable, or an array itself, without exposing it as the public properties do."""
    return getattr(x, "_data", (x,))[0]


def _is_one_of(array: Any, arrays: list[Any]) -> bool:
    for one in arrays:  # noqa: SIM110  no generator: every function passes here
        if one is array:
            return True
    return False


def _owner_of(array: Any) -> Any:
    """Return what owns an array's memory."""
    while type(base := array.base) is type(array):
        array = base
    return array if base is None else base


def _offer_node(node: Any) -> None:
    """Give a node's array a recipe, if the node's function has made it and it still has the layout it had then."""
    saved = node.__dict__.get("_data")
    if type(saved) is PackedArray and saved.storage.recipe is None:
        made = _made(node)
        if made is not None and made.layout == _layout_of(saved):
            if type(made.bytes) is PrivateContent:
                _take_private(made.bytes, saved, guarded=False)
            leaves = _Leaves()
            func = node._creator_node
            crops = _rules[type(func)].crops
            _offer(saved, made, _expression_of(node, leaves, _LONGEST), leaves, func, crops)


def _offer(
    saved: PackedArray,
    made: _Content | None,
    expression: _Expression | None,
    leaves: _Leaves,
    func: Any,
    crops: bool = False,
) -> None:
    """Give a saved array the recipe that computes ``expression``, if the array can have one.

    Args:
        saved: The array.
        made: Its content when its function made it.
        expression: Computes it.
        leaves: The arrays that the expression reads.
        func: The function that made the array.
        crops: The array may be a part of its storage, if the expression gives such a part, too.
    """
    if expression is None or made is None:
        return
    # The result is a view of an input: nothing to compute.
    if any(leaf.storage is saved.storage for leaf in leaves.saved):
        return
    constants = tuple(leaves.constants.values())
    if sum(one.array.nbytes for one in constants) * _SMALLER > saved.storage.nbytes:
        return
    if leaves.saved or constants:
        recipe = Recipe(
            inputs=tuple(leaves.saved),
            run=_quiet(expression),
            layout=saved.layout,
            content=made.bytes if leaves.guarded else None,
            input_contents=tuple(leaves.contents),
            functions=tuple(leaves.steps),
            constants=constants,
            costly=leaves.costly,
            trusted=leaves.trusted,
            conditions=tuple(leaves.conditions),
            crops=crops,
            maker=type(func).__name__,
        )
        saved.storage.manager.give_recipe(saved, recipe)


def _note_run(
    func: Any,
    rule: _Rule,
    inputs: list[_Seen | None],
    outputs: Sequence[Any],
    guarded: bool,
) -> _Run | None:
    """Return the record of a function's run; ``None`` if it is not enough to run the function again."""
    import chainer

    attributes: dict[str, Any] = {}
    for name, value in func.__dict__.items():
        if name in _OF_THE_GRAPH or name in rule.unused or name in rule.makes:
            continue
        if type(value) is PackedArray or type(value) in state.array_types():
            value = _see_attribute(value, guarded)
            if value is None:
                return None
        elif isinstance(value, tuple | list):
            if any(type(item) is PackedArray or _is_array(item) for item in value):
                return None
            value = value[:]
        elif _is_array(value):
            return None
        attributes[name] = value
    known = [one for one in inputs if one is not None]
    if len(known) < len(inputs):
        return None
    config = chainer.config
    made = [_made_now(y, guarded) for y in outputs]
    configuration = {name: getattr(config, name) for name in _CONFIGURATION}
    return _Run(known, made, attributes, configuration, guarded)


def _is_array(value: Any) -> bool:
    """Return whether a value is an array of any kind. Scalars are not: no code can write to them."""
    return isinstance(getattr(value, "nbytes", None), int) and not isinstance(value, np.generic)


def _made_now(y: Any, guarded: bool) -> _Content | None:
    """Return the present content of an output."""
    saved, array = y.node.__dict__.get("_data"), _array_of(y)
    is_saved = type(saved) is PackedArray and saved.alive() is array
    return _content_of(saved if is_saved else array, guarded, y.node)


def _made(node: Any) -> _Content | None:
    """Return the content that a node's array had when its function made it; ``None`` if unknown."""
    func = node._creator_node
    run = None if func is None else func.__dict__.get(_RUN)
    return None if run is None else run.made[_index_of(node)]


def _index_of(node: Any) -> int:
    """Return a node's index among the outputs of its function."""
    return next(i for i, output in enumerate(node._creator_node.outputs) if output() is node)


def _see(node: Any, array: Any, most: int, guarded: bool) -> _Seen | None:
    """Return the present state of a function's input, ``None`` if no recipe can use it.

    Args:
        node: The input's node.
        array: The array.
        most: The largest constant to copy (bytes).
        guarded: Take a fingerprint of it.
    """
    saved = node.__dict__.get("_data")
    if type(saved) is PackedArray and saved.alive() is array:
        content = _content_of(saved, guarded, node)
        return None if content is None else _Seen(content, saved)
    if array is None:
        return None
    if _made(node) is None:
        if array.nbytes <= _SMALL:
            return _small(array, guarded)
        if node._creator_node is None and array.nbytes <= most:
            manager = state.manager_for(array)
            location = None if manager is None else manager.device.locate(array)
            if manager is not None and location is not None and array.flags.c_contiguous:
                return _Seen(None, constant=Constant(manager.device, array, guarded))
        return None
    content = _content_of(array, guarded, node)
    return None if content is None else _Seen(content)


def _see_attribute(value: Any, guarded: bool) -> _Seen | None:
    """Return the present state of an array attribute, ``None`` if it is too large to copy."""
    if type(value) is PackedArray:
        storage = value.storage
        if storage.content is None and not (storage.exposed or storage.referenced_externally):
            PrivateContent(storage.manager.device).lies_in(storage)  # only the function has it
        private = storage.content
        if private is not None and not private.is_exposed:
            private.is_needed |= guarded
            return _Seen(_Content(private, _layout_of(value)), value)
        content = _content_of(value, guarded)
        return None if content is None else _Seen(content, value)
    return _small(value, guarded) if value.nbytes <= _SMALL else None


def _small(array: Any, guarded: bool) -> _Seen | None:
    """Return the present state of a small array that is not saved: a copy, as the original may change."""
    content = _content_of(array, guarded=False)
    if content is None:
        return None
    return _Seen(content, small=_Copy(array.copy() if guarded else None))


def _content_of(data: Any, guarded: bool, node: Any = None) -> _Content | None:
    """Return the present content of an array, or of the array behind a stand-in; ``None`` if it cannot be known.

    Args:
        data: The array, or its stand-in.
        guarded: Find out its bytes.
        node: The node whose array it is, if any.
    """
    private = None if node is None else node.__dict__.get(PRIVATE)
    if type(data) is PackedArray:
        if private is not None and _take_private(private, data, guarded):
            return _Content(private, _layout_of(data))
        fingerprint = data.storage.manager.fingerprint(data) if guarded else None
        return _Content(fingerprint, _layout_of(data))
    manager = state.manager_for(data)
    found = None if manager is None else bytes_of_array(data, manager.device.locate)
    if manager is None or found is None:
        return None
    owner, start, nbytes, offset = found
    layout = data.dtype, data.shape, data.strides, offset
    if private is not None and private.is_of(data) and not private.is_exposed:
        private.is_needed |= guarded
        return _Content(private, layout)
    return _Content(manager.device.fingerprint(owner, start, nbytes) if guarded else None, layout)


def _take_private(private: PrivateContent, saved: PackedArray, guarded: bool) -> bool:
    """Return whether a saved array still has its private content; the storage knows that from now on."""
    storage = saved.storage
    if storage.content is None and private.is_of(saved.alive()):
        if storage.exposed:  # by another way than this node
            private.expose()
        private.lies_in(storage)
    if storage.content is not private or private.is_exposed:
        return False
    private.is_needed |= guarded
    return True


def _layout_of(saved: PackedArray) -> tuple[Any, ...]:
    layout = saved.layout
    return layout.dtype, layout.shape, layout.strides, layout.offset


def _nbytes(y: Any) -> int:
    return math.prod(y.shape) * y.dtype.itemsize


def _expression_of(node: Any, leaves: _Leaves, longest: int) -> _Expression | None:
    """Return an expression for a node's array, and add the arrays that it reads to ``leaves``."""
    rerun = _rerun_of(node._creator_node, leaves, longest)
    if rerun is None:
        return None
    index = _index_of(node)
    return lambda arrays: rerun(arrays)[1][index]


def _attribute(func: Any, name: str, leaves: _Leaves) -> _Expression | None:
    """Return an expression for an attribute of a function."""
    rerun = _rerun_of(func, leaves, _LONGEST)
    return None if rerun is None else lambda arrays: rerun(arrays)[0].__dict__[name]


def _rerun_of(
    func: Any, leaves: _Leaves, longest: int
) -> Callable[[Sequence[Any]], tuple[Any, Sequence[Any]]] | None:
    """Return an expression that runs a copy of a function, from the arrays of ``leaves``: copy and outputs."""
    ran: _Run | None = func.__dict__.get(_RUN)
    if ran is None or longest == 0:
        return None
    rule = _rules[type(func)]
    inputs = []
    for node, seen in zip(func.inputs, ran.inputs, strict=True):
        read = _source(node, seen, leaves, longest - 1)
        if read is None:
            return None
        inputs.append(read)
    attributes = {}
    for name, value in ran.attributes.items():
        if type(value) is _Seen:
            value = _kept(value, None, leaves)
            if value is None:
                return None
        attributes[name] = value
    leaves.steps.append(func.__dict__.get(STEP))
    leaves.costly |= rule.costly
    leaves.guarded &= ran.guarded
    # cuDNN says so of the algorithms that are run again; BLAS may sum in another order with other threads.
    leaves.trusted &= rule.trusted or (rule.is_chainers and not _on_cpu())
    cls, configuration = type(func), ran.configuration

    def run(arrays: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        again = object.__new__(cls)
        for name, value in attributes.items():
            again.__dict__[name] = value(arrays) if isinstance(value, _Leaf | _Copy) else value
        sources = [read(arrays) for read in inputs]
        with _configured(configuration):
            return again, rule.rerun(again, sources)

    return run


@dataclasses.dataclass(frozen=True)
class _Copy:
    """A copy of a small array."""

    array: Any

    def __call__(self, arrays: Sequence[Any]) -> Any:
        return self.array


def _source(node: Any, seen: _Seen, leaves: _Leaves, longest: int) -> _Expression | None:
    """Return an expression for a function's input as the function read it; ``None`` if that is lost."""
    data = _data_of(node)
    kept = seen.saved is not None or seen.small is not None
    if data is None and not kept and node._creator_node is not None:
        made = _made(node)
        if made is None or seen.content is None or made.layout != seen.content.layout:
            return None
        leaves.conditions.append((made.bytes, seen.content.bytes))
        return _expression_of(node, leaves, longest)
    return _kept(seen, data, leaves)


def _kept(seen: _Seen, data: Any, leaves: _Leaves) -> _Expression | None:
    """Return an expression for an array as a function saw it: from its storage, a constant, or a copy made then.

    Args:
        seen: The array when the function read it.
        data: The array now, or its stand-in; ``None`` if the array is gone.
        leaves: The saved arrays that are needed are added here.
    """
    if seen.constant is not None:
        constant = leaves.constants.setdefault(id(seen.constant.array), seen.constant)
        return lambda arrays: constant.array
    if seen.small is not None:
        return seen.small
    saved = seen.saved
    assert seen.content is not None
    if saved is None:
        if data is None:
            return None
        is_saved = type(data) is PackedArray  # meanwhile
        if not is_saved and data.nbytes > _SMALL:
            return None
        guarded = seen.content.bytes is not None
        now = _content_of(data, guarded and not is_saved)
        if now is None or now.layout != seen.content.layout:
            return None
        if not is_saved:
            leaves.conditions.append((seen.content.bytes, now.bytes))
            return _Copy(data.copy())
        saved = data
    return leaves.add(saved, seen.content.bytes)


def _data_of(node: Any) -> Any:
    """Return the array of a function's input, or its stand-in; ``None`` if the array is gone."""
    data = node.__dict__.get("_data")
    if data is None and node._creator_node is None:
        variable = node.get_variable_or_none()
        data = None if variable is None else _array_of(variable)
    return data


def is_unwatched(func: Any) -> bool:
    """Return whether no user's hook got the inputs after their use: a hook may write to them."""
    import chainer

    everywhere, own = chainer.get_function_hooks(), func._local_function_hooks
    if not (everywhere or own):
        return True
    hooks = [*everywhere.values(), *(own or {}).values()]
    return all(type(hook).__module__.startswith(("chainer.", "chainer_ooc.")) for hook in hooks)


@contextlib.contextmanager
def _configured(configuration: dict[str, Any]) -> Iterator[None]:
    """Set Chainer's configuration to the values under which a function ran."""
    import chainer

    with contextlib.ExitStack() as stack:
        for name, value in configuration.items():
            if getattr(chainer.config, name) != value:
                stack.enter_context(chainer.using_config(name, value))
        yield


def _quiet(expression: _Expression) -> _Expression:
    """Return the expression without NumPy's errors and warnings: the user got them in the first run."""

    def run(arrays: Sequence[Any]) -> Any:
        with np.errstate(all="ignore"):
            try:
                return expression(arrays)
            except Warning:  # the function's own warning, which the user's filters make an error
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return expression(arrays)

    return run


def _on_cpu() -> bool:
    return state.process.gpus is None


def _is_deterministic(func: Any) -> bool:
    """Return whether a product gives the same bits each time. On a GPU it does on request.

    cuDNN's runs again with the algorithm of the first run, whatever memory there is then.
    """
    import chainer
    from chainer.functions.connection import linear

    if _on_cpu():
        return True
    output = func.outputs[0]()
    variable = None if output is None else output.get_variable_or_none()
    array = None if variable is None else variable._data[0]
    algorithms = sys.modules.get(_CUDNN)
    algorithm = None if algorithms is None else algorithms.that_made(array)
    func.__dict__[_ALGORITHM] = algorithm
    if chainer.config.cudnn_deterministic:
        return True
    if not _TRUSTS_LIBRARIES:
        return False
    if type(func) is linear.LinearFunction:
        manager = state.manager_for(array)
        on_one_stream = manager is not None and manager.device.on_one_stream
        return on_one_stream and os.environ.get("CUBLAS_WORKSPACE_CONFIG") in _FIXED_WORKSPACES
    return algorithm is not None and algorithm.deterministic


def _product(func: Any, inputs: list[Any]) -> Sequence[Any]:
    algorithm = func.__dict__.get(_ALGORITHM)
    if algorithm is None:
        return _forward(func, inputs)
    with sys.modules[_CUDNN].pinned(algorithm):
        return _forward(func, inputs)


def _forward(func: Any, inputs: list[Any]) -> Sequence[Any]:
    outputs: Sequence[Any] = func.forward(tuple(inputs))
    return outputs


def _batch_normalization(func: Any, inputs: list[Any]) -> Sequence[Any]:
    """Normalize with the kept statistics: forward would update the running ones once more."""
    from chainer import backend
    from chainer.functions.normalization import batch_normalization as bn

    x, gamma, beta = inputs
    dtype, place = np.promote_types(x.dtype, gamma.dtype), func.expander
    scale, shift = (array[place].astype(dtype, copy=False) for array in (gamma, beta))
    xp = backend.get_array_module(x)
    return (bn._apply_bn_fwd(xp, x, func.mean[place], func.inv_std[place], scale, shift),)
