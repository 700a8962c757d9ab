"""Recipe: how a storage's bytes are computed again instead of being moved out and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from chainer_ooc.swap.devices.protocol import Layout
from chainer_ooc.swap.storage import PackedArray, State, Storage

if TYPE_CHECKING:
    from chainer_ooc.swap.devices.protocol import Device, Location

__all__ = ["Constant", "Recipe", "checksum_of"]


class Constant:
    """An array that is not saved, such as a parameter, as it is now.

    Args:
        device: Whose memory it lies in, in one piece.
        array: The array. It may be written to later: :meth:`keep` it as it is before that.

    Attributes:
        array: What has its elements as long as :meth:`is_unchanged`.
        is_kept: Whether ``array`` is a copy that nobody else has.
    """

    __slots__ = ("_checksum", "_device", "array", "is_kept")

    def __init__(self, device: Device, array: Any) -> None:
        self.array = array
        self.is_kept = False
        self._device = device
        self._checksum = self._look()

    def is_unchanged(self) -> bool:
        """Tell whether it has the elements that it had at first."""
        return self.is_kept or self._look() == self._checksum

    def keep(self) -> None:
        """Have a copy of one's own, at the same place in a page."""
        if not self.is_kept:
            array, place = self.array, self._place()
            layout = Layout(array.dtype, array.shape, array.strides, 0, True)
            page_offset = place.address + place.offset
            own = self._device.duplicate(array, layout, array.nbytes, page_offset)
            self.array = self._device.view(*own, layout)
            self.is_kept = True

    def _look(self) -> int:
        place = self._place()
        return self._device.checksum(place.owner, place.offset, self.array.nbytes)

    def _place(self) -> Location:
        place = self._device.locate(self.array)
        assert place is not None
        return place


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
        constants: What else it needs.
        costly: It is for plans, which know what it costs.
    """

    inputs: tuple[PackedArray, ...]
    run: Callable[[Sequence[Any]], Any]
    layout: Layout
    checksum: int
    input_checksums: tuple[int, ...]
    functions: tuple[Any, ...] = ()
    constants: tuple[Constant, ...] = ()
    costly: bool = False

    def storages(self) -> tuple[Storage, ...]:
        """Return the storages of the inputs, each once."""
        return tuple(dict.fromkeys(saved.storage for saved in self.inputs))

    def bytes_to_keep(self) -> int:
        """Return the size of the constants that are not kept yet (bytes)."""
        return sum(one.array.nbytes for one in self.constants if not one.is_kept)

    def fits(self, device: Device, storage: Storage, planned: bool = False) -> bool:
        """Tell whether it makes what ``storage`` has now, whenever it is asked to.

        It does if neither that nor the inputs have been written to, and if nobody can write to the inputs
        unnoticed: they have a valid copy, or will, or nobody else refers to them.

        Args:
            device: Whose memory it is.
            storage: What it makes.
            planned: A plan asks, which has reckoned with what it costs, and with re-runs that need re-runs.
        """
        if self.costly and not planned:
            return False
        for saved, checksum in zip(self.inputs, self.input_checksums, strict=True):
            needed = saved.storage
            leaves = needed.state is State.GOING_OUT and not needed.dirty
            if needed.copy is not None or leaves:
                found = needed.checksum
            elif needed.state is State.RESIDENT and not needed.referenced_externally:
                found = checksum_of(device, needed)
            elif planned and needed.state is State.DISCARDED:
                assert needed.recipe is not None
                found = needed.recipe.checksum
            else:
                return False
            if found != checksum:
                return False
        if not all(one.is_unchanged() for one in self.constants):
            return False
        return checksum_of(device, storage) == self.checksum


def checksum_of(device: Device, storage: Storage) -> int:
    """Return the checksum of a resident storage's bytes."""
    return device.checksum(storage.owner, storage.origin, storage.nbytes)
