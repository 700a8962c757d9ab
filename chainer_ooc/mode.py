"""Whether out-of-core mode is on, with which settings, and the managers that carry it out."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.numpy_allocator import AllocatorHook
from chainer_ooc.swap.devices.ram import RamDevice
from chainer_ooc.swap.manager import SwapManager

__all__ = [
    "current",
    "disable",
    "enable",
    "is_enabled",
    "manager_for",
    "managers",
    "out_of_core_mode",
]

#: NumPy allocations smaller than this (bytes) are not announced.
_ANNOUNCED = 1 << 20

_OFF = object()


class _Local(threading.local):
    """The modes that this thread has entered, the innermost last: settings, or off."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.running: Any = None  # the function of the graph that runs, and its inputs
        self.trusted = False  # the code that runs now leaves the arrays it reads as they are
        self.hooked = False
        self.error: BaseException | None = None
        self.peak = 0  # most memory in use while the function ran, as announced (bytes)


local = _Local()
_enabled: Settings | None = None
_last = Settings()
_managers: dict[Any, SwapManager] = {}
_lock = threading.RLock()
_hook: AllocatorHook | None = None


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


def disable() -> None:
    """Turn it off. What was saved until then is restored when it is read, as before."""
    global _enabled
    _enabled = None
    if _hook is not None:
        _hook.uninstall()
    local.hooked = False


@contextlib.contextmanager
def out_of_core_mode(on: bool, given: dict[str, Any]) -> Iterator[None]:
    """Turn it on, or off, in the calling thread, for a ``with``."""
    entry: Any = _OFF
    if on:
        entry = Settings.resolve(given, current())
        _prepare(entry)
    local.stack.append(entry)
    try:
        yield
    finally:
        local.stack.pop()
        if current() is None and local.hooked and _hook is not None:
            _hook.uninstall()
            local.hooked = False


def _prepare(settings: Settings) -> None:
    """Check what only the machine can tell, and patch Chainer."""
    from chainer_ooc.graph import backprop

    global _last
    backprop.install()
    with _lock:
        _last = settings
        manager = _managers.get("ram")
        if manager is None:
            manager = _make_ram_manager(settings)
        else:
            manager.device.move_to(settings.directory)  # type: ignore[attr-defined]
        local.stack.append(settings)
        try:
            manager.limit  # noqa: B018  # what None means is what is free now, not when memory gets short
        finally:
            local.stack.pop()


def _make_ram_manager(settings: Settings) -> SwapManager:
    from chainer_ooc.graph import backprop

    manager = SwapManager(
        RamDevice(settings.directory), _settings_or_last, backprop.adopt, lambda: local.trusted
    )
    _managers["ram"] = manager
    return manager


def manager_for(array: Any) -> SwapManager | None:
    """Return the manager of the device that ``array`` is on; ``None`` for arrays that stay as they are."""
    if type(array) is np.ndarray:
        return _managers.get("ram")
    return None


def managers() -> list[SwapManager]:
    """Return the managers there are."""
    return list(_managers.values())


def hook_allocations() -> None:
    """Have the calling thread's large NumPy allocations announced to the manager from now on."""
    global _hook
    if not local.hooked:
        with _lock:
            if _hook is None:
                _hook = AllocatorHook(_before_allocation, _ANNOUNCED)
        _hook.install()
        local.hooked = True


def _before_allocation(nbytes: int) -> bool:
    """Make room for an allocation. Called by NumPy: an error is kept, and raised by the function that runs."""
    from chainer_ooc.graph.backprop import describe

    if current() is None:
        return True
    manager = _managers["ram"]
    if manager.busy:
        return True
    try:
        manager.make_room(nbytes)
        used = manager.device.used_bytes() + nbytes
        local.peak = max(local.peak, used)
        if used > manager.limit:
            error = manager.shortage(nbytes, describe(local.running))
            if error is not None:
                raise error
    except BaseException as error:
        # Between functions nobody would turn NumPy's MemoryError into this one.
        if local.running is not None:
            local.error = error
            return False
    return True


def _after_fork() -> None:
    """A child begins with out-of-core mode off, with no threads, and lets its parent's file alone."""
    global _enabled, _managers, _lock, _hook
    if _hook is not None:
        _hook.uninstall()
    _enabled = None
    for manager in _managers.values():
        manager.after_fork()
    _managers, _lock = {}, threading.RLock()
    local.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_after_fork)
