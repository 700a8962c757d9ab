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
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nets import NETS, Batch
from training import machine

from chainer_ooc.planning.profile import BACKWARD, FORWARD, OTHER, Profile, describe_input
from chainer_ooc.planning.recorder import Recorder

import chainer  # isort: skip
import chainer.links as L  # isort: skip
from chainer import _backprop_utils  # isort: skip

#: What the engine runs again bit for bit, and the attributes that a re-run needs (dropout's mask).
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
    "Deconvolution2DFunction": (),
    "DeconvolutionND": (),
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
#: Attributes that a re-run makes.
MADE = ("indexes", "unit_scale", "scale")
#: Storages below this size are left where they are, as the engine does by default (bytes).
MIN_BYTES = 64 << 10


def vgg16() -> Batch:
    """VGG-16 at 224 x 224."""
    from nets import Vision, _classifier

    return _classifier(Vision(L.VGG16Layers(pretrained_model=None), "fc8"), (8, 3, 224, 224))


class Observer:
    """Sees functions run on NumPy and tells a :class:`Recorder` what they make, retain and take."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self._by_owner: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._sizes: list[int] = []  # of the storages (bytes)
        self._in_backward = False
        self._variables: list[tuple[weakref.ref[Any], int]] = []

    def begin(self, label: str, phase: str, **more: Any) -> None:
        """Begin a step."""
        current, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        self.recorder.begin(label, phase, time.perf_counter(), current, **more)
        alive = []
        held = set()
        for reference, i in self._variables:
            if reference() is not None:
                alive.append((reference, i))
                held.add(i)
        for i in {i for _, i in self._variables} - held:
            self.recorder.freed(i)
        self._variables = alive

    def end(self) -> None:
        """End the step that runs."""
        self.recorder.end(tracemalloc.get_traced_memory()[1])

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
        index = self.recorder.made(owner.nbytes)
        self._sizes.append(owner.nbytes)
        self._by_owner[id(owner)] = (weakref.ref(owner), index)
        return index

    def apply(self, stock: Callable[..., Any], func: Any, inputs: Any) -> Any:
        """Run a function forward and note what it did."""
        if self._in_backward:  # what computes a gradient is part of that backward step
            return stock(func, inputs)
        recorder, label = self.recorder, func._impl_name
        arrays = [getattr(x, "array", x) for x in inputs]
        read = [self.storage_of(array, make=False) for array in arrays]
        described = tuple(
            describe_input(a.dtype, a.shape, -1 if i is None else recorder.producer(i))
            for a, i in zip(arrays, read, strict=True)
        )
        self.begin(label, FORWARD, inputs=described)
        outputs = stock(func, inputs)
        self.end()
        func.__dict__["_planner_number"] = recorder.step
        for variable in outputs:
            index = self.storage_of(variable.array, make=True)
            if index is not None:
                self._variables.append((weakref.ref(variable), index))
        kept = [func.inputs[i] for i in func._input_indexes_to_retain or () if func.inputs]
        saved = [node.data for node in kept if node is not None and node.creator_node is not None]
        saved += func._retained_output_data or ()
        attributes = [(name, self.storage_of(a, make=True)) for name, a in _attributes(func)]
        found = [self.storage_of(a, make=False) for a in saved] + [i for _, i in attributes]
        recorder.saved([i for i in found if i is not None and self._sizes[i] >= MIN_BYTES])
        made = [i for i, _ in self._by_owner_of(recorder.step)]
        for i in set(made) - {i for _, i in self._variables}:
            recorder.freed(i)
        if label in RERUN:
            extra = [i for name, i in attributes if name in RERUN[label] and i is not None]
            others = {i for name, i in attributes if name not in MADE}
            writes = [i for i in made if i not in others]
            reads = [i for i in (*read, *extra) if i is not None]
            for i in writes:
                recorder.can_remake(i, reads, [recorder.step])
        return outputs

    def backprop_step(self, stock: Callable[..., Any], func: Any, *arguments: Any) -> None:
        """Run a function backward and note what it did."""
        self.begin(func._impl_name, BACKWARD, function=func.__dict__.get("_planner_number", -1))
        self._in_backward = True
        try:
            stock(func, *arguments)
        finally:
            self._in_backward = False
        self.end()

    def _by_owner_of(self, step: int) -> list[tuple[int, Any]]:
        owners = [
            (i, ref) for ref, i in self._by_owner.values() if self.recorder.producer(i) == step
        ]
        return sorted(owners, key=lambda pair: pair[0])


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


@contextlib.contextmanager
def recording(observer: Observer) -> Iterator[None]:
    """Let ``observer`` see every function of the block."""
    apply, backprop_step = chainer.FunctionNode.apply, _backprop_utils.backprop_step
    chainer.FunctionNode.apply = lambda func, inputs: observer.apply(apply, func, inputs)
    _backprop_utils.backprop_step = lambda func, *arguments: observer.backprop_step(
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

    def iterate() -> tuple[Recorder, float]:
        gc.collect()
        observer = Observer()
        hook = _UpdateStep(observer)
        optimizer.add_hook(hook, name="planner")
        with recording(observer):
            optimizer.update(model, x, t)
        end = time.perf_counter()
        observer.end()
        optimizer.remove_hook("planner")
        return observer.recorder, end

    optimizer.update(model, x, t)
    times = []
    for _ in range(repeat):
        recorder, end = iterate()
        times.append(recorder.seconds(end))
    seconds = [min(column) for column in zip(*times, strict=True)]
    tracemalloc.start(1)
    iterate()
    recorder, _ = iterate()
    tracemalloc.stop()
    return recorder.profile(net, f"{machine()['processor']}, 1 thread", seconds)


class _UpdateStep:
    """An optimizer hook that runs between backward and the update: the update is a step of its own."""

    name = "planner"
    timing = "pre"
    call_for_each_param = False

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def __call__(self, optimizer: Any) -> None:
        self._observer.begin("update", OTHER)


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
