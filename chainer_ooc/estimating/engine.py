"""Run the engine on arrays without elements: its own recorder makes the profile of the iteration."""

from __future__ import annotations

import contextlib
import math
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from chainer_ooc import state
from chainer_ooc.estimating import on_gpu
from chainer_ooc.estimating.ledger import BETWEEN, Ledger
from chainer_ooc.estimating.shape_array import ShapeArray, layout_axes, memory_of
from chainer_ooc.graph import hooks
from chainer_ooc.graph.iteration import IterationTracker
from chainer_ooc.graph.recompute import Recipes
from chainer_ooc.planning.plan_cache import Conditions
from chainer_ooc.planning.profile import Profile
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.cuda.device import FINGERPRINTED
from chainer_ooc.swap.devices.protocol import Layout, Location
from chainer_ooc.swap.devices.ram import RamDevice
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.storage import PackedArray, Storage

__all__ = ["ShapeTracker", "recording"]

#: Nothing moves while an iteration is recorded.
_UNLIMITED = 1 << 62


class ShapeDevice(RamDevice):
    """Memory that is counted and does not exist.

    Args:
        ledger: The ledger that counts the arrays.
        process_bytes: The memory of the process itself (bytes).
        is_gpu: The arrays stand in for those of a GPU.
    """

    name = "shapes"
    asks_for_room = True
    stand_in = np.empty(0, np.uint8).view(ShapeArray)

    def __init__(self, ledger: Ledger, process_bytes: int, is_gpu: bool) -> None:
        super().__init__(tempfile.gettempdir())
        self.ledger = ledger
        self.is_gpu = is_gpu
        self.process_bytes = process_bytes

    def locate(self, array: Any) -> Location | None:
        """Return the place of an array, as the device that it stands in for does."""
        if type(array) is np.ndarray:
            return super().locate(array)
        owner = array
        while type(owner.base) is ShapeArray:
            owner = owner.base
        memory = memory_of(owner)
        if memory is None or owner.base is not memory or owner.nbytes != memory.nbytes:
            return None
        start = owner.__array_interface__["data"][0]
        return Location(owner, owner.nbytes, start, array.__array_interface__["data"][0] - start)

    def view(self, owner: Any, origin: int, layout: Layout) -> Any:
        """Return an array with ``layout`` in ``owner``, with ``owner`` as its base."""
        if type(owner) is np.ndarray:
            return super().view(owner, origin, layout)
        buffer = owner.transpose(layout_axes(owner))
        shape, strides = layout.shape, layout.strides
        return np.ndarray.__new__(
            ShapeArray, shape, layout.dtype, buffer, origin + layout.offset, strides
        )

    def used_bytes(self) -> int:
        """Return the memory of the process and of the arrays (bytes)."""
        return self.process_bytes + self.ledger.live_bytes

    def fingerprint_bandwidth(self) -> float:
        """Return the bytes per second of which the device's fingerprints are taken."""
        return FINGERPRINTED if self.is_gpu else super().fingerprint_bandwidth()

    def trim(self, desperate: bool = False) -> None:
        """Do nothing: there is no memory to give back."""


class ShapeTracker(IterationTracker):
    """Record every iteration, and plan none.

    Attributes:
        profile: The last iteration that has ended; its times mean nothing.
        begins: The first segment of the ledger for each of its steps.
        left_over: The bytes that the previous graph still saves when each step begins.
    """

    profile: Profile

    def __init__(self, manager: SwapManager, device: ShapeDevice) -> None:
        super().__init__(manager)
        self.begins: list[int] = []
        self.left_over: list[int] = []
        self._old: list[weakref.ref[Storage]] = []
        self._device = device
        self._ledger = device.ledger
        self._segment = self._ledger.segment
        self._first_event = self._start_bytes = self._after = 0

    def forward(
        self, func: Any, inputs: Iterable[Any], settings: Settings, is_fresh: bool = False
    ) -> None:
        """Note that a function is about to run forward, and its inputs' size."""
        super().forward(func, inputs, settings, is_fresh)
        self._segment.in_bytes = sum(getattr(x, "_data", (x,))[0].nbytes for x in inputs)

    def finish(self) -> None:
        """End the iteration. Memory is as when the next one begins."""
        with self._lock:
            self._end(0.0, self._conditions)

    def saved(self, func: Any, group: Iterable[PackedArray]) -> None:
        """Note the arrays that were saved for the function that has just run forward, and its outputs' size."""
        super().saved(func, group)
        if func.outputs is not None:  # else it has no graph, and no step
            outputs = (reference() for reference in func.outputs)
            sizes = (math.prod(y.shape) * y.dtype.itemsize for y in outputs if y is not None)
            self._segment.out_bytes = sum(sizes)

    def wants_recipes(self, func: Any, settings: Settings) -> Recipes | None:
        """Return which recipes to write for the function that has just run forward, ``None`` for none."""
        recipes = super().wants_recipes(func, settings)
        if recipes is not None and self._device.is_gpu and not on_gpu.runs_again(func):
            return Recipes.OF_SAVED
        return recipes

    def ran(self, peak: int) -> None:
        """Note that a function has run. The ledger knows the peak, which on a GPU is not that of NumPy's code."""
        ledger = self._ledger
        high = ledger.high_bytes
        if self._device.is_gpu:
            high = self._start_bytes + ledger.survivors(self._first_event)
            if on_gpu.takes_workspace(self._segment.name):
                high += on_gpu.workspace_limit()
        super().ran(self._device.process_bytes + high)
        ledger.begin("", BETWEEN)
        self._after = len(ledger.segments) - 1

    def _step(
        self, key: str, label: str, phase: str, inputs: tuple[str, ...], function: int = -1
    ) -> None:
        super()._step(key, label, phase, inputs, function)
        ledger = self._ledger
        ledger.high_bytes = self._start_bytes = ledger.live_bytes
        self._first_event = len(ledger.events)
        if not self._number:
            self.begins, self.left_over = [], []
            self._old = [weakref.ref(storage) for storage in self.manager.storages()]
        self._note_left_over()
        self.begins.append(len(ledger.segments))
        self._segment = ledger.begin(label, phase)
        if function >= 0:
            forward = ledger.segments[self.begins[function]]
            self._segment.in_bytes, self._segment.out_bytes = forward.in_bytes, forward.out_bytes

    def _end(self, seconds: float, now: Conditions) -> None:
        assert self._recorder is not None
        self.profile = self._profile(self._recorder, [])
        self.begins.append(self._after)
        self._note_left_over()

    def _note_left_over(self) -> None:
        living = (reference() for reference in self._old)
        self.left_over.append(sum(storage.nbytes for storage in living if storage is not None))


@contextlib.contextmanager
def recording(ledger: Ledger, process_bytes: int, is_gpu: bool) -> Iterator[ShapeTracker]:
    """Record the iterations that the calling thread runs on arrays without elements.

    Args:
        ledger: The ledger that counts the arrays.
        process_bytes: The memory of the process itself (bytes).
        is_gpu: The arrays stand in for those of a GPU.
    """
    hooks.install()
    state.register_arrays(ShapeArray, _manager_of)
    device, unlimited = ShapeDevice(ledger, process_bytes, is_gpu), Settings(limit=_UNLIMITED)
    manager = SwapManager(
        device, lambda: unlimited, hooks.save_pending, lambda: state.local.read_only
    )
    manager.has_been_short = True  # the engine looks at iterations only then
    manager.tracker = tracker = ShapeTracker(manager, device)
    ledger.manager = manager
    entry, local = Settings(limit=state.current_or_last().limit), state.local
    outer, local.manager = local.manager, manager
    local.stack.append(entry)
    state.void_levels()
    try:
        yield tracker
    finally:
        local.stack.remove(entry)
        local.manager = outer
        state.void_levels()


def _manager_of(array: Any) -> SwapManager | None:
    memory = memory_of(array)
    return None if memory is None else memory.ledger.manager
