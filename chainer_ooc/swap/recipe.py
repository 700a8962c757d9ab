"""A recipe computes a storage's bytes again, instead of a copy out and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from chainer_ooc.swap.devices.protocol import Layout
from chainer_ooc.swap.storage import PackedArray, State, Storage

if TYPE_CHECKING:
    from chainer_ooc.swap.devices.protocol import Device, Location

__all__ = ["Constant", "Recipe", "checksum_of", "to_be_made"]


class Constant:
    """An array that a recipe needs and that is not saved, such as a parameter.

    Args:
        device: The device of the array, which is contiguous.
        array: The array. Call :meth:`keep` before its owner writes to it.

    Attributes:
        array: Has the elements as long as :meth:`is_unchanged`.
        is_kept: Whether ``array`` is a copy that nobody else has.
    """

    __slots__ = ("_checksum", "_device", "array", "is_kept")

    def __init__(self, device: Device, array: Any) -> None:
        self.array = array
        self.is_kept = False
        self._device = device
        self._checksum = self._fingerprint()

    def is_unchanged(self) -> bool:
        """Return whether the array still has the elements that it had when this was made."""
        return self.is_kept or self._fingerprint() == self._checksum

    def keep(self) -> None:
        """Copy the array before its owner can modify it. The copy has the same page offset."""
        if not self.is_kept:
            array, place = self.array, self._place()
            layout = Layout(array.dtype, array.shape, array.strides, 0, True)
            page_offset = place.address + place.offset
            own = self._device.duplicate(array, layout, array.nbytes, page_offset)
            self.array = self._device.view(*own, layout)
            self.is_kept = True

    def _fingerprint(self) -> int:
        place = self._place()
        return self._device.checksum(place.owner, place.offset, self.array.nbytes)

    def _place(self) -> Location:
        place = self._device.locate(self.array)
        assert place is not None
        return place


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """Compute the bytes of a storage again, bit for bit, from other saved arrays.

    Attributes:
        inputs: The saved arrays that it reads.
        run: Takes the arrays of the inputs, in that order, and returns the result. It has no side effects.
        layout: The layout of the result, which fills the storage.
        checksum: The checksum of the result's bytes.
        input_checksums: The checksums of the inputs' storages when the result was computed.
        functions: The functions that it runs, by whatever name the caller gives them.
        constants: The arrays that it reads besides the inputs.
        costly: Only a plan, which has weighed the cost, may use it.
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
        """Return the bytes that copying the constants would still take."""
        return sum(one.array.nbytes for one in self.constants if not one.is_kept)

    def fits(self, device: Device, storage: Storage, planned: bool = False) -> bool:
        """Return whether the recipe would compute exactly what ``storage`` holds now, whenever it runs.

        That needs a result and inputs that nobody has written to, and inputs that nobody can write to
        unnoticed: they have a valid copy, or will have, or only the graph refers to them.

        Args:
            device: The device of the storage.
            storage: The storage that it computes.
            planned: A plan asks: costly recipes, and inputs that are themselves discarded, are allowed.
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


def to_be_made(wanted: Iterable[Storage]) -> list[tuple[Storage, Recipe]]:
    """Return the discarded storages to compute for ``wanted``, with their recipes, inputs first.

    Otherwise they are in the order of saving: what lies between two that are far apart need not be kept meanwhile.
    """
    order: dict[Storage, Recipe] = {}
    todo = [*wanted][::-1]
    while todo:
        recipe = todo[-1].recipe
        assert recipe is not None
        first = [
            one for one in recipe.storages() if one.state is State.DISCARDED and one not in order
        ]
        if not first:
            order.setdefault(todo.pop(), recipe)
        todo += first[::-1]
    place: dict[Storage, int] = {}
    for storage, recipe in order.items():
        inputs = (place[one] for one in recipe.storages() if one in place)
        place[storage] = max(storage.sequence, *inputs, 0)
    return sorted(order.items(), key=lambda item: place[item[0]])
