"""What is in force in this process and in this thread: settings, managers, and what runs now."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_ooc.planning.system import MARGIN
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.ram import RamDevice, native
from chainer_ooc.swap.events import Observer
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.observed_growth import ObservedGrowth

if TYPE_CHECKING:
    from chainer_ooc.swap.gpus import Gpus

__all__ = [
    "OFF",
    "announce",
    "array_types",
    "begin_peak",
    "current",
    "current_or_last",
    "end_peak",
    "hook_allocations",
    "local",
    "manager_for",
    "manager_of_ram",
    "managers",
    "note_used",
    "observers",
    "process",
    "unhook_allocations",
    "void_levels",
]

#: NumPy allocations of this size (bytes) and more are announced.
_ANNOUNCED = 1 << 20
#: So many of those that are not announced fit into the margin that the limit leaves for them.
_UNANNOUNCED = 8
#: NumPy arrays of this size (bytes) and more lie in pages that are used again, while memory may get short.
_POOLED = 64 << 10
_UNLIMITED = (1 << 63) - 1

#: Stands for "off" where a thread's modes are stacked.
OFF = object()
_ON_CPU: frozenset[type] = frozenset({np.ndarray})


@dataclasses.dataclass
class Process:
    """What all threads of this process share. A forked child begins with new values.

    Attributes:
        enabled: The settings of :func:`chainer_ooc.enable`; ``None`` while it is off.
        last: The settings that were in force last: for what moves where none are.
        managers: The managers by device, but for the GPUs'.
        gpus: The GPUs' managers; ``None`` until CuPy has been seen.
        announced: From how many bytes on NumPy's allocations ask for room; ``None``: they never have.
        growth: What functions were seen to take, for allocations that cannot be announced.
        describe: Words what ``local.running`` is, for errors.
        lock: Held while managers are made and allocations hooked.
    """

    enabled: Settings | None = None
    last: Settings = dataclasses.field(default_factory=Settings)
    managers: dict[Any, SwapManager] = dataclasses.field(default_factory=dict)
    gpus: Gpus | None = None
    announced: int | None = None
    growth: ObservedGrowth = dataclasses.field(default_factory=ObservedGrowth)
    describe: Callable[[Any], str] = repr
    lock: Any = dataclasses.field(default_factory=threading.RLock)


class _Local(threading.local):
    """What belongs to one thread.

    Attributes:
        stack: The modes that it has entered, the innermost last: settings, or :data:`OFF`.
        running: The function of the graph that runs, and its inputs; ``None`` between two functions.
        read_only: The code that runs now does not write to the arrays it reads.
        hooked: Its large NumPy allocations are announced.
        growth: Where they cannot be announced: what functions were seen to take.
        peak: The most that ``SwapManager.usage_without_offload()`` was while the function ran (bytes).
        uninterrupted: No signal handler runs in the main thread while it has this lock.
    """

    def __init__(self) -> None:
        # What finalizers compute that the collector of garbage runs in a thread of ours must not wait for the engine:
        # that may be waiting for this thread.
        ours = threading.current_thread().name.startswith("chainer_ooc-")
        self.stack: list[Any] = [OFF] if ours else []
        self.running: Any = None
        self.read_only = False
        self.hooked = False
        self.growth: ObservedGrowth | None = None
        self.peak = 0
        self.uninterrupted = native.EngineLock()


process = Process()
local = _Local()
observers: list[Observer] = []  #: who is told what happens in all threads and on all devices


def current() -> Settings | None:
    """Return the settings in force in the calling thread, ``None`` if out-of-core mode is off."""
    if local.stack:
        settings = local.stack[-1]
        return None if settings is OFF else settings
    return process.enabled


def current_or_last() -> Settings:
    """Return the settings in force in the calling thread, or those that were in force last."""
    settings = local.stack[-1] if local.stack else process.enabled
    return process.last if settings is None or settings is OFF else settings


def note_used(nbytes: int) -> None:
    """Note what memory in use would be, had nothing been moved, while a function of this thread runs (bytes)."""
    local.peak = max(local.peak, nbytes)


def array_types() -> frozenset[type]:
    """Return the types of the arrays of all devices."""
    return _ON_CPU if process.gpus is None else _ON_CPU | {process.gpus.array_type}


def manager_for(array: Any) -> SwapManager | None:
    """Return the manager of the device that ``array`` is on; ``None`` for arrays that stay as they are."""
    if type(array) is np.ndarray:
        return process.managers.get("ram")
    if process.gpus is not None and type(array) is process.gpus.array_type:
        return process.gpus.manager_for(array)
    return None


def manager_of_ram() -> SwapManager | None:
    """Return the manager of NumPy's arrays, ``None`` if out-of-core mode has never been on."""
    return process.managers.get("ram")


def managers() -> list[SwapManager]:
    """Return the managers of all devices."""
    gpus = () if process.gpus is None else process.gpus.managers.values()
    return [*process.managers.values(), *gpus]


def hook_allocations() -> None:
    """Have the calling thread's large NumPy allocations announced to the manager from now on.

    Where they cannot be, room is made before each function for what it was seen to take.
    """
    if native.allocator is None:
        local.growth = process.growth
    if local.hooked or native.allocator is None:
        return
    with process.lock:
        announce()
    native.allocator.install()
    local.hooked = True


def announce() -> None:
    """Have allocations announced that matter under the limit in force; those that mattered before, too."""
    manager = process.managers["ram"]
    wanted = _announced_from(manager.limit)
    if process.announced is None or wanted < process.announced:
        device = manager.device
        pool = device.keep_pages() if isinstance(device, RamDevice) else None
        native.allocator.configure(_before_allocation, wanted, pool, _POOLED)
        process.announced = wanted


def _announced_from(limit: int) -> int:
    """Return the size of an allocation (bytes) from which on it matters under a limit."""
    return min(_ANNOUNCED, max(_POOLED, int(limit * MARGIN) // _UNANNOUNCED))


def unhook_allocations() -> None:
    """Stop announcing the calling thread's allocations, and keep no free memory for them."""
    if local.hooked:
        native.allocator.uninstall()
        keep_no_free_memory()
    local.hooked, local.growth = False, None


def keep_no_free_memory() -> None:
    """Give NumPy's free pages back to the system."""
    if (manager := manager_of_ram()) is not None:
        manager.keep_no_free_memory()


def void_levels() -> None:
    """Have the next allocation of each thread ask for room: other settings may be in force."""
    if native.allocator is not None:
        native.allocator.ask_again()


def begin_peak(manager: SwapManager) -> None:
    """Begin to note what a function's announced allocations take; ``manager`` is its device's."""
    if manager is process.managers.get("ram"):
        native.allocator.set_moved_bytes(manager.moved_bytes())
        native.allocator.take_peak()


def end_peak() -> None:
    """Note what those allocations have taken that were granted without asking anybody."""
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
    manager = process.managers["ram"]
    if manager.busy:
        return
    manager.make_room(nbytes)
    used = manager.budget.last_used + nbytes
    local.peak = max(local.peak, manager.usage_without_offload(used))
    if used > manager.limit:
        error = manager.shortage(nbytes, process.describe(local.running))
        if error is not None:
            try:
                raise error
            finally:
                del error  # it would hold this frame, and so those of its callers with their arrays
    native.allocator.set_moved_bytes(manager.moved_bytes())
    native.allocator.set_level(manager.granted_bytes())
