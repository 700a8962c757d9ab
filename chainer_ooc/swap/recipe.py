"""Recipe: how a storage's bytes are computed again instead of being moved out and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from chainer_ooc.swap.storage import Layout, Saved, State, Storage

if TYPE_CHECKING:
    from chainer_ooc.swap.devices.base import Device

__all__ = ["Recipe", "checksum_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """Computes the bytes of a storage again, bit for bit, from arrays that are saved as well.

    Attributes:
        inputs: The saved arrays that it needs.
        run: Returns the array from theirs, in that order. It has no side effects.
        layout: How the array lies in the storage, which it fills.
        checksum: Of the result's bytes.
        input_checksums: Of the storages of the inputs, at the time.
        functions: What it runs, by whatever name the giver has for functions.
    """

    inputs: tuple[Saved, ...]
    run: Callable[[Sequence[Any]], Any]
    layout: Layout
    checksum: int
    input_checksums: tuple[int, ...]
    functions: tuple[Any, ...] = ()

    def storages(self) -> set[Storage]:
        """Return the storages of the inputs."""
        return {saved.storage for saved in self.inputs}

    def fits(self, device: Device, storage: Storage) -> bool:
        """Tell whether it makes what ``storage`` has now, whenever it is asked to.

        It does if neither that nor the inputs have been written to, and if nobody can write to the inputs
        unnoticed: they have a valid copy, or will, or nobody else refers to them. What has only a recipe itself is
        refused: re-runs would need re-runs.
        """
        for saved, checksum in zip(self.inputs, self.input_checksums, strict=True):
            needed = saved.storage
            if needed.goes_as_signs and needed.state is not State.RESIDENT:
                return False
            leaves = needed.state is State.GOING_OUT and not needed.tainted
            if needed.copy is not None or leaves:
                found = needed.checksum
            elif needed.state is State.RESIDENT and not needed.held:
                found = checksum_of(device, needed)
            else:
                return False
            if found != checksum:
                return False
        return checksum_of(device, storage) == self.checksum


def checksum_of(device: Device, storage: Storage) -> int:
    """Return the checksum of a resident storage's bytes."""
    return device.checksum(storage.owner, storage.origin, storage.nbytes)
