"""Makes calls of NumPy fail at each of their allocations, and prints as JSON what arrived: a script.

    python tests/swap/allocation_sweep.py PLACE ONE_OF

``PLACE`` is where the calls are made: see ``PLACES``; one of ``ONE_OF`` calls is made. Each is made in a
forked child: for each the output has ``made``, its number of allocations; ``odd``, what arrived that is not
the error itself, and how often; ``late``, how many errors arrived between two bytecodes, as where NumPy
cannot take that an allocation fails.
"""

from __future__ import annotations

import collections
import functools
import io
import json
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import chainer_ooc  # the import hook comes before any import of Chainer

# isort: split
import chainer
import chainer.functions as F
import numpy as np

from chainer_ooc import state
from chainer_ooc.errors import OutOfMemoryError, SwapSpaceError
from chainer_ooc.swap.devices.ram import native

MOST = 100  #: allocations of one call

try:
    from numpy._core._exceptions import _ArrayMemoryError
except ImportError:  # NumPy 1
    from numpy.core._exceptions import _ArrayMemoryError


class Mine(BaseException):
    """An error that no library knows."""


ERRORS: tuple[Callable[[], BaseException], ...] = (
    lambda: OutOfMemoryError("tanh(3, 4) needs more"),
    lambda: SwapSpaceError(28, "no space is left"),
    lambda: KeyboardInterrupt("Ctrl-C"),
    lambda: Mine("mine"),
)


class Failing:
    """Raises an error at the allocation that is chosen.

    Attributes:
        left: So many allocations more are made before; negative: all are.
        error: What is raised.
    """

    def __init__(self, before: Callable[[int], None] = lambda nbytes: None) -> None:
        self.left = -1
        self.error: BaseException | None = None
        self._before = before

    def __call__(self, nbytes: int) -> None:
        self._before(nbytes)
        if self.left >= 0:
            self.left -= 1
            if self.left < 0:
                assert self.error is not None
                raise self.error


def calls() -> dict[str, Callable[[], Any]]:
    """Return the calls by name. Each allocates, and gives the same whenever it is made."""
    r = np.random.RandomState(0)
    a = r.standard_normal((24, 30))
    f, big = np.asfortranarray(a), a.astype(">f8")
    square = a[:, :24] @ a[:, :24].T + 9 * np.eye(24)
    words = np.array([f"x{i}" for i in range(50)])
    records = np.zeros(20, "i4,f8")
    objects = np.array([1, 2.5, "x"] * 7, dtype=object)
    numbers = np.array(list(range(20)), dtype=object)
    days = np.arange("2020-01", "2020-09", dtype="M8[D]")
    pickles = [pickle.dumps(x, n) for x in (a, big, numbers) for n in (2, 5)]
    saved = io.BytesIO()
    np.save(saved, f)

    pairs = np.zeros((9, 4), [("o", object), ("n", "i4")])
    pairs["n"] = np.arange(36).reshape(9, 4) % 7

    def objects_of(array: Any) -> Any:
        return (array * 50).astype("i8").astype(object)

    def sort_in_place(kind: str) -> Any:
        array = a.copy()
        array.T.sort(kind=kind)
        return array

    def resize() -> Any:
        array = np.zeros(4)
        array.resize(4000, refcheck=False)
        return array

    def changed(change: Callable[[Any], Any]) -> Any:
        array = a.copy()
        change(array)
        return array

    found: dict[str, Callable[[], Any]] = {}
    for dtype in ("f8", "f4", "i2", ">f8", "U4", "M8[s]", "c8", "?", "O"):
        array = (
            (a * 50).astype("i8").astype(dtype)
            if dtype != "U4"
            else (a * 50).astype("i2").astype("U4")
        )
        for axis in (0, 1, None):
            for name in ("sort", "argsort", "partition", "argpartition"):
                how = {"axis": axis} | ({"kth": 3} if "partition" in name else {"kind": "stable"})
                found[f"{name} {dtype} {axis}"] = functools.partial(getattr(np, name), array, **how)
    for kind in ("quicksort", "heapsort", "stable"):
        found[f"in place {kind}"] = lambda kind=kind: sort_in_place(kind)
    found |= {
        "sort records": lambda: np.sort(pairs, axis=0, order="n"),
        "argsort records": lambda: np.argsort(pairs, axis=0, order="n"),
        "sort strided objects": lambda: objects_of(a)[::2, 0].sort(),
        "median of objects": lambda: np.median(objects_of(a), axis=0),
        "lexsort of objects": lambda: np.lexsort((objects_of(a), objects_of(f)), axis=0),
        "lexsort": lambda: np.lexsort((a, f), axis=0),
        "add": lambda: a + a,
        "add cast": lambda: a + big,
        "add mixed": lambda: np.add(a, np.ones((24, 30), "i2"), dtype="f4", casting="unsafe"),
        "add out": lambda: np.add(big, a, out=np.empty((24, 30))),
        "add where": lambda: np.add(a, 1, where=a > 0, out=np.zeros((24, 30))),
        "add in place": lambda: changed(lambda x: x.__iadd__(big)),
        "add overlap": lambda: changed(lambda x: x[1:].__iadd__(x[:-1])),
        "add at": lambda: changed(lambda x: np.add.at(x, ([0, 1], [1, 2]), 1.0)),
        "add outer": lambda: np.add.outer(a[0], a[0]),
        "add reduceat": lambda: np.add.reduceat(a, [0, 3]),
        "add accumulate": lambda: np.add.accumulate(a),
        "scalars": lambda: np.add(1.0, 2.0),
        "divmod": lambda: np.divmod(a, 0.3),
        "frexp": lambda: np.frexp(a),
        "maximum reduce": lambda: np.maximum.reduce(big, axis=0, initial=0.0, where=a > 0),
        "empty": lambda: np.empty((9, 0)),
        "zeros": lambda: np.zeros(99),
        "full": lambda: np.full(99, 1.0),
        "ones": lambda: np.ones((3, 4), "f2"),
        "resize": resize,
        "resize down": lambda: np.resize(a, (3, 5)),
        "fromiter": lambda: np.fromiter((i * 0.5 for i in range(500)), "d"),
        "array": lambda: np.array([[1.0, 2.0]] * 50),
        "array of arrays": lambda: np.array([a, f]),
        "array of objects": lambda: np.array([[1], [1, 2]], dtype=object),
        "array of words": lambda: np.array(["1.5"] * 9).astype("f"),
        "take": lambda: np.take(a, [0, 1, 2], axis=1),
        "fancy": lambda: a[[0, 1], [2, 3]],
        "fancy broadcast": lambda: a[np.arange(3)[:, None], [1, 2]],
        "fancy set": lambda: changed(lambda x: x.__setitem__(([0, 1], [2, 3]), big[0, 0])),
        "fancy set cast": lambda: changed(lambda x: x.__setitem__([0, 1], big[:2])),
        "mask": lambda: a[a > 0],
        "mask set": lambda: changed(lambda x: x.__setitem__(x > 0, 3)),
        "nonzero": lambda: np.nonzero(a > 0),
        "where": lambda: np.where(a > 0, a, f),
        "choose": lambda: np.choose(np.zeros(5, int), [np.arange(5)] * 2),
        "select": lambda: np.select([a > 1, a > 0], [a, f], 0),
        "putmask": lambda: changed(lambda x: np.putmask(x, x > 0, f)),
        "place": lambda: changed(lambda x: np.place(x, x > 0, [1, 2])),
        "compress": lambda: np.compress([True] * 3, a, 0),
        "repeat": lambda: np.repeat(a, 2),
        "tile": lambda: np.tile(a, (2, 2)),
        "roll": lambda: np.roll(a, 3, axis=1),
        "sum": lambda: a.sum(0),
        "sum all": lambda: f.sum(),
        "sum cast": lambda: np.sum(big, axis=1, dtype="f4"),
        "mean": lambda: a.mean(1),
        "var": lambda: a.var(0),
        "median": lambda: np.median(a, axis=0),
        "percentile": lambda: np.percentile(a, 30, axis=1),
        "argmax": lambda: np.argmax(big, axis=0),
        "cumsum": lambda: np.cumsum(a),
        "clip": lambda: np.clip(a, 0, 1),
        "round": lambda: np.round(a, 2),
        "einsum": lambda: np.einsum("ij,kj->ik", a, f),
        "einsum path": lambda: np.einsum("ij,kj,kl->il", a, a, f, optimize=True),
        "dot": lambda: a.dot(f.T),
        "matmul": lambda: a @ big.T,
        "matmul stacked": lambda: np.stack([a, f]) @ a.T,
        "tensordot": lambda: np.tensordot(a, f, ([1], [1])),
        "inner": lambda: np.inner(a, f),
        "inv": lambda: np.linalg.inv(square),
        "svd": lambda: np.linalg.svd(a),
        "qr": lambda: np.linalg.qr(a),
        "eigh": lambda: np.linalg.eigh(square),
        "solve": lambda: np.linalg.solve(square, a),
        "cholesky": lambda: np.linalg.cholesky(square),
        "lstsq": lambda: np.linalg.lstsq(a, a[:, 0], rcond=None)[0],
        "norm": lambda: np.linalg.norm(a, axis=1),
        "fft": lambda: np.fft.fft(a),
        "rfft2": lambda: np.fft.rfft2(a),
        "irfft": lambda: np.fft.irfft(a, axis=0),
        "concatenate": lambda: np.concatenate([a, big, f]),
        "stack": lambda: np.stack([a, f], axis=-1),
        "block": lambda: np.block([[a, f], [f, a]]),
        "pad": lambda: np.pad(a, 1, mode="reflect"),
        "split": lambda: np.array_split(a, 5),
        "astype": lambda: a.astype("f"),
        "astype words": lambda: a.astype("U9"),
        "astype objects": lambda: a[:2].astype("O"),
        "copy": lambda: a.copy(),
        "reshape": lambda: a.T.reshape(-1),
        "ravel": lambda: f.ravel(),
        "flatten": lambda: f.flatten(),
        "flat": lambda: f.flat[3:9],
        "byteswap": lambda: a.byteswap(),
        "asfortranarray": lambda: np.asfortranarray(a),
        "ascontiguousarray": lambda: np.ascontiguousarray(f),
        "require": lambda: np.require(big, "f4", ["C", "A", "O"]),
        "broadcast_to": lambda: np.broadcast_to(a[:1], (3, 24, 30)).copy(),
        "unique": lambda: np.unique(np.round(a, 1), return_inverse=True),
        "isin": lambda: np.isin(np.arange(9), [1, 2]),
        "bincount": lambda: np.bincount(np.arange(20), np.arange(20.0)),
        "digitize": lambda: np.digitize(a.ravel(), np.arange(4)),
        "searchsorted": lambda: np.searchsorted(np.arange(9.0), a[1]),
        "interp": lambda: np.interp(a.ravel(), np.arange(4.0), np.arange(4.0)),
        "histogram": lambda: np.histogram(a),
        "convolve": lambda: np.convolve(a[0], a[0]),
        "gradient": lambda: np.gradient(a),
        "polyfit": lambda: np.polyfit(np.arange(9.0), np.arange(9.0) ** 2, 2),
        "allclose": lambda: np.allclose(a, f),
        "pickle": lambda: [pickle.loads(text) for text in pickles],
        "dumps": lambda: pickle.dumps(f),
        "save": lambda: np.save(io.BytesIO(), f),
        "savez": lambda: np.savez(io.BytesIO(), a=a),
        "load": lambda: np.load(io.BytesIO(saved.getvalue())),
        "loadtxt": lambda: np.loadtxt(io.StringIO("1 2\n3 4\n" * 200)),
        "genfromtxt": lambda: np.genfromtxt(io.StringIO("1 2\n3 4\n" * 5)),
        "fromstring": lambda: np.fromstring("1 2 3 " * 200, sep=" "),
        "frombuffer": lambda: np.frombuffer(b"12345678", "d").copy(),
        "tobytes": lambda: f.tobytes(),
        "tolist": lambda: a.tolist(),
        "repr": lambda: repr(a[0, :2]),
        "str words": lambda: str(words),
        "words add": lambda: np.char.add(words, words),
        "words upper": lambda: np.char.upper(words),
        "words astype": lambda: words.astype("S9"),
        "words equal": lambda: words == "x3",
        "records sort": lambda: np.sort(records),
        "records field": lambda: records["f1"] + 1,
        "records from": lambda: np.rec.fromarrays([np.arange(3), np.arange(3.0)]).f0,
        "objects equal": lambda: objects == objects,
        "objects add": lambda: numbers + numbers,
        "objects sum": lambda: numbers.sum(),
        "objects copy": lambda: numbers.copy(),
        "days": lambda: days + np.timedelta64(1, "D"),
        "days range": lambda: np.arange("2020-01", "2020-09", dtype="M8[D]"),
        "days words": lambda: np.datetime_as_string(days[:5]),
        "days business": lambda: np.busday_count(days, np.datetime64("2021-01-01")),
        "nditer": lambda: [
            (x.copy(), y.copy())
            for x, y in np.nditer(
                [a, None],
                ["buffered", "external_loop"],
                [["readonly"], ["writeonly", "allocate"]],
                op_dtypes=["f", "d"],
                casting="unsafe",
            )
        ],
        "ndenumerate": lambda: list(np.ndenumerate(a[:2])),
        "vectorize": lambda: np.vectorize(lambda x: x + 1)(a[0]),
        "frompyfunc": lambda: np.frompyfunc(lambda x: x, 1, 1)(a[0]),
        "apply_along_axis": lambda: np.apply_along_axis(np.sum, 0, a),
        "fromfunction": lambda: np.fromfunction(lambda i, j: i + j, (3, 4)),
        "meshgrid": lambda: np.meshgrid(np.arange(3), np.arange(4)),
        "indices": lambda: np.indices((3, 4)),
        "linspace": lambda: np.linspace(0, 1),
        "arange": lambda: np.arange(99),
        "eye": lambda: np.eye(9),
        "tri": lambda: np.tril(a),
        "random": lambda: np.random.RandomState(0).rand(50),
        "randint": lambda: np.random.RandomState(0).randint(0, 9, 50),
        "permutation": lambda: np.random.RandomState(0).permutation(50),
        "choice": lambda: np.random.RandomState(0).choice(50, 5, replace=False),
        "generator": lambda: np.random.default_rng(0).normal(size=9),
        "multinomial": lambda: np.random.default_rng(0).multinomial(9, [0.5, 0.5], 3),
        "item": lambda: a[0].item(3),
        "lists": lambda: np.asarray([[1, 2], [3, 4]], "f") * 2,
    }
    if hasattr(np.dtypes, "StringDType"):
        strings = (a * 50).astype("i2").astype(np.dtypes.StringDType())
        for name in ("sort", "argsort"):
            function = getattr(np, name)
            found[f"{name} strings"] = lambda function=function: function(strings, axis=0)
    return found


def digest(value: Any) -> str:
    """Return a text that tells results apart."""
    if isinstance(value, np.ndarray):
        bits = repr(value.tolist()) if value.dtype.hasobject else value.tobytes().hex()
        return (
            f"{value.dtype}{value.shape}{bits}"
            if value.dtype.hasobject or value.size
            else str(value.shape)
        )
    if isinstance(value, list | tuple):
        return ", ".join(map(digest, value))
    return repr(value)


def sweep(
    name: str, index: int, call: Callable[[], Any], failing: Failing, run: Callable[..., Any]
) -> dict[str, Any]:
    """Make a call fail at each of its allocations.

    Args:
        name: The call's.
        index: Its number: which errors are raised first.
        call: It.
        failing: What NumPy's allocator asks.
        run: Makes a call at the place.
    """
    odd = collections.Counter[str]()
    made = late = 0
    is_comparable = not name.startswith("empty")
    expected = digest(run(call))
    for k in range(MOST):
        error = ERRORS[(k + index) % len(ERRORS)]()
        failing.left, failing.error = k, error
        what = "itself"
        is_late = False
        try:
            try:
                run(call)
                what = "nothing"
            except BaseException as caught:
                what = "itself" if caught is error else f"{caught!r:.80} for {type(error).__name__}"
                del caught
            for _ in range(9):  # between two bytecodes
                pass
        except BaseException as caught:
            is_late = True
            what = "itself" if caught is error else f"{caught!r:.80}, late"
            del caught
        has_failed, failing.left, failing.error = failing.left < 0, -1, None
        if not has_failed:
            if what != "nothing":
                odd[f"{what}, and no allocation has failed"] += 1
            break
        made += 1
        late += is_late
        if what != "itself":
            odd[what] += 1
        try:
            _ArrayMemoryError((3,), np.dtype("f8"))  # NumPy's own says so, whatever was before
        except BaseException as stale:
            odd[f"a stale {type(stale).__name__}"] += 1
        try:
            np.empty(1 << 60, "u1")
        except MemoryError as genuine:
            if "Unable to allocate" not in str(genuine):
                odd[f"instead of NumPy's own error: {genuine}"] += 1
        error.__traceback__ = error.__context__ = error.__cause__ = None
        if sys.getrefcount(error) > 2:
            odd[f"{type(error).__name__} is kept"] += 1
        if is_comparable and digest(run(call)) != expected:
            odd["another result afterwards"] += 1
    else:
        odd["too many allocations"] += 1
    return {"made": made, "late": late, "odd": dict(odd)}


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``work`` does in a forked child, or the signal that ended it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            text = json.dumps(work())
        except BaseException as error:
            text = json.dumps({"made": 0, "late": 0, "odd": {f"the test fails: {error!r}": 1}})
        with open(write, "w") as pipe:
            pipe.write(text)
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return json.loads(text) if text else {"made": 0, "late": 0, "odd": {f"exit status {status}": 1}}


def hook(failing: Failing) -> None:
    """Have all allocations of the calling thread announced."""
    native.allocator.configure(failing, 1, _pool(), 1)
    native.allocator.install()


def _pool() -> Any:
    from chainer_ooc.swap.devices.ram.device import _pool_of_process

    return _pool_of_process()


Place = tuple[Failing, Callable[[Callable[[], Any]], Any]]


def plain() -> Place:
    """Nothing of out-of-core mode but the allocator."""
    failing = Failing()
    hook(failing)
    return failing, lambda call: call()


def _out_of_core() -> Failing:
    """Turn out-of-core mode on with memory short, and add errors to what it does itself."""
    chainer_ooc.enable(limit="1MiB", swap_dir="/var/tmp")
    for manager in state.managers():
        manager.shortages.has_told = True
    F.tanh(F.exp(chainer.Variable(np.ones((64, 1024), "f"))))
    failing = Failing(state._before_allocation)
    hook(failing)
    return failing


def between_functions() -> Place:
    return _out_of_core(), lambda call: call()


class Calling(chainer.FunctionNode):
    """The identity; makes a call forward or backward."""

    def __init__(self, call: Callable[[], Any], is_forward: bool) -> None:
        self.call, self.is_forward, self.result = call, is_forward, None

    def forward(self, inputs: Any) -> Any:
        if self.is_forward:
            self.result = self.call()
        return inputs

    def backward(self, indexes: Any, grads: Any) -> Any:
        if not self.is_forward:
            self.result = self.call()
        return grads


def in_function(is_forward: bool) -> Place:
    failing = _out_of_core()
    x = chainer.Variable(np.ones((3, 4), "f"))

    def run(call: Callable[[], Any]) -> Any:
        left, failing.left = failing.left, -1  # Chainer's own allocations are none of the call's

        def counted() -> Any:
            nonlocal left
            failing.left, left = left, -1
            try:
                return call()
            finally:
                left, failing.left = failing.left, -1

        function = Calling(counted, is_forward)
        try:
            (y,) = function.apply((x,))
            if not is_forward:
                y.grad = np.ones((3, 4), "f")
                y.backward()
            return function.result
        finally:
            failing.left = left

    return failing, run


PLACES: dict[str, tuple[bool, Callable[[], Place]]] = {  # whether in a thread of its own, and how
    "main thread": (False, plain),
    "another thread": (True, plain),
    "between functions": (False, between_functions),
    "forward": (False, lambda: in_function(True)),
    "backward": (False, lambda: in_function(False)),
    "forward in another thread": (True, lambda: in_function(True)),
}


def main(place: str, one_of: int) -> None:
    is_threaded, prepare = PLACES[place]
    results = {}
    for index, (name, call) in enumerate(calls().items()):
        if index % one_of:
            continue

        def work(
            name: str = name, index: int = index, call: Callable[[], Any] = call
        ) -> dict[str, Any]:
            if not is_threaded:
                return sweep(name, index, call, *prepare())
            found: list[dict[str, Any]] = []
            thread = threading.Thread(
                target=lambda: found.append(sweep(name, index, call, *prepare()))
            )
            thread.start()
            thread.join()
            return found[0]

        results[name] = in_child(work)
    print(json.dumps(results))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], int(sys.argv[2]))
