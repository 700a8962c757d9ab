"""What the random programs are made of. A program sees every name of ``__all__``."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import gc
import hashlib
import io
import itertools
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

__all__ = [
    "Alarm",
    "Budget",
    "Calls",
    "F",
    "Finalizer",
    "Hook",
    "L",
    "LinkHook",
    "Own",
    "add",
    "asyncio",
    "batches",
    "chainer",
    "check",
    "contextlib",
    "contextvars",
    "copy",
    "fail",
    "forked",
    "functools",
    "gc",
    "in_threads",
    "inner",
    "interrupt",
    "io",
    "iterate",
    "kill",
    "net",
    "np",
    "os",
    "pickle",
    "rand",
    "recurse",
    "see",
    "signal",
    "sys",
    "threading",
    "time",
    "train",
    "types",
    "warnings",
    "weakref",
]

seen: list[str] = []  #: what the running step has shown so far


class Alarm(BaseException):
    """Raised by handlers of signals."""


class Budget(MemoryError):
    """A program's own error of memory."""


class Leave(SystemExit):
    """Ends a forked child as a program ends, whatever step it is in."""


def see(*values: Any) -> None:
    """Record values: what stock Chainer gives is what must come out."""
    seen.extend(digest(value) for value in values)


def digest(value: Any) -> str:
    """Return a text that says all about a value: of arrays the bits, too."""
    if isinstance(value, chainer.Variable):
        grad = value.grad if value.array is not None else None
        return f"V({digest(value.array)}, {digest(grad)}, {value.requires_grad}, {value.name})"
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return f"objects{value.shape}"
        bits = hashlib.blake2b(value.tobytes(), digest_size=6).hexdigest()
        strides = value.strides if value.size > 1 else ""
        return (
            f"{value.dtype.str}{value.shape}{strides}{'' if value.flags.writeable else 'r'}:{bits}"
        )
    if isinstance(value, np.generic):
        return f"{value.dtype.str}:{value.tobytes().hex()}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {digest(value[key])}" for key in value) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(digest, value)) + "]"
    if isinstance(value, BaseException):
        return describe(value)
    return plain(repr(value))


def describe(error: BaseException | None, depth: int = 4) -> str:
    """Return the type and the message of an error, of those before it, and the program's lines it passed."""
    if error is None or not depth:
        return ""
    lines = []
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename.startswith("<step"):
            lines.append(str(number))
    text = f"{type(error).__name__}: {plain(str(error))} @{','.join(lines)}"
    if error.__cause__ is not None:
        return f"{text} from ({describe(error.__cause__, depth - 1)})"
    if error.__context__ is not None and not error.__suppress_context__:
        return f"{text} after ({describe(error.__context__, depth - 1)})"
    return text


def place_of(error: BaseException) -> str:
    """Return the innermost places of an error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return ", ".join(f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in frames)


def plain(text: str) -> str:
    """Return a text without the addresses of objects."""
    return re.sub(r"0x[0-9a-f]+", "0x", text)


def rand(shape: tuple[int, ...], dtype: str = "f", seed: int = 0, layout: str = "C") -> np.ndarray:
    """Return seeded random numbers in [-1, 1).

    Args:
        shape: Its shape.
        dtype: Its dtype, of numbers.
        seed: Of the generator.
        layout: ``"C"``, ``"F"``, ``"strided"``, ``"reversed"``, ``"broadcast"``, ``"offset"`` or ``"unaligned"``.
    """
    array = (
        np.random.RandomState(seed).uniform(-1, 1, shape) * (1 if dtype not in "ilB" else 9)
    ).astype(dtype)
    if layout == "F":
        return np.asfortranarray(array)
    if layout == "strided":
        return np.repeat(array, 2, -1)[..., ::2] if array.ndim else array
    if layout == "reversed":
        return array[::-1] if array.ndim else array
    if layout == "broadcast":
        return np.broadcast_to(array[:1], shape) if array.ndim and shape[0] else array
    if layout in ("offset", "unaligned"):
        offset = array.itemsize if layout == "offset" else 1
        memory = np.empty(array.nbytes + offset, "u1")
        copied = memory[offset:].view(array.dtype).reshape(shape)
        copied[...] = array
        return copied
    return array


def fail(error: BaseException) -> Any:
    raise error


def add(a: Any, b: Any) -> Any:
    return a + b


def check(condition: Any) -> None:
    see(bool(condition))


def inner(y: chainer.Variable, depth: int) -> np.ndarray:
    """Return an array of the graph that no variable has: of ``depth`` functions before ``y``, or fewer."""
    node = y.node
    for _ in range(depth):
        creator = node.creator_node
        if creator is None or creator.inputs[0].creator_node is None:
            break
        node = creator.inputs[0]
    return node.data


class Own(chainer.FunctionNode):
    """``2 * x + y ** 2`` of the program's own, which fails at a chosen point.

    Args:
        error: Raised there, or a function that is called there; ``None``: it does not fail.
        point: ``"forward"``, ``"forward end"``, ``"backward"`` or ``"backward end"``.
    """

    def __init__(self, error: Any = None, point: str = "forward") -> None:
        self.error, self.point = error, point

    def reach(self, point: str) -> Any:
        if point == self.point and self.error is not None:
            if isinstance(self.error, BaseException):
                raise self.error
            self.error()
        return 0

    def forward(self, inputs: Any) -> Any:
        x, y = inputs
        self.retain_inputs((0, 1))
        self.retain_outputs((0,))
        self.mask = x > 0
        self.parts = [x * 3, (y + 1,)]
        z = (x * 2 + self.reach("forward") + np.square(y)).astype(x.dtype)
        self.reach("forward end")
        return (z,)

    def backward(self, indexes: Any, grads: Any) -> Any:
        (gz,) = grads
        x, y = self.get_retained_inputs()
        (z,) = self.get_retained_outputs()
        g = gz * 2 + self.reach("backward") + 0 * (x + z) + self.mask.astype(z.dtype) * 0
        h = gz * y * 2 + (self.parts[0] * 0).astype(z.dtype)
        self.reach("backward end")
        return g, h


class Hook(chainer.FunctionHook):
    """Fails when it is called for the ``number``-th time at ``point``; it shows the arrays that it gets."""

    name = "Hook"

    def __init__(
        self, point: str, number: int, error: BaseException | None, shows: bool = False
    ) -> None:
        self.point, self.left, self.error, self.shows = point, number, error, shows

    def _reached(self, point: str, function: Any, in_data: Any, out_grad: Any = None) -> None:
        if self.shows:
            see(function.label, list(in_data), None if out_grad is None else list(out_grad))
        if point == self.point:
            self.left -= 1
            if self.left == 0 and self.error is not None:
                add(np.ones(20000, "f") * 2, fail(self.error))

    def forward_preprocess(self, function: Any, in_data: Any) -> None:
        self._reached("forward_preprocess", function, in_data)

    def forward_postprocess(self, function: Any, in_data: Any) -> None:
        self._reached("forward_postprocess", function, in_data)

    def backward_preprocess(self, function: Any, in_data: Any, out_grad: Any) -> None:
        self._reached("backward_preprocess", function, in_data, out_grad)

    def backward_postprocess(self, function: Any, in_data: Any, out_grad: Any) -> None:
        self._reached("backward_postprocess", function, in_data, out_grad)


class Calls(chainer.FunctionHook):
    """Writes to the arrays of all variables that ``kept`` returns, after each function."""

    name = "Calls"

    def __init__(self, kept: Callable[[], list[chainer.Variable]]) -> None:
        self.kept = kept

    def forward_postprocess(self, function: Any, in_data: Any) -> None:
        for v in self.kept():
            v.array *= 0.75


class LinkHook(chainer.LinkHook):
    """Fails before or after the ``number``-th call of a link."""

    name = "LinkHook"

    def __init__(self, after: bool, number: int, error: BaseException) -> None:
        self.after, self.left, self.error = after, number, error

    def _reached(self, after: bool) -> None:
        if after is self.after:
            self.left -= 1
            if self.left == 0:
                add(np.ones(30000, "f") + 1, fail(self.error))

    def forward_preprocess(self, args: Any) -> None:
        self._reached(False)

    def forward_postprocess(self, args: Any) -> None:
        self._reached(True)


class Finalizer:
    """Does something when it dies.

    Args:
        action: Called then.
    """

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action = action

    def __del__(self) -> None:
        self.action()


def batches(n: int, at: int, error: BaseException, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield arrays; the one of number ``at`` cannot be loaded."""
    for i in range(n):
        yield np.ones(shape, "f") * 2 + (fail(error) if i == at else np.full(shape, i, "f"))


def recurse(function: Callable[[Any], Any], x: Any, depth: int) -> Any:
    """Call itself with a temporary on each level."""
    return function(x) + recurse(function, x, depth - 1) if depth else x * 2


def net(kind: str, seed: int = 0) -> chainer.Chain:
    """Return a seeded network: ``"mlp"`` takes (n, 64), ``"conv"`` (n, 3, 12, 12), ``"norm"`` (n, 64)."""
    np.random.seed(seed)
    if kind == "conv":
        layers = [
            L.Convolution2D(3, 8, 3, pad=1),
            F.relu,
            L.Convolution2D(8, 8, 3, pad=1),
            F.leaky_relu,
        ]
        model = chainer.Sequential(
            *layers, functools.partial(F.max_pooling_2d, ksize=2), L.Linear(None, 5)
        )
        with chainer.no_backprop_mode():
            model(np.zeros((1, 3, 12, 12), "f"))
        return model
    if kind == "norm":
        return chainer.Sequential(
            L.Linear(64, 96), L.BatchNormalization(96), F.relu, F.dropout, L.Linear(96, 5)
        )
    return chainer.Sequential(
        L.Linear(64, 128), F.tanh, L.Linear(128, 96), F.sigmoid, L.Linear(96, 5)
    )


def train(model: Any, optimizer: Any, x: np.ndarray, steps: int) -> Any:
    """Train for some steps. Returns the last loss."""
    t = (np.arange(len(x)) % 5).astype("i")
    for _ in range(steps):
        loss = F.softmax_cross_entropy(model(x), t)
        model.cleargrads()
        loss.backward()
        optimizer.update()
    return loss


def iterate(count: int, act: Callable[[int, int, Any], Any], seed: int) -> Any:
    """Train a deep network for ``count`` steps. Returns the losses and what has been trained.

    Args:
        count: The number of steps.
        act: Called with the step, the place in the network (0 to 27), and the variable there; may return another.
        seed: Of the parameters and the data.
    """
    np.random.seed(seed)
    layers = [L.Convolution2D(12, 12, 1) for _ in range(4)]
    norms = [L.BatchNormalization(12) for _ in range(4)]
    model = chainer.Sequential(*layers, *norms, L.Linear(12, 5))
    optimizer = chainer.optimizers.MomentumSGD(0.01).setup(model)
    losses = []
    for step in range(count):
        place = itertools.count()

        def at(v: Any, step: int = step, place: Any = place) -> Any:
            other = act(step, next(place), v)
            return v if other is None else other

        h = chainer.Variable(rand((4, 12, 16, 16), seed=step))
        for conv, norm in zip(layers, norms, strict=True):
            r = at(F.relu(at(norm(at(conv(h))))))
            h = at(r * at(F.tanh(at(F.dropout(h, 0.2)) * 0.7)) + r)
        del r
        loss = F.softmax_cross_entropy(model[-1](F.average(h, axis=(2, 3))), np.arange(4) % 5)
        del h
        model.cleargrads()
        loss.backward()
        optimizer.update()
        losses.append(loss.array)
    params = [p for _, p in sorted(model.namedparams())]
    return losses, params, [norm.avg_mean for norm in norms]


def kill(number: int = signal.SIGUSR1, error: type[BaseException] = Alarm) -> None:
    """Send this process a signal whose handler raises: it does so before this returns."""

    def handler(got: int, frame: Any) -> None:
        raise error(f"signal {got}")

    old = signal.signal(number, handler)
    try:
        os.kill(os.getpid(), number)
        for _ in range(1000):
            pass
    finally:
        signal.signal(number, old)


_TIMERS = {
    "real": (signal.ITIMER_REAL, signal.SIGALRM),
    "prof": (signal.ITIMER_PROF, signal.SIGPROF),
    "virtual": (signal.ITIMER_VIRTUAL, signal.SIGVTALRM),
}


def interrupt(
    function: Callable[[], Any], timer: str, delays: list[float], error: type[BaseException] = Alarm
) -> None:
    """Run ``function`` over and over until a handler raises ``error``; for each delay again.

    The moment cannot be repeated. What must be the same: the error arrives as itself.

    Args:
        function: Touches nothing that outlives it.
        timer: ``"real"``, ``"prof"`` or ``"virtual"``.
        delays: Seconds.
        error: Its type.
    """
    fired = []

    def handler(number: int, frame: Any) -> None:
        fired.append(number)
        raise error("interrupted")

    which, number = _TIMERS[timer]
    config, numeric = dict(vars(chainer.config._local)), np.geterr()
    for delay in delays:
        fired.clear()
        old = signal.signal(number, handler)
        try:
            signal.setitimer(which, delay)
            deadline = time.monotonic() + 30
            while not fired and time.monotonic() < deadline:
                function()
            for _ in range(9):  # a signal is handled between two bytecodes, somewhat later
                pass
            outcome = "lost" if fired else "no signal"
        except BaseException as caught:
            outcome = f"{type(caught).__name__}: {caught}"
            del caught
        finally:
            signal.setitimer(which, 0)
            signal.signal(number, old)
        see(outcome)
        # Contexts of Chainer and NumPy may leave their settings behind when they are interrupted, on stock, too.
        np.seterr(**numeric)
        vars(chainer.config._local).clear()
        vars(chainer.config._local).update(config)
    np.random.seed(0)


def in_threads(n: int, function: Callable[[int], Any]) -> None:
    """Call ``function(number)`` in ``n`` threads at once; see what each returned or raised, in order."""
    results: list[Any] = [None] * n

    def run(number: int) -> None:
        try:
            results[number] = digest(function(number))
        except BaseException as error:
            results[number] = describe(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    see(results)


def forked(function: Callable[[], Any], leave: int | None = None) -> None:
    """Call ``function`` in a forked child; see what it returned or raised there, and the child's exit status.

    Args:
        function: Its result's digest comes back through a pipe.
        leave: The exit status that it ends with; ``None``: it ends at once.
    """
    sys.stdout.flush()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            result = digest(function())
        except BaseException as error:
            result = describe(error)
        os.write(write, result.encode())
        os.close(write)
        if leave is None:
            os._exit(0)
        raise Leave(leave)
    os.close(write)
    with os.fdopen(read) as pipe:
        result = pipe.read()
    see(result, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
