"""Run a training step without data: the model's and Chainer's code runs, NumPy computes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from chainer_ooc import runtime
from chainer_ooc.estimating.errors import EstimateError
from chainer_ooc.estimating.ledger import Ledger, Segment, active_ledger
from chainer_ooc.estimating.shape_array import ShapeArray, memory_of, new
from chainer_ooc.estimating.without_data import without_data

__all__ = ["Node", "Recording", "record"]

FORWARD, BACKWARD, BETWEEN = "forward", "backward", "between"


@dataclasses.dataclass
class Node:
    """A function of the graph.

    Attributes:
        label: The function's name.
        segment: The segment in which it ran forward.
        inputs: The inputs: (dtype, shape, allocation or -1).
        saved: The allocations that the function keeps for backward.
        backwards: The segments in which it ran backward.
        parameters: The bytes of the parameters among its inputs.
        in_bytes: The bytes of its inputs, parameters included.
        out_bytes: The bytes of its outputs.
    """

    label: str
    segment: int
    inputs: list[tuple[Any, tuple[int, ...], int]]
    saved: set[int] = dataclasses.field(default_factory=set)
    backwards: list[int] = dataclasses.field(default_factory=list)
    parameters: int = 0
    in_bytes: int = 0
    out_bytes: int = 0


@dataclasses.dataclass
class Recording:
    """A recorded training step without data: the second one, when gradients and optimizer state exist.

    Attributes:
        ledger: The allocations of both steps.
        segments: The segments of the second step.
        first_event: The event at which the second step began.
        nodes: Its functions, in the order in which they ran forward.
        before: The allocations that the graph of the first step keeps.
        held: The allocations that a live variable refers to when forward ends.
        sizes: The size of each allocation (bytes).
        parameter_bytes: The bytes of parameters.
        state_bytes: The bytes of optimizer state.
        input_bytes: The bytes of the input arrays.
        fixed_bytes: The bytes in use all the time: parameters, persistent values, state, inputs.
        notes: The assumptions.
    """

    ledger: Ledger
    segments: list[Segment]
    first_event: int
    nodes: list[Node]
    before: set[int]
    held: set[int]
    sizes: dict[int, int]
    parameter_bytes: int
    state_bytes: int
    input_bytes: int
    fixed_bytes: int
    notes: list[str]


def record(
    model: Any,
    make_inputs: Callable[[], Sequence[Any]],
    optimizer: Callable[[], Any] | None,
    keep_on_gpu: bool = False,
    steps: int = 2,
) -> Recording:
    """Run training steps without data, and record the last.

    Args:
        model: A :class:`chainer.Link`. It is unchanged when this returns.
        make_inputs: Returns the arguments for the model.
        optimizer: Makes the optimizer. ``None``: no update.
        keep_on_gpu: Functions keep for backward what they keep with cuDNN, not with NumPy.
        steps: The number of steps. The last is recorded.

    Raises:
        EstimateError: If a result depends on data, or a function has no rule.
    """
    import chainer
    from chainer import reporter

    ledger = Ledger()
    watch = _watch_class()(ledger, keep_on_gpu)
    outer = reporter._get_reporters()[:]
    with contextlib.ExitStack() as stack:
        stack.enter_context(runtime.out_of_core_mode(False, {}))
        stack.enter_context(chainer.using_config("train", True))
        stack.enter_context(chainer.using_config("enable_backprop", True))
        stack.enter_context(chainer.using_config("debug", False))
        stack.enter_context(without_data(ledger))
        stack.callback(lambda: reporter._get_reporters().extend(outer))
        reporter._get_reporters().clear()
        stack.enter_context(_without_collector())
        stack.enter_context(_borrowed(model, ledger))
        parameter_bytes = ledger.live_bytes
        inputs = make_inputs()
        input_bytes = ledger.live_bytes - parameter_bytes
        update = optimizer().setup(model) if optimizer is not None else _NoUpdate(model)
        first_event = 0
        before: set[int] = set()
        for _ in range(steps):
            before = {number for node in watch.nodes for number in node.saved}
            first_event = len(ledger.events)
            gc.collect()
            watch.restart()
            with watch:
                update.update(lambda *args: watch.graph_is_complete(_loss(model, args)), *inputs)
        state_bytes = _state_bytes(model)
        parameter_bytes = sum(p.array.nbytes for p in model.params() if p.array is not None)
        fixed_bytes = _fixed_bytes(model) + state_bytes + input_bytes
        watch.forget()
        del update, inputs
    sizes = {number: nbytes for number, nbytes in ledger.events if nbytes > 0}
    return Recording(
        ledger,
        ledger.segments[watch.first_segment :],
        first_event,
        watch.nodes,
        before,
        watch.held,
        sizes,
        parameter_bytes,
        state_bytes,
        input_bytes,
        fixed_bytes,
        list(ledger.notes),
    )


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Delay garbage collection until a step has ended, so that equal steps give equal figures."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _NoUpdate:
    """An optimizer that runs forward and backward only."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def update(self, lossfun: Callable[..., Any], *args: Any) -> None:
        loss = lossfun(*args)
        self.model.cleargrads()
        loss.backward()


def _loss(model: Any, args: Sequence[Any]) -> Any:
    """Call the model, and reduce its result to one number if it is not one."""
    import chainer
    import chainer.functions as F

    result = model(*args)
    if isinstance(result, chainer.Variable) and result.size == 1:
        return result
    found = [v for v in _variables(result) if v.dtype.kind == "f"]
    if not found:
        raise EstimateError(
            f"the model returned {type(result).__name__} with no float variable in it; it must return its "
            "loss, or variables to make one of"
        )
    ledger = active_ledger()
    if ledger is not None:
        ledger.notes["the model returns no loss: the sum of what it returns was taken"] = None
    total = F.sum(found[0])
    for variable in found[1:]:
        total = total + F.sum(variable)
    return total


def _variables(thing: Any) -> Iterator[Any]:
    import chainer

    if isinstance(thing, chainer.Variable):
        yield thing
    elif isinstance(thing, dict):
        for item in thing.values():
            yield from _variables(item)
    elif isinstance(thing, list | tuple):
        for item in thing:
            yield from _variables(item)


def _state_bytes(model: Any) -> int:
    states = [p.update_rule.state or {} for p in model.params() if p.update_rule is not None]
    return sum(getattr(a, "nbytes", 0) for state in states for a in state.values())


def _fixed_bytes(model: Any) -> int:
    """Return the bytes that the model occupies all the time, without gradients."""
    total = sum(p.array.nbytes for p in model.params() if p.array is not None)
    for link in model.links():
        total += sum(link.__dict__[name].nbytes for name in link._persistent
                     if isinstance(link.__dict__.get(name), np.ndarray))  # fmt: skip
    return total


@contextlib.contextmanager
def _borrowed(model: Any, ledger: Ledger) -> Iterator[None]:
    """Lend a model parameters without elements; afterwards restore the model."""
    from chainer.variable import VariableNode

    undo: list[Callable[[], None]] = []
    try:
        for link in model.links():
            attributes = link.__dict__
            undo.append(_restorer(attributes))
            for name, value in list(attributes.items()):
                if isinstance(value, dict | list | set):
                    undo.append(_restorer(value))
                elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
                    attributes[name] = _stand_in(value, ledger)
        for parameter in model.params():
            if parameter.xp is not np:
                raise EstimateError(
                    f"the model's parameter {parameter.name!r} is not a NumPy array; estimate the model before "
                    "it goes to a device (model.to_cpu()), with device=… for the one that is meant"
                )
            undo.append(_restorer(parameter.__dict__))
            given = parameter.__dict__
            array, grad = given["_data"][0], given["_grad"]
            given["_data"] = [None if array is None else _stand_in(array, ledger)]
            given["_grad"] = None if grad is None else _stand_in(grad, ledger)
            given["_grad_var"] = None
            node = VariableNode(parameter, parameter.name)
            if array is not None:
                node._update_data_info(given["_data"][0])
            given["_node"] = node
        yield
    finally:
        for action in reversed(undo):
            action()


def _restorer(container: Any) -> Callable[[], None]:
    contents = container.copy()

    def restore() -> None:
        if isinstance(container, list):
            container[:] = contents
        else:
            container.clear()
            container.update(contents)

    return restore


def _stand_in(array: np.ndarray, ledger: Ledger) -> ShapeArray:
    from chainer_ooc.estimating.shape_array import layout_axes

    return new(array.shape, array.dtype, ledger, layout_axes(array))


def _watch_class() -> Any:
    """Return the class of the hook. Chainer is imported only here."""
    import chainer

    class Watch(chainer.FunctionHook):
        """Begin a segment for each function, forward and backward, and note what the graph keeps."""

        name = "chainer_ooc_estimate"

        def __init__(self, ledger: Ledger, keep_on_gpu: bool) -> None:
            self.ledger = ledger
            self.keep_on_gpu = keep_on_gpu
            self.restart()

        def restart(self) -> None:
            self.nodes: list[Node] = []
            self.held: set[int] = set()
            self._functions: list[Any] = []
            self._index: dict[int, int] = {}
            self._depth = 0
            self.ledger.begin("", BETWEEN)
            self.first_segment = len(self.ledger.segments) - 1

        def forget(self) -> None:
            self._functions.clear()
            self._index.clear()

        def forward_preprocess(self, function: Any, in_data: Any) -> None:
            self._depth += 1
            if self._depth > 1:
                return
            segment = len(self.ledger.segments)
            self.ledger.begin(function.label, FORWARD)
            inputs = [(x.dtype, x.shape, _number(x)) for x in in_data if x is not None]
            node = Node(function.label, segment, inputs)
            node.in_bytes = sum(x.nbytes for x in in_data if x is not None)
            self._index[id(function)] = len(self.nodes)
            self.nodes.append(node)
            import weakref

            self._functions.append(weakref.ref(function))

        def forward_postprocess(self, function: Any, in_data: Any) -> None:
            self._depth -= 1
            if self._depth:
                return
            if self.keep_on_gpu:
                from chainer_ooc.estimating.on_gpu import keep_as_cudnn

                keep_as_cudnn(function)
            self.ledger.begin("", BETWEEN)

        def backward_preprocess(self, function: Any, in_data: Any, out_grad: Any) -> None:
            self._depth += 1
            if self._depth > 1:
                return
            index = self._index.get(id(function))
            if index is not None:
                self.nodes[index].backwards.append(len(self.ledger.segments))
            segment = self.ledger.begin(function.label, BACKWARD)
            segment.io_bytes = sum(g.nbytes for g in out_grad if g is not None)

        def backward_postprocess(self, function: Any, in_data: Any, out_grad: Any) -> None:
            self._depth -= 1
            if not self._depth:
                self.ledger.begin("", BETWEEN)

        def graph_is_complete(self, loss: Any) -> Any:
            """Note what the functions of the graph keep. The caller calls it when forward has ended."""
            for node, reference in zip(self.nodes, self._functions, strict=True):
                function = reference()
                if function is not None and function.inputs is not None:
                    node.saved = set(_kept(function))
                    node.parameters = sum(_parameter_bytes(x) for x in function.inputs)
                    for output in function.outputs:
                        variable_node = output()
                        if variable_node is None:
                            continue
                        node.out_bytes += _node_bytes(variable_node)
                        variable = variable_node.get_variable_or_none()
                        if variable is not None and variable is not loss:
                            self.held.add(_number(variable.array))
            return loss

    return Watch


def _number(array: Any) -> int:
    memory = memory_of(array)
    # Ignore allocations of other ledgers, whose numbers mean something else.
    return -1 if memory is None or memory.ledger is not active_ledger() else memory.number


def _node_bytes(node: Any) -> int:
    size = 1
    for n in node.shape or ():
        size *= n
    return size * np.dtype(node.dtype).itemsize


def _parameter_bytes(node: Any) -> int:
    import chainer

    variable = node.get_variable_or_none() if node._creator_node is None else None
    return variable.array.nbytes if isinstance(variable, chainer.Parameter) else 0


def _kept(function: Any) -> Iterator[int]:
    """Return the numbers of the allocations that a function keeps for backward.

    Leaves among its inputs (parameters, input data) do not count: they never move.
    """
    from chainer_ooc.graph.attributes import _holders

    for index in function._input_indexes_to_retain or ():
        node = function.inputs[index]
        if node is not None and node._creator_node is not None and node.data is not None:
            yield _number(node.data)
    for array in function._retained_output_data or ():
        yield _number(array)
    # Batch normalization keeps its statistics in a nested object.
    nested = function.__dict__.get("_impl")
    for holder in [*_holders(function), *([nested] if hasattr(nested, "__dict__") else [])]:
        for value in holder.__dict__.values():
            items = value if type(value) in (tuple, list) else (value,)
            for item in items:
                if isinstance(item, np.ndarray):
                    yield _number(item)
