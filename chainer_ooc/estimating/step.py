"""Run a training step without data: the model's and Chainer's code runs, NumPy computes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from chainer_ooc.estimating import engine
from chainer_ooc.estimating.errors import EstimateError
from chainer_ooc.estimating.ledger import BETWEEN, Ledger, Segment, active_ledger
from chainer_ooc.estimating.on_gpu import keep_as_cudnn
from chainer_ooc.estimating.shape_array import ShapeArray, new
from chainer_ooc.estimating.without_data import without_data
from chainer_ooc.planning.profile import Profile

__all__ = ["Recording", "record"]


@dataclasses.dataclass
class Recording:
    """A recorded training step without data: the second one, when gradients and optimizer state exist.

    Attributes:
        ledger: The allocations of both steps.
        first_segment: The first segment of the second step.
        profile: The second step as the engine records it; its times mean nothing.
        begins: The first segment of each of the profile's steps.
        left_over: The bytes that the first step's graph still saves when each of these steps begins.
        parameter_bytes: The bytes of parameters.
        state_bytes: The bytes of optimizer state.
        notes: The assumptions.
    """

    ledger: Ledger
    first_segment: int
    profile: Profile
    begins: list[int]
    left_over: list[int]
    parameter_bytes: int
    state_bytes: int
    notes: list[str]

    @property
    def segments(self) -> list[Segment]:
        """The segments of the second step."""
        return self.ledger.segments[self.first_segment :]


def record(
    model: Any,
    make_inputs: Callable[[], Sequence[Any]],
    optimizer: Callable[[], Any] | None,
    keep_on_gpu: bool = False,
    process_bytes: int = 0,
    steps: int = 2,
) -> Recording:
    """Run training steps without data, and record the last.

    Args:
        model: A :class:`chainer.Link`. It is unchanged when this returns.
        make_inputs: Returns the arguments for the model.
        optimizer: Makes the optimizer. ``None``: no update.
        keep_on_gpu: Functions keep for backward what they keep with cuDNN, not with NumPy.
        process_bytes: The memory of the process itself (bytes).
        steps: The number of steps. The last is recorded.

    Raises:
        EstimateError: If a result depends on data, or a function has no rule.
    """
    import chainer
    from chainer import reporter

    ledger = Ledger()
    how = _hook_of_cudnn() if keep_on_gpu else contextlib.nullcontext()
    outer = reporter._get_reporters()[:]

    def loss(*args: Any) -> Any:
        with how:  # not in backward: stock Chainer would read all inputs there for the hook
            return _loss(model, args)

    with contextlib.ExitStack() as stack:
        stack.enter_context(chainer.using_config("train", True))
        stack.enter_context(chainer.using_config("enable_backprop", True))
        stack.enter_context(chainer.using_config("debug", False))
        stack.enter_context(without_data(ledger))
        stack.callback(lambda: reporter._get_reporters().extend(outer))
        reporter._get_reporters().clear()
        stack.enter_context(_without_collector())
        stack.enter_context(_borrowed(model, ledger))
        inputs = make_inputs()
        update = optimizer().setup(model) if optimizer is not None else _NoUpdate(model)
        tracker = stack.enter_context(engine.recording(ledger, process_bytes, keep_on_gpu))
        for _ in range(steps):
            gc.collect()
            first_segment = len(ledger.segments)
            ledger.begin("", BETWEEN)
            update.update(loss, *inputs)
        state_bytes = _state_bytes(model)
        parameter_bytes = sum(p.array.nbytes for p in model.params() if p.array is not None)
        tracker.finish()
        del update, inputs
    return Recording(
        ledger,
        first_segment,
        tracker.profile,
        tracker.begins,
        tracker.left_over,
        parameter_bytes,
        state_bytes,
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


def _hook_of_cudnn() -> Any:
    """Return a hook that makes functions keep what they keep with cuDNN. Chainer is imported only here."""
    import chainer

    class Hook(chainer.FunctionHook):
        name = "chainer_ooc_estimate"

        def forward_postprocess(self, function: Any, in_data: Any) -> None:
            keep_as_cudnn(function)

    return Hook()
