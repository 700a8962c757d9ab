"""Choosing convolution algorithms: by heuristics or a timed search, under a workspace limit."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy

from chainer_ooc.compat.cudnn import device, math_mode
from chainer_ooc.compat.cudnn.constants import CUDNN_DETERMINISTIC
from chainer_ooc.compat.cudnn.descriptors import Descriptor
from chainer_ooc.compat.cudnn.errors import CuDNNError
from chainer_ooc.compat.cudnn.library import loaded
from chainer_ooc.compat.cudnn.prototypes import AlgorithmPerformance

__all__ = [
    "BACKWARD_DATA",
    "BACKWARD_FILTER",
    "FORWARD",
    "Algorithm",
    "Direction",
    "Plan",
    "note",
    "pinned",
    "run",
    "that_made",
]

#: More than cuDNN has algorithms times math types for one direction.
_REQUESTED = 32


@dataclass(frozen=True, eq=False)
class Direction:
    """The C functions of one of a convolution's three computations; all take the same order.

    Attributes:
        deterministic: The numbers of the algorithms that give the same bits at every run, the ones
            that suit most shapes first, as cuDNN's headers describe them.
        others: The rest.
    """

    name: str
    deterministic: tuple[int, ...]
    others: tuple[int, ...]
    heuristics: str
    search: str
    workspace_size: str
    compute: str


def _direction(
    name: str, middle: str, deterministic: tuple[int, ...], others: tuple[int, ...]
) -> Direction:
    return Direction(
        name,
        deterministic,
        others,
        f"cudnnGetConvolution{middle}Algorithm_v7",
        f"cudnnFindConvolution{middle}AlgorithmEx",
        f"cudnnGetConvolution{middle}WorkspaceSize",
        f"cudnnConvolution{middle}",
    )


#: From (x, W) to y.
FORWARD = _direction("forward", "Forward", (1, 0, 2, 6, 7, 4, 5), ())
#: From (W, gy) to gx.
BACKWARD_DATA = _direction("backward data", "BackwardData", (1, 4, 5, 2, 3), (0,))
#: From (x, gy) to gW.
BACKWARD_FILTER = _direction("backward filter", "BackwardFilter", (1, 5, 2, 6), (0, 3))


@dataclass(frozen=True)
class Algorithm:
    """One way to compute.

    Attributes:
        number: cuDNN's number of it.
        memory: Its workspace (bytes).
        math_type: The math type to run it with.
        deterministic: Whether cuDNN says that it gives the same bits at every run.
    """

    number: int
    memory: int
    math_type: int
    deterministic: bool = field(default=False, compare=False)


class _Thread(threading.local):
    """What the calling thread's last convolution ran with, and what its convolutions have to run with."""

    last: tuple[weakref.ref[Any], Algorithm] | None = None
    pinned: Algorithm | None = None


_thread = _Thread()


def note(output: Any, algorithm: Algorithm) -> None:
    """Note what has computed an array, for :func:`that_made`."""
    _thread.last = weakref.ref(output), algorithm


def that_made(array: Any) -> Algorithm | None:
    """Return what has computed an array, if the calling thread's last convolution did, else ``None``."""
    last = _thread.last
    return last[1] if last is not None and array is not None and last[0]() is array else None


@contextlib.contextmanager
def pinned(algorithm: Algorithm) -> Iterator[None]:
    """Let the calling thread's convolutions run with one algorithm and no other.

    Without it the choice may be another one at the next run: when there is no memory for the workspace, or when the
    timed search is made only then.
    """
    before, _thread.pinned = _thread.pinned, algorithm
    try:
        yield
    finally:
        _thread.pinned = before


@dataclass
class Plan:
    """What one convolution of given shapes runs with.

    Attributes:
        direction: Which of the three computations.
        dtype: Of all arrays.
        first: Descriptors in the order of the C functions.
        second: See ``first``.
        output: See ``first``.
        convolution: Returns the convolution descriptor for a math type.
        math_type: What was asked for.
        deterministic: Whether only deterministic algorithms may serve.
        limit: Workspace limit, bytes.
        describe: Shapes and parameters in words, for messages.
        chosen: By the heuristics, best first; ``None``: not asked yet.
        tuned: By the search, fastest first; ``None``: not asked yet.
        spare: All that accept the shapes, for when neither names one that runs.
    """

    direction: Direction
    dtype: numpy.dtype
    first: Descriptor
    second: Descriptor
    output: Descriptor
    convolution: Callable[[int], Descriptor]
    math_type: int
    deterministic: bool
    limit: int
    describe: str
    chosen: list[Algorithm] | None = None
    tuned: list[Algorithm] | None = None
    spare: list[Algorithm] | None = None
    #: Algorithms that turned out not to run, and whether less workspace than planned was announced.
    refused: set[Algorithm] = field(default_factory=set)
    announced: bool = False

    def _sized(
        self, handle: int, number: int, math_type: int, deterministic: bool
    ) -> Algorithm | None:
        """Return an algorithm with its workspace, ``None`` if it does not accept the shapes.

        The size is for the very descriptors that it will run with; the heuristics and the search
        may know that of another math type.
        """
        try:
            memory = loaded().size(
                self.direction.workspace_size,
                handle,
                self.first.value,
                self.second.value,
                self.convolution(math_type).value,
                self.output.value,
                number,
            )
        except device.OutOfMemoryError:
            raise
        except CuDNNError:
            return None
        return Algorithm(number, memory, math_type, deterministic)

    def _usable(self, handle: int, found: Iterable[AlgorithmPerformance]) -> list[Algorithm]:
        """Return the algorithms that may serve, in the order found; last those above the limit."""
        usable: dict[Algorithm, None] = {}
        for entry in found:
            if entry.status or not math_mode.allowed(self.math_type, entry.mathType, self.dtype):
                continue
            deterministic = entry.determinism == CUDNN_DETERMINISTIC
            if self.deterministic and not deterministic:
                continue
            math_type = math_mode.to_run(self.math_type, entry.mathType)
            algorithm = self._sized(handle, entry.algo, math_type, deterministic)
            if algorithm is not None:
                usable[algorithm] = None
        return self._within_first(usable)

    def _within_first(self, algorithms: Iterable[Algorithm]) -> list[Algorithm]:
        given = list(algorithms)
        within = [algorithm for algorithm in given if algorithm.memory <= self.limit]
        above = [algorithm for algorithm in given if algorithm.memory > self.limit]
        return within + sorted(above, key=lambda algorithm: algorithm.memory)

    def rest(self, handle: int) -> Iterator[Algorithm]:
        """Yield every algorithm that accepts the shapes with the math type that was asked for.

        cuDNN may recommend only algorithms of a math type that is not allowed, or none at all.
        """
        if self.spare is None:
            numbers = [(number, True) for number in self.direction.deterministic]
            if not self.deterministic:
                numbers += [(number, False) for number in self.direction.others]
            sized = (self._sized(handle, n, self.math_type, same) for n, same in numbers)
            self.spare = self._within_first(algorithm for algorithm in sized if algorithm)
        yield from self.spare

    def heuristic(self, handle: int) -> list[Algorithm]:
        """Return what cuDNN's heuristics recommend, best first. The same at every run."""
        if self.chosen is None:
            results, count = (AlgorithmPerformance * _REQUESTED)(), ctypes.c_int()
            try:
                getattr(loaded(), self.direction.heuristics)(
                    handle,
                    self.first.value,
                    self.second.value,
                    self.convolution(self.math_type).value,
                    self.output.value,
                    _REQUESTED,
                    ctypes.byref(count),
                    results,
                )
            except CuDNNError as error:
                if not error.not_supported:
                    raise
                count.value = 0
            self.chosen = self._usable(handle, results[: count.value])
        return self.chosen

    def search(self, handle: int, first: int, second: int, output: int) -> list[Algorithm]:
        """Return what runs fastest, by trying all on the arrays at the given addresses.

        ``output`` is overwritten.
        Without memory for a workspace of the limit's size, the heuristics answer, and the next call
        tries again. They also answer where cuDNN cannot search.
        """
        if self.tuned is None:
            try:
                workspace = device.allocate(self.limit)
            except device.OutOfMemoryError:
                return self.heuristic(handle)
            results, count = (AlgorithmPerformance * _REQUESTED)(), ctypes.c_int()
            try:
                getattr(loaded(), self.direction.search)(
                    handle,
                    self.first.value,
                    first,
                    self.second.value,
                    second,
                    self.convolution(self.math_type).value,
                    self.output.value,
                    output,
                    _REQUESTED,
                    ctypes.byref(count),
                    results,
                    workspace.ptr,
                    self.limit,
                )
            except device.OutOfMemoryError:
                return self.heuristic(handle)
            except CuDNNError as error:
                if not error.not_supported:
                    raise
                count.value = 0
            # What the search could not run in this workspace may still be needed.
            self.tuned = self._usable(handle, results[: count.value]) or self.heuristic(handle)
        return self.tuned


def run(
    plan: Plan,
    handle: int,
    one: int,
    zero: int,
    first: int,
    second: int,
    output: int,
    auto_tune: bool,
) -> Algorithm:
    """Compute with the first algorithm whose workspace can be had and that cuDNN can run. Return it.

    Args:
        plan: The shapes and the choice.
        handle: From :func:`.handles.get_handle`.
        one: Addresses of the blend factors.
        zero: See ``one``.
        first: Addresses of the arrays, in the order of the direction.
        second: See ``first``.
        output: See ``first``.
        auto_tune: Whether to time all algorithms at the first call with these shapes.

    Raises:
        OutOfMemoryError: If no algorithm's workspace can be had, or cuDNN has no memory for itself.
        CuDNNError: If cuDNN has no algorithm for this, or it fails.
    """
    compute = getattr(loaded(), plan.direction.compute)
    algorithms: Iterable[Algorithm]
    if _thread.pinned is not None:
        algorithms = (_thread.pinned,)
    else:
        found = plan.search(handle, first, second, output) if auto_tune else plan.heuristic(handle)
        algorithms = itertools.chain(found, plan.rest(handle))
    shortage: BaseException | None = None
    failure: CuDNNError | None = None
    refused_size = None
    reason = ""
    tried: set[Algorithm] = set()
    made_room = False
    for algorithm in algorithms:
        if algorithm in plan.refused or algorithm in tried:
            continue
        if refused_size is not None and algorithm.memory >= refused_size:
            continue
        tried.add(algorithm)
        workspace = None
        if algorithm.memory:
            try:
                workspace = device.allocate(algorithm.memory)
            except device.OutOfMemoryError as error:
                shortage, refused_size = error.with_traceback(None), algorithm.memory
                reason = reason or f"no memory for a workspace of {refused_size} bytes"
                continue
        arguments = (
            handle,
            one,
            plan.first.value,
            first,
            plan.second.value,
            second,
            plan.convolution(algorithm.math_type).value,
            algorithm.number,
            workspace.ptr if workspace is not None else None,
            algorithm.memory,
            zero,
            plan.output.value,
            output,
        )
        try:
            try:
                compute(*arguments)
            except device.OutOfMemoryError:
                if made_room:
                    raise
                made_room = True
                device.make_room()
                compute(*arguments)
        except device.OutOfMemoryError as error:
            shortage = error.with_traceback(None)
            reason = reason or "no memory for what cuDNN allocates itself"
            continue
        except CuDNNError as error:
            if not error.not_supported:
                raise
            plan.refused.add(algorithm)
            failure = error
            continue
        if reason and not plan.announced:
            plan.announced = True
            _announce(plan, reason, algorithm)
        return algorithm
    try:
        raise (
            shortage
            or failure
            or CuDNNError(
                3000, plan.direction.compute, "no algorithm of cuDNN serves", plan.describe
            )
        )
    finally:
        # They would hold this frame, and so those of its callers with their arrays.
        del shortage, failure


def _announce(plan: Plan, reason: str, algorithm: Algorithm) -> None:
    warnings.warn(
        f"convolution {plan.direction.name} ({plan.describe}): {reason}, algorithm "
        f"{algorithm.number} with a workspace of {algorithm.memory} bytes runs instead: slower, and "
        "its last bits may differ",
        RuntimeWarning,
        stacklevel=4,
    )
