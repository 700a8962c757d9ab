"""The state of this process and of each thread: settings in force, managers, the running function."""

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
    "keep_no_free_memory",
    "local",
    "manager_for",
    "manager_of_ram",
    "managers",
    "note_used",
    "observers",
    "process",
    "register_arrays",
    "unhook_allocations",
    "void_levels",
]

#: NumPy allocations of this size (bytes) and more ask for room, under a small limit even smaller ones.
_ANNOUNCED = 1 << 20
#: The number of largest unannounced allocations that fit into the limit's margin.
_UNANNOUNCED = 8
#: NumPy arrays of this size (bytes) and more lie in the page pool, while memory may get short.
_POOLED = 64 << 10
_UNLIMITED = (1 << 63) - 1

#: An entry of a thread's stack of modes that means "off".
OFF = object()
# The types of arrays besides CuPy's, and what finds the manager of those that are not NumPy's either.
_types: frozenset[type] = frozenset({np.ndarray})
_finders: dict[type, Callable[[Any], SwapManager | None]] = {}


@dataclasses.dataclass
class Process:
    """The state that all threads of this process share. A forked child begins with a new one.

    Attributes:
        enabled: The settings of :func:`chainer_ooc.enable`; ``None`` while it is off.
        last: The settings that were last in force, for moves while none are.
        managers: The managers by device, except those of GPUs.
        gpus: The GPUs with their managers; ``None`` until CuPy is imported.
        announced: The size (bytes) from which NumPy's allocations ask for room; ``None`` before they ever
            have.
        growth: The memory that functions took, if allocations cannot be announced.
        describe: Takes ``local.running`` and returns words for it, for errors.
        inherit: Called before the first function that trains in a child of a process in out-of-core mode: turns the
            mode on, or says that it is off. ``None`` in all other processes.
        lock: Protects the making of managers and the hooking of allocations.
    """

    enabled: Settings | None = None
    last: Settings = dataclasses.field(default_factory=Settings)
    managers: dict[Any, SwapManager] = dataclasses.field(default_factory=dict)
    gpus: Gpus | None = None
    announced: int | None = None
    growth: ObservedGrowth = dataclasses.field(default_factory=ObservedGrowth)
    describe: Callable[[Any], str] = repr
    inherit: Callable[[], None] | None = None
    lock: Any = dataclasses.field(default_factory=threading.RLock)


class _Local(threading.local):
    """The state of one thread.

    Attributes:
        stack: The modes that the thread has entered, the innermost last: settings, or :data:`OFF`.
        running: The running function of the graph, and its inputs; ``None`` between two functions.
        read_only: The running code does not write to the arrays that it reads.
        using: The stand-ins of the parameters that the running function reads and does not write to.
        held: The stand-ins whose arrays the running functions refer to.
        in_backward: A function's backward runs.
        hooked: The thread's large NumPy allocations ask for room.
        growth: The memory that functions took, if allocations cannot ask for room.
        manager: The manager of the functions that the thread runs on NumPy's arrays, if not that of the RAM.
        peak: The highest ``SwapManager.usage_without_offload()`` while the function ran (bytes).
        uninterrupted: A lock. While the main thread has it, no signal handler runs.
    """

    def __init__(self) -> None:
        # Garbage collection may run finalizers in our threads. Their computations must not wait for the engine, which
        # may be waiting for this thread.
        ours = threading.current_thread().name.startswith("chainer_ooc-")
        self.stack: list[Any] = [OFF] if ours else []
        self.running: Any = None
        self.read_only = False
        self.using: frozenset[Any] = frozenset()
        self.held: frozenset[Any] = frozenset()
        self.in_backward = False
        self.hooked = False
        self.growth: ObservedGrowth | None = None
        self.manager: SwapManager | None = None
        self.peak = 0
        self.uninterrupted = native.EngineLock()


process = Process()
local = _Local()
observers: list[Observer] = []  #: told of events in all threads and on all devices


def current() -> Settings | None:
    """Return the settings in force in the calling thread, ``None`` if out-of-core mode is off."""
    if local.stack:
        settings = local.stack[-1]
        return None if settings is OFF else settings
    return process.enabled


def current_or_last() -> Settings:
    """Return the settings in force in the calling thread, or else those that were last in force."""
    settings = local.stack[-1] if local.stack else process.enabled
    return process.last if settings is None or settings is OFF else settings


def note_used(nbytes: int) -> None:
    """Raise the running function's peak of memory without moves to ``nbytes``, if it was lower."""
    local.peak = max(local.peak, nbytes)


def array_types() -> frozenset[type]:
    """Return the types of the arrays of all devices."""
    return _types if process.gpus is None else _types | {process.gpus.array_type}


def register_arrays(cls: type, find: Callable[[Any], SwapManager | None]) -> None:
    """Save also arrays of class ``cls``; ``find`` returns the manager of one."""
    global _types
    _finders[cls] = find
    _types |= {cls}


def manager_for(array: Any) -> SwapManager | None:
    """Return the manager of the device that holds ``array``; ``None`` if the array must stay as it is."""
    if type(array) is np.ndarray:
        return local.manager or process.managers.get("ram")
    if process.gpus is not None and type(array) is process.gpus.array_type:
        return process.gpus.manager_for(array)
    find = _finders.get(type(array))
    return None if find is None else find(array)


def manager_of_ram() -> SwapManager | None:
    """Return the manager of NumPy's arrays, ``None`` if out-of-core mode has never been on."""
    return process.managers.get("ram")


def managers() -> list[SwapManager]:
    """Return the managers of all devices."""
    gpus = () if process.gpus is None else process.gpus.managers.values()
    return [*process.managers.values(), *gpus]


def hook_allocations() -> None:
    """Make the calling thread's large NumPy allocations ask the manager for room from now on.

    Without the C extension, room is made before each function instead, for the memory that earlier calls
    took.
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
    """Make allocations ask for room from the size that matters under the limit; never raise that size."""
    manager = process.managers["ram"]
    wanted = _announced_from(manager.limit)
    if process.announced is None or wanted < process.announced:
        device = manager.device
        pool = device.keep_pages() if isinstance(device, RamDevice) else None
        native.allocator.configure(_before_allocation, wanted, pool, _POOLED)
        process.announced = wanted


def _announced_from(limit: int) -> int:
    """Return the size (bytes) from which allocations matter under a limit."""
    return min(_ANNOUNCED, max(_POOLED, int(limit * MARGIN) // _UNANNOUNCED))


def unhook_allocations() -> None:
    """Stop the calling thread's allocations from asking for room, and drop cached free memory."""
    if local.hooked:
        native.allocator.uninstall()
        keep_no_free_memory()
    local.hooked, local.growth = False, None


def keep_no_free_memory() -> None:
    """Give NumPy's cached free pages back to the system."""
    if (manager := manager_of_ram()) is not None:
        manager.keep_no_free_memory()


def void_levels() -> None:
    """Make the next allocation of each thread ask for room: other settings may be in force."""
    if native.allocator is not None:
        native.allocator.ask_again()


def begin_peak(manager: SwapManager) -> None:
    """Begin to measure the most memory that a function takes. ``manager`` is its device's."""
    if manager is manager_of_ram():
        native.allocator.set_moved_bytes(manager.moved_bytes())
        native.allocator.take_peak()
    elif process.gpus is not None:
        process.gpus.begin_peak(manager)


def end_peak(manager: SwapManager) -> None:
    """Count the allocations that the C extension granted without a call of Python."""
    if manager is manager_of_ram():
        peak = native.allocator.take_peak()
    else:
        peak = 0 if process.gpus is None else process.gpus.end_peak(manager)
    local.peak = max(local.peak, peak)
    manager.note_peak_without_offload(peak)


def _before_allocation(nbytes: int) -> None:
    """Make room for an allocation of a NumPy array.

    Raises:
        OutOfMemoryError: If there is no room and the mode is ``strict``.
        SwapSpaceError: If there is no space outside of memory.
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
                del error  # else it refers to this frame, and so to the callers' arrays
    native.allocator.set_moved_bytes(manager.moved_bytes())
    native.allocator.set_level(manager.granted_bytes())
