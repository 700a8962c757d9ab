"""One manager for each GPU, the hook in CuPy's allocator, and the limits of CuPy's pools."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from chainer_ooc.settings import Settings
from chainer_ooc.swap.cupy_allocator import CupyAllocator
from chainer_ooc.swap.devices.cuda.device import (
    STAGING,
    CudaDevice,
    has_limit,
    limit_of,
    new_slab,
)
from chainer_ooc.swap.devices.cuda.streams import is_captured
from chainer_ooc.swap.devices.protocol import PooledDevice
from chainer_ooc.swap.devices.ram import native
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.tiers.pinned import PinnedSlab

__all__ = ["Gpus"]


class Gpus:
    """Manage the GPUs of this process. They share its pinned host memory.

    Args:
        cupy: CuPy, or a double of it.
        make: Makes the manager of a device.
        settings: Returns the settings in force in the calling thread, ``None`` if out-of-core mode is off.
        describe: Returns the name of the running function, for errors.
        note: Called with the bytes in use after an allocation.

    Attributes:
        array_type: The type of the GPUs' arrays.
        managers: The managers by device id, each made when the first array of its GPU appears.
    """

    def __init__(
        self,
        cupy: Any,
        make: Callable[[PooledDevice], SwapManager],
        settings: Callable[[], Settings | None],
        describe: Callable[[], str],
        note: Callable[[int], None],
    ) -> None:
        self.array_type = cupy.ndarray
        self.managers: dict[int, SwapManager] = {}
        self._devices: dict[int, CudaDevice] = {}
        self._cupy = cupy
        self._make = make
        self._settings = settings
        self._allocator = CupyAllocator(cupy, self._manager_of, describe, note)
        self._bounds: dict[int, int] = {}  # the pools' limits that were set here
        self._slab: PinnedSlab | None = None
        self._host_limit: int | None = None  # the slab's setting
        self._lock = threading.RLock()

    def manager_for(self, array: Any) -> SwapManager | None:
        """Return the manager of an array's GPU; ``None`` if there is none and out-of-core mode is off.

        It is made with the first array, but not while a CUDA graph is captured.
        """
        device_id = int(array.data.device_id)
        manager = self.managers.get(device_id)
        if manager is None:
            settings = self._settings()
            if settings is not None and not self._is_captured():
                manager = self._add(device_id, settings)
        return manager

    def enable(self, settings: Settings) -> None:
        """Hook CuPy's allocator and set the limits of its pools."""
        with self._lock:
            self._allocator.install()
            self._bound_host(settings)
            for device_id, manager in self.managers.items():
                device = self._devices[device_id]
                device.move_to(settings.directory)
                self._note_own_limit(device_id, device)
                self._bound(device_id, manager.limit)

    def disable(self) -> None:
        """Remove the hook and restore the limits of CuPy's pools."""
        with self._lock:
            self._allocator.uninstall()
            for device_id, device in self._devices.items():
                self._note_own_limit(device_id, device)
                self._bound(device_id, device.own_limit)

    def begin_peak(self, manager: SwapManager) -> None:
        """Begin to measure the most memory that a function takes. ``manager`` is its device's."""
        device_id = getattr(manager.device, "device_id", None)
        if device_id is not None and (arenas := self._allocator.arenas) is not None:
            arenas.begin_peak(device_id, manager.moved_bytes())

    def end_peak(self, manager: SwapManager) -> int:
        """Return the most that was in use at allocations that were granted in C, without moves (bytes)."""
        device_id = getattr(manager.device, "device_id", None)
        arenas = self._allocator.arenas
        return 0 if device_id is None or arenas is None else arenas.end_peak(device_id)

    def arena_counts(self) -> dict[str, int] | None:
        """Return how the current GPU's allocations were served; ``None`` if CuPy's pool serves them."""
        arenas = self._allocator.arenas
        return None if arenas is None else arenas.counts()

    def _is_captured(self) -> bool:
        """Return whether a CUDA graph is being captured: a device could not be made now."""
        cuda = self._cupy.cuda
        return is_captured(cuda.runtime, cuda.get_current_stream())

    def _add(self, device_id: int, settings: Settings) -> SwapManager:
        with self._lock:
            if device_id not in self.managers:
                device = CudaDevice(
                    self._cupy,
                    device_id,
                    settings.directory,
                    self._bound_host(settings),
                    pool=self._allocator.pool,
                )
                manager = self._make(device)
                self._bound(device_id, manager.limit)
                self.managers[device_id], self._devices[device_id] = manager, device
                native.ask_again()  # now there is somebody to ask
            return self.managers[device_id]

    def _bound_host(self, settings: Settings) -> PinnedSlab:
        """Return the pinned memory of all GPUs, limited to ``host_limit``, staging blocks included."""
        wanted = settings.host_limit
        if self._slab is None:
            self._slab = new_slab(self._cupy, wanted, STAGING)
        elif wanted != self._host_limit:
            fresh = new_slab(self._cupy, wanted, STAGING)
            limit, self._slab.spare = fresh.limit, fresh.spare
            if wanted is None:  # the free memory, plus what the slab has taken already
                limit += self._slab.size
            self._slab.limit = max(
                limit - sum(device.staging_bytes for device in self._devices.values()), 0
            )
        self._host_limit = wanted
        return self._slab

    def _bound(self, device_id: int, nbytes: int) -> None:
        with self._cupy.cuda.Device(device_id):
            if has_limit(self._cupy, self._allocator.pool()):
                self._allocator.pool().set_limit(size=nbytes)
        self._bounds[device_id] = nbytes

    def _note_own_limit(self, device_id: int, device: CudaDevice) -> None:
        """Remember the pool's limit if other code has set it since it was set here."""
        with self._cupy.cuda.Device(device_id):
            nbytes = limit_of(self._cupy, self._allocator.pool())
        if nbytes not in (self._bounds[device_id], device.own_limit):
            device.own_limit = nbytes

    def _manager_of(self, device_id: int) -> SwapManager | None:
        return None if self._settings() is None else self.managers.get(device_id)
