"""Record one training iteration of a network on NumPy as a profile of chainer_ooc.planning.

    python benchmarks/planner_record.py --nets resnet50 --out benchmarks/profiles

Stock Chainer runs with everything in memory. Sizes come from the arrays that Chainer's functions retain,
temporaries from tracemalloc (NumPy reports its allocations to it), times from iterations without it: the
least over the repetitions, function by function.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nets import NETS, Batch
from training import machine

from chainer_ooc.planning.profile import (
    BACKWARD,
    FORWARD,
    OTHER,
    Profile,
    Rerun,
    Step,
    Storage,
    describe_input,
)

import chainer  # isort: skip
import chainer.links as L  # isort: skip
from chainer import _backprop_utils  # isort: skip

#: What may be run again bit for bit, and the attributes that a re-run needs (dropout's mask).
RERUN: dict[str, tuple[str, ...]] = {
    "ReLU": (),
    "ClippedReLU": (),
    "LeakyReLU": (),
    "Sigmoid": (),
    "Tanh": (),
    "BatchNormalization": (),
    "Dropout": ("mask", "_mask"),
    "MaxPooling2D": (),
    "MaxPoolingND": (),
    "AveragePooling2D": (),
    "AveragePoolingND": (),
    "Unpooling2D": (),
    "UnpoolingND": (),
    "LocalResponseNormalization": (),
    "Concat": (),
    "Add": (),
    "MultiAdd": (),
    "Mul": (),
    "Reshape": (),
    "Softmax": (),
    "LSTM": (),
    "Convolution2DFunction": (),
    "ConvolutionND": (),
    "LinearFunction": (),
}
#: Storages below this size are left where they are, as the engine does by default (bytes).
MIN_BYTES = 64 << 10


def vgg16() -> Batch:
    """VGG-16 at 224 x 224."""
    from nets import Vision, _classifier

    return _classifier(Vision(L.VGG16Layers(pretrained_model=None), "fc8"), (8, 3, 224, 224))


class Recorder:
    """Notes what functions make, retain and take while the block runs."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.storages: list[dict[str, Any]] = []
        self._by_owner: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._in_backward = False
        self._variables: list[tuple[weakref.ref[Any], int]] = []

    def begin(self, label: str, phase: str, **more: Any) -> dict[str, Any]:
        """Begin a step, which ends the one before."""
        number = len(self.steps)
        alive = []
        for reference, i in self._variables:
            if reference() is None:
                self.storages[i]["free_from"] = max(self.storages[i]["free_from"], number)
            else:
                alive.append((reference, i))
        self._variables = alive
        current, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        step = {"label": label, "phase": phase, "current": current, "start": time.perf_counter()}
        self.steps.append(step | {"inputs": (), "function": -1, "rerun": None, "peak": 0} | more)
        return self.steps[-1]

    @staticmethod
    def end(step: dict[str, Any]) -> None:
        """Note the peak of a step that has ended."""
        step["peak"] = tracemalloc.get_traced_memory()[1]

    def storage_of(self, array: Any, make: bool) -> int | None:
        """Return the storage (index) of an array; a new one of the running step if ``make``."""
        if type(array) is not np.ndarray:
            return None
        owner = array
        while type(owner.base) is np.ndarray:
            owner = owner.base
        known = self._by_owner.get(id(owner))
        if known and known[0]() is owner:
            return known[1]
        if not make or owner.base is not None:
            return None
        index = len(self.storages)
        producer = len(self.steps) - 1
        label = self.steps[-1]["label"]
        self.storages.append(
            {
                "nbytes": owner.nbytes,
                "producer": producer,
                "free_from": producer + 1,
                "label": label,
            }
        )
        self._by_owner[id(owner)] = (weakref.ref(owner), index)
        return index

    def apply(self, stock: Callable[..., Any], func: Any, inputs: Any) -> Any:
        """Run a function forward and note what it did."""
        if self._in_backward:  # what computes a gradient is part of that backward step
            return stock(func, inputs)
        arrays = [getattr(x, "array", x) for x in inputs]
        read = [self.storage_of(array, make=False) for array in arrays]
        step = self.begin(
            func._impl_name,
            FORWARD,
            inputs=tuple(
                describe_input(a.dtype, a.shape, -1 if i is None else self.storages[i]["producer"])
                for a, i in zip(arrays, read, strict=True)
            ),
        )
        outputs = stock(func, inputs)
        self.end(step)
        func.__dict__["_planner_number"] = len(self.steps) - 1
        made = len(self.storages)
        for variable in outputs:
            index = self.storage_of(variable.array, make=True)
            if index is not None:
                self._variables.append((weakref.ref(variable), index))
        kept = [func.inputs[i] for i in func._input_indexes_to_retain or () if func.inputs]
        saved = [node.data for node in kept if node is not None and node.creator_node is not None]
        saved += func._retained_output_data or ()
        attributes = self._attributes(func)
        found = {self.storage_of(a, make=False) for a in saved}
        found |= {self.storage_of(a, make=True) for _, a in attributes}
        step["saved"] = sorted(i for i in found if i is not None)
        if step["label"] in RERUN:
            wanted = RERUN[step["label"]]
            extra = {self.storage_of(a, make=False) for name, a in attributes if name in wanted}
            step["reads"] = sorted({i for i in (*read, *extra) if i is not None})
            # What is made from leaves can be made again without any storage.
            step["writes"] = [i for i in range(made, len(self.storages)) if i not in extra]
        return outputs

    def backprop_step(self, stock: Callable[..., Any], func: Any, *arguments: Any) -> None:
        """Run a function backward and note what it did."""
        number = func.__dict__.get("_planner_number", -1)
        step = self.begin(func._impl_name, BACKWARD, function=number)
        self._in_backward = True
        try:
            stock(func, *arguments)
        finally:
            self._in_backward = False
        self.end(step)

    @staticmethod
    def _attributes(func: Any) -> list[tuple[str, Any]]:
        holders = [func]
        for name in ("_function", "_impl"):
            for holder in tuple(holders):
                if hasattr(holder.__dict__.get(name), "__dict__"):
                    holders.append(holder.__dict__[name])
        found = []
        for holder in holders:
            for name, value in holder.__dict__.items():
                if name != "_retained_output_data":
                    items = value if isinstance(value, (tuple, list)) else (value,)
                    found += [(name, item) for item in items if type(item) is np.ndarray]
        return found

    def profile(self, name: str, device: str, seconds: list[float]) -> Profile:
        """Return the profile of what was noted.

        Args:
            name: What was trained.
            device: Where.
            seconds: The time of each step.
        """
        count = len(self.steps)
        uses: list[list[int]] = [[] for _ in self.storages]
        for number, step in enumerate(self.steps):
            if step["phase"] == BACKWARD and step["function"] >= 0:
                for i in self.steps[step["function"]]["saved"]:
                    if self.storages[i]["nbytes"] >= MIN_BYTES:
                        uses[i].append(number)
        held_on = {i for reference, i in self._variables if reference() is not None}
        storages = tuple(
            Storage(
                s["nbytes"],
                s["producer"],
                count if i in held_on else s["free_from"],
                tuple(uses[i]),
                s["label"],
            )
            for i, s in enumerate(self.storages)
        )
        made = [0] * count
        for storage in storages:
            if storage.uses:
                made[storage.producer] += storage.nbytes
        saved = 0
        beside = []
        for step, nbytes in zip(self.steps, made, strict=True):
            beside.append(step["current"] - saved)
            saved += nbytes
        fixed = min(beside)
        steps = []
        for number, step in enumerate(self.steps):
            workspace = max(0, step["peak"] - step["current"] - made[number])
            rerun = None
            if step.get("writes"):
                again = {*step["reads"], *step["writes"]}
                unsaved = sum(storages[i].nbytes for i in again if not storages[i].uses)
                rerun = Rerun(
                    seconds[number],
                    max(0, workspace - unsaved),
                    tuple(step["reads"]),
                    tuple(step["writes"]),
                )
            steps.append(
                Step(
                    step["label"],
                    step["phase"],
                    seconds[number],
                    workspace,
                    max(0, beside[number] - fixed),
                    step["inputs"],
                    step["function"],
                    rerun,
                )
            )
        return Profile(name, device, False, fixed, tuple(steps), storages)


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Let ``recorder`` see every function of the block."""
    apply, backprop_step = chainer.FunctionNode.apply, _backprop_utils.backprop_step
    chainer.FunctionNode.apply = lambda func, inputs: recorder.apply(apply, func, inputs)
    _backprop_utils.backprop_step = lambda func, *arguments: recorder.backprop_step(
        backprop_step, func, *arguments
    )
    try:
        yield
    finally:
        chainer.FunctionNode.apply = apply
        _backprop_utils.backprop_step = backprop_step


def record(net: str, make: Callable[[], Batch], repeat: int) -> Profile:
    """Train a few iterations and return the profile of one."""
    np.random.seed(0)
    model, x, t = make()
    optimizer = chainer.optimizers.MomentumSGD(lr=0.001).setup(model)
    stock_update = optimizer.update

    def iterate() -> Recorder:
        gc.collect()
        recorder = Recorder()
        hook = _UpdateStep(recorder)
        optimizer.add_hook(hook, name="planner")
        with recording(recorder):
            stock_update(model, x, t)
        hook.finish()
        optimizer.remove_hook("planner")
        return recorder

    optimizer.update(model, x, t)
    times: list[list[float]] = []
    for _ in range(repeat):
        steps = iterate().steps
        starts = [step["start"] for step in steps] + [time.perf_counter()]
        times.append([b - a for a, b in itertools.pairwise(starts)])
    seconds = [min(column) for column in zip(*times, strict=True)]
    tracemalloc.start(1)
    iterate()
    recorder = iterate()
    tracemalloc.stop()
    about = machine()
    return recorder.profile(net, f"{about['processor']}, 1 thread", seconds)


class _UpdateStep:
    """An optimizer hook that runs between backward and the update: the update is a step of its own."""

    name = "planner"
    timing = "pre"
    call_for_each_param = False

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._step: dict[str, Any] = {}

    def __call__(self, optimizer: Any) -> None:
        self._step = self._recorder.begin("update", OTHER)

    def finish(self) -> None:
        self._recorder.end(self._step)


def main() -> None:
    """Parse arguments, record, write."""
    nets: dict[str, Callable[[], Batch]] = {**NETS, "vgg16": vgg16}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=list(nets), default=["resnet50"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/profiles", metavar="DIRECTORY")
    options = parser.parse_args()
    for net in options.nets:
        profile = record(net, nets[net], options.repeat)
        path = Path(options.out) / f"{net}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(profile.to_json())
        mib = 1 << 20
        print(
            f"{path}: {len(profile.steps)} steps, {len(profile.saved)} saved storages of "
            f"{profile.saved_bytes / mib:.0f} MiB, in core {profile.in_core_bytes / mib:.0f} MiB, floor "
            f"{profile.floor_bytes / mib:.0f} MiB, {profile.compute_seconds:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
