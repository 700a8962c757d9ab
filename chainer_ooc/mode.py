"""Whether out-of-core mode is on, with which settings, and the managers that carry it out."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_ooc.settings import Settings
from chainer_ooc.swap import forks, native
from chainer_ooc.swap.devices.ram import RamDevice
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.observed_growth import ObservedGrowth
from chainer_ooc.swap.observing import Observer
from chainer_ooc.swap.watermarks import MARGIN

if TYPE_CHECKING:
    from chainer_ooc.reporting.trace import Trace
    from chainer_ooc.swap.devices.base import Device
    from chainer_ooc.swap.devices.gpus import Gpus

__all__ = [
    "array_types",
    "current",
    "disable",
    "enable",
    "is_enabled",
    "manager_for",
    "managers",
    "out_of_core_mode",
]

#: NumPy allocations of this size (bytes) and more are announced.
_ANNOUNCED = 1 << 20
#: So many of those that are not announced fit into the margin that the limit leaves for them.
_UNANNOUNCED = 8
#: NumPy arrays of this size (bytes) and more lie in pages that are used again, while memory may get short.
_POOLED = 64 << 10
_UNLIMITED = (1 << 63) - 1

_OFF = object()
_ON_CPU: frozenset[type] = frozenset({np.ndarray})


class _Local(threading.local):
    """The modes that this thread has entered, the innermost last: settings, or off."""

    def __init__(self) -> None:
        # What finalizers compute that the collector of garbage runs in a thread of ours must not wait for the engine:
        # that may be waiting for this thread.
        ours = threading.current_thread().name.startswith("chainer_ooc-")
        self.stack: list[Any] = [_OFF] if ours else []
        self.running: Any = None  # the function of the graph that runs, and its inputs
        self.trusted = False  # the code that runs now leaves the arrays it reads as they are
        self.hooked = False
        # Where this thread's allocations cannot be announced.
        self.growth: ObservedGrowth | None = None
        self.peak = 0  # the highest SwapManager.grown_to() while the function ran (bytes)
        # No signal handler runs in the main thread while it has this.
        self.uninterrupted = native.EngineLock()


local = _Local()
observers: list[Observer] = []  #: who is told what happens in all threads and on all devices
_enabled: Settings | None = None
_last = Settings()
_managers: dict[Any, SwapManager] = {}
_lock = threading.RLock()
_announced: int | None = None  # from how many bytes on NumPy's allocations ask _before_allocation
_growth = ObservedGrowth()
_has_warned = False  # that allocations cannot be announced
_traces: dict[str, Trace] = {}
_gpus: Gpus | None = None


def current() -> Settings | None:
    """Return the settings in force in the calling thread, ``None`` if out-of-core mode is off."""
    if local.stack:
        settings = local.stack[-1]
        return None if settings is _OFF else settings
    return _enabled


def _settings_or_last() -> Settings:
    return current() or _last


def is_enabled() -> bool:
    """Return whether what the calling thread computes now is saved out of core."""
    return current() is not None


def enable(**given: Any) -> None:
    """Turn out-of-core mode on, in all threads. See :func:`chainer_ooc.enable`."""
    global _enabled
    settings = Settings.resolve(given)
    _prepare(settings)
    _enabled = settings
    _void_levels()
    _write_traces()


def disable() -> None:
    """Turn it off. What was saved until then is restored when it is read, as before."""
    global _enabled
    _enabled = None
    _void_levels()
    _unhook_allocations()
    _keep_no_free_memory()  # nor for other threads
    if _gpus is not None:
        _gpus.disable()
    _write_traces()


@contextlib.contextmanager
def out_of_core_mode(on: bool, given: dict[str, Any]) -> Iterator[None]:
    """Turn it on, or off, in the calling thread, for a ``with``."""
    entry: Any = _OFF
    if on:
        entry = Settings.resolve(given, current())
        _prepare(entry)
    local.stack.append(entry)
    _void_levels()
    try:
        yield
    finally:
        _leave(entry)
        _void_levels()
        if current() is None:
            _unhook_allocations()
        if _gpus is not None:
            settings = current()
            if settings is not None:
                _gpus.enable(settings)
            elif _enabled is None:
                _gpus.disable()
        _write_traces()


def _leave(entry: Any) -> None:
    """Take back the last such entry: generators leave in any order, and a forked child has none."""
    for index in reversed(range(len(local.stack))):
        if local.stack[index] is entry:
            del local.stack[index]
            return


def _prepare(settings: Settings) -> None:
    """Check what only the machine can tell, and patch Chainer."""
    from chainer_ooc.graph import backprop

    global _last
    backprop.install()
    _warn_without_extension()
    with _lock:
        _last = settings
        manager = _managers.get("ram") or _make_ram_manager(settings)
        device: Any = manager.device
        device.move_to(settings.directory)
        local.stack.append(settings)
        try:
            manager.limit  # noqa: B018  # what None means is what is free now, not when memory gets short
            if _announced is not None:
                _announce()
            _prepare_gpus(settings)
        finally:
            local.stack.pop()
        if settings.trace is not None and settings.trace not in _traces:
            _begin_trace(settings.trace)


def _warn_without_extension() -> None:
    """Say once in a process what is different where the package was built without its C extension."""
    global _has_warned
    if native.allocator is None and not _has_warned:
        _has_warned = True
        message = (
            f"chainer_ooc has no C extension here: {native.WITHOUT_IT}; {native.HOW_TO_GET_IT}"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=5)  # where enable() was called


def _make_ram_manager(settings: Settings) -> SwapManager:
    manager = _managers["ram"] = _make_manager(RamDevice(settings.directory))
    return manager


def _make_manager(device: Device) -> SwapManager:
    from chainer_ooc.graph import backprop

    trusted = lambda: local.trusted  # noqa: E731
    return SwapManager(device, _settings_or_last, backprop.adopt, trusted, observers)


def _prepare_gpus(settings: Settings) -> None:
    global _gpus
    cupy = sys.modules.get("cupy")  # Chainer has imported it if it can be imported
    if _gpus is None and cupy is not None and cupy.cuda.is_available():
        from chainer_ooc.graph.backprop import describe
        from chainer_ooc.swap.devices.gpus import Gpus

        _gpus = Gpus(cupy, _make_manager, current, lambda: describe(local.running), note_used)
    if _gpus is not None:
        _gpus.enable(settings)


def _begin_trace(path: str) -> None:
    from chainer_ooc.reporting.trace import Trace

    def facts() -> dict[str, Any]:
        from chainer_ooc.api import stats
        from chainer_ooc.reporting.plans import plans

        planned = [dataclasses.asdict(one) for one in plans()]
        figures = {"stats": dataclasses.asdict(stats()), "plan": planned[0] if planned else None}
        return {"settings": dataclasses.asdict(_last), **figures}

    _traces[path] = Trace(path, facts)
    observers.append(_traces[path])


def _write_traces() -> None:
    """Write the traces that no mode asks for any more."""
    wanted = {mode.trace for mode in (_enabled, *local.stack) if isinstance(mode, Settings)}
    for path in _traces.keys() - wanted:
        trace = _traces.pop(path)
        observers.remove(trace)
        trace.write()


@atexit.register
def _write_last_traces() -> None:
    while _traces:
        _traces.popitem()[1].write()


def note_used(nbytes: int) -> None:
    """Tell what memory in use would be, had nothing been moved, while a function of this thread runs (bytes)."""
    local.peak = max(local.peak, nbytes)


def array_types() -> frozenset[type]:
    """Return the types of the arrays of all devices."""
    return _ON_CPU if _gpus is None else _ON_CPU | {_gpus.array_type}


def manager_for(array: Any) -> SwapManager | None:
    """Return the manager of the device that ``array`` is on; ``None`` for arrays that stay as they are."""
    if type(array) is np.ndarray:
        return _managers.get("ram")
    if _gpus is not None and type(array) is _gpus.array_type:
        return _gpus.manager_for(array)
    return None


def manager_of_ram() -> SwapManager | None:
    """Return the manager of the arrays of NumPy, if out-of-core mode has ever been on."""
    return _managers.get("ram")


def managers() -> list[SwapManager]:
    """Return the managers there are."""
    return [*_managers.values(), *(_gpus.managers.values() if _gpus is not None else ())]


def hook_allocations() -> None:
    """Have the calling thread's large NumPy allocations announced to the manager from now on.

    Where they cannot be, room is made before each function for what it was seen to take.
    """
    if native.allocator is None:
        local.growth = _growth
    if local.hooked or native.allocator is None:
        return
    with _lock:
        _announce()
    native.allocator.install()
    local.hooked = True


def _announce() -> None:
    """Have allocations announced that matter under the limit in force; those that mattered before, too."""
    global _announced
    manager = _managers["ram"]
    wanted = min(_ANNOUNCED, max(_POOLED, int(manager.limit * MARGIN) // _UNANNOUNCED))
    if _announced is None or wanted < _announced:
        device = manager.device
        pool = device.keep_pages() if isinstance(device, RamDevice) else None
        native.allocator.configure(_before_allocation, wanted, pool, _POOLED)
        _announced = wanted


def _unhook_allocations() -> None:
    """Announce the calling thread's no more, and keep no free memory for them."""
    if local.hooked:
        native.allocator.uninstall()
        _keep_no_free_memory()
    local.hooked, local.growth = False, None


def _keep_no_free_memory() -> None:
    if (manager := _managers.get("ram")) is not None:
        manager.keep_no_free_memory()


def _void_levels() -> None:
    """Have the next allocation of each thread ask for room: other settings may be in force."""
    if native.allocator is not None:
        native.allocator.ask_again()


def begin_peak(manager: SwapManager) -> None:
    """Begin to take note of the most memory that a function takes; ``manager`` is its device's."""
    if local.hooked and manager is _managers.get("ram"):
        native.allocator.set_moved_bytes(manager.moved_bytes())
        native.allocator.take_peak()


def end_peak() -> None:
    """Take note of what the allocations have taken that were granted with nobody asked."""
    if local.hooked:
        local.peak = max(local.peak, native.allocator.take_peak())


def _before_allocation(nbytes: int) -> None:
    """Make room for an allocation of a NumPy array.

    Raises:
        OutOfMemoryError: If there is none, and the mode is ``strict``.
        SwapSpaceError: If there is no more space outside.
    """
    if current() is None:
        native.allocator.set_level(_UNLIMITED)
        return
    manager = _managers["ram"]
    if manager.busy:
        return
    manager.make_room(nbytes)
    used = manager.marks.last_used + nbytes
    local.peak = max(local.peak, manager.grown_to(used))
    if used > manager.limit:
        from chainer_ooc.graph.backprop import describe

        error = manager.shortage(nbytes, describe(local.running))
        if error is not None:
            try:
                raise error
            finally:
                del error  # it would hold this frame, and so those of its callers with their arrays
    native.allocator.set_moved_bytes(manager.moved_bytes())
    native.allocator.set_level(manager.granted_bytes())


def _after_fork() -> None:
    """A child begins with out-of-core mode off, with no threads, and lets its parent's file alone."""
    global _enabled, _managers, _lock, _announced, _growth, _gpus
    if local.hooked:
        native.allocator.uninstall()
    _enabled = _announced = None
    for manager in _managers.values():
        manager.after_fork()
    if _gpus is not None:
        _gpus.after_fork()
    _managers, _gpus, _lock = {}, None, threading.RLock()
    _growth = ObservedGrowth()
    _traces.clear()
    observers.clear()
    local.__init__()  # type: ignore[misc]


forks.register(_after_fork)
