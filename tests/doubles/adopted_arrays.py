"""NumPy arrays as the memory of a simulated GPU, so that Chainer's functions for the CPU run on "device" arrays."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from chainer_ooc import runtime, state
from chainer_ooc.swap.devices.cuda.device import CudaDevice
from chainer_ooc.swap.devices.protocol import Layout, Location
from chainer_ooc.swap.devices.ram import RamDevice
from chainer_ooc.swap.manager import SwapManager
from tests.doubles.simulated_cuda import POISON, OutOfMemoryError, SimulatedCuda

__all__ = ["AdoptedArrays", "simulated_gpu", "storage_at"]

_PAGE = 4096


class AdoptedArrays:
    """Takes the place of :class:`~chainer_ooc.swap.devices.cuda.device.CupyArrays`.

    An array that is asked for becomes memory of the GPU until it dies. NumPy computes at once, so that work
    on computing streams is not put off; for the order of accesses, all that NumPy does until an array is
    copied out counts as a write of it on the computing stream, an array that is handed out counts as read,
    and when one dies the next owner writes there at once.

    Args:
        machine: The simulated GPU.
        other: Bytes that count as used by something else.
    """

    asks_for_room = False

    def __init__(self, machine: SimulatedCuda, other: int = 0) -> None:
        self._machine = machine
        self._blocks: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._nbytes = other
        machine.eager = True
        machine.adopted_bytes = lambda: self._nbytes
        of_a_gpu = machine.is_device_memory
        machine.is_device_memory = lambda address: self._is_adopted(address) or of_a_gpu(address)

    def locate(self, array: Any) -> Location | None:
        """Return where a NumPy array lies; its memory is the GPU's from now on."""
        location = RamDevice.locate(None, array)  # type: ignore[arg-type]
        if location is not None and location.nbytes:
            self._adopt(location.owner, location.address, location.nbytes)
        return location

    def address(self, owner: Any) -> int:
        """Return the first address of the memory, up to now written to."""
        address = _address(owner)
        self._note("what was computed before", True, address, owner.nbytes)
        return address

    def address_to_read(self, owner: Any) -> int:
        """Return the first address of the memory, to be read."""
        address = _address(owner)
        self._note("what is computed next", False, address, owner.nbytes)
        return address

    def allocate(self, nbytes: int, page_offset: int) -> tuple[np.ndarray, int]:
        """Return new memory, at the same place in a page as before: NumPy's rounding depends on it."""
        machine = self._machine
        machine.fail_if_told("malloc", OutOfMemoryError)
        pool = machine.get_default_memory_pool()
        if (limit := pool.get_limit()) and self._nbytes + nbytes > limit:
            raise OutOfMemoryError(f"{nbytes} bytes, {self._nbytes} in use, limit {limit}")
        owner = np.empty(nbytes + _PAGE, np.uint8)
        owner.fill(POISON)
        self._adopt(owner, _address(owner), owner.nbytes)
        return owner, (page_offset - _address(owner)) % _PAGE

    def view(self, owner: Any, origin: int, layout: Layout) -> np.ndarray:
        """Return the array of that layout, to be read."""
        self._note("what is computed next", False, _address(owner), owner.nbytes)
        return RamDevice.view(None, owner, origin, layout)  # type: ignore[arg-type]

    def checksum(self, owner: Any, origin: int, nbytes: int) -> int:
        """Return the checksum of ``nbytes`` at byte ``origin`` of ``owner``."""
        self._note("what is computed next", False, _address(owner), owner.nbytes)
        return RamDevice.checksum(None, owner, origin, nbytes)  # type: ignore[arg-type]

    def empty(self) -> np.ndarray:
        """Return an array without elements."""
        return RamDevice.stand_in

    def _adopt(self, owner: np.ndarray, address: int, nbytes: int) -> None:
        if address in self._blocks:
            return
        reference = weakref.ref(owner, lambda _: self._bury(address))
        with self._machine.lock:
            self._blocks[address] = nbytes, reference
            self._nbytes += nbytes

    def _bury(self, address: int) -> None:
        nbytes, _ = self._blocks.pop(address)  # at once: nothing is copied there from now on
        self._nbytes -= nbytes

        def note() -> None:
            self._note("what uses the memory after it was freed", True, address, nbytes)
            self._machine.accesses.forget(address, address + nbytes)

        self._machine.lock.defer(note)

    def _note(self, name: str, is_write: bool, address: int, nbytes: int) -> None:
        machine = self._machine
        spans = [(address, nbytes)]
        machine.kernel(name, [] if is_write else spans, spans if is_write else [])

    def _is_adopted(self, address: int) -> bool:
        with self._machine.lock:
            return any(a <= address < a + nbytes for a, (nbytes, _) in tuple(self._blocks.items()))


def _address(owner: np.ndarray) -> int:
    return int(owner.__array_interface__["data"][0])


def storage_at(manager: SwapManager, address: int, address_of: Callable[[Any], int]) -> str | None:
    """Name the storage that lies at an address, for :attr:`SimulatedCuda.label`."""
    # With no lock: threads that copy come here, while others hold the manager's and wait for them.
    for reference in list(manager._transfers._by_owner.values()):
        storage = reference()
        owner = None if storage is None else storage.owner
        if storage is not None and owner is not None:
            start = address_of(owner)
            if start <= address < start + storage.origin + storage.nbytes:
                return f"Storage {storage.sequence} of {storage.label}"
    return None


@contextlib.contextmanager
def simulated_gpu(
    seed: int, directory: str, host_limit: int = 64 << 20, other: int = 0
) -> Iterator[SimulatedCuda]:
    """Have NumPy arrays move as those of a GPU do, inside the ``with``.

    Args:
        seed: Decides when the GPU's work runs.
        directory: Where the swap file is made.
        host_limit: Most page-locked memory (bytes).
        other: Bytes that count as used by something else.

    Raises:
        AssertionError: At the end, if there were races.
    """
    machine = SimulatedCuda(seed)
    device = CudaDevice(machine, 0, directory, host_limit, AdoptedArrays(machine, other))  # type: ignore[arg-type]
    manager = runtime.make_manager(device)

    machine.label = lambda address: storage_at(manager, address, _address)
    before, announced = state.process.managers.get("ram"), state.process.announced
    state.process.managers["ram"] = manager
    if announced is not None:
        state.process.announced = 0  # NumPy's allocator, and its pool, stay as they are
    try:
        yield machine
    finally:
        if before is None:
            del state.process.managers["ram"]
        else:
            state.process.managers["ram"] = before
        if announced is not None:
            state.process.announced = announced
    manager.settle()
    machine.check()
