"""A recipe computes a storage's bytes again, instead of a copy out and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from chainer_ooc.swap.devices.protocol import Layout
from chainer_ooc.swap.storage import PackedArray, State, Storage

if TYPE_CHECKING:
    from chainer_ooc.swap.devices.protocol import Device, Location, Verdict

__all__ = ["Constant", "Recipe", "fingerprint_of"]

#: Two fingerprints that are equal if nobody has written to an array.
Pair = tuple[Any, Any]


class Constant:
    """An array that a recipe needs and that is not saved, such as a parameter.

    Args:
        device: The device of the array, which is contiguous.
        array: The array. Call :meth:`keep` before its owner writes to it.
        guarded: Take its fingerprint, so that :meth:`pairs` can tell later whether it is unchanged.

    Attributes:
        array: The array, or a copy of it that nobody else has.
        is_kept: Whether it is that copy.
    """

    __slots__ = ("_device", "_fingerprint", "array", "is_kept")

    def __init__(self, device: Device, array: Any, guarded: bool = True) -> None:
        self.array = array
        self.is_kept = False
        self._device = device
        self._fingerprint = self._look() if guarded else None

    def pairs(self) -> list[Pair]:
        """Return the fingerprints that are equal if the array is as it was when this was made."""
        return [] if self.is_kept else [(self._fingerprint, self._look())]

    def keep(self) -> None:
        """Copy the array before its owner can modify it. The copy has the same page offset."""
        if not self.is_kept:
            array, place = self.array, self._place()
            layout = Layout(array.dtype, array.shape, array.strides, 0, True)
            page_offset = place.address + place.offset
            own = self._device.duplicate(array, layout, array.nbytes, page_offset)
            self.array = self._device.view(*own, layout)
            self.is_kept = True

    def _look(self) -> Any:
        place = self._place()
        return self._device.fingerprint(place.owner, place.offset, self.array.nbytes)

    def _place(self) -> Location:
        place = self._device.locate(self.array)
        assert place is not None
        return place


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """Compute the bytes of a storage again, bit for bit, from other saved arrays.

    That an array *can* be computed again is known without any fingerprint. Fingerprints tell whether it and the
    inputs are still what they were, so that the recipe may be used; without them it may not.

    Attributes:
        inputs: The saved arrays that it reads.
        run: Takes the arrays of the inputs, in that order, and returns the result. It has no side effects.
        layout: The layout of the result. It fills the storage, unless ``crops``.
        fingerprint: The fingerprint of the result's bytes; ``None`` if nobody has taken it.
        input_fingerprints: Those of the inputs' storages when the result was computed.
        functions: The functions that it runs, by whatever name the caller gives them.
        constants: The arrays that it reads besides the inputs.
        costly: Only a plan, which has weighed the cost, may use it.
        conditions: Fingerprints that must be equal: each function has read what the one before it made.
        crops: The result may be a part of a larger array that ``run`` makes, which is the storage.
    """

    inputs: tuple[PackedArray, ...]
    run: Callable[[Sequence[Any]], Any]
    layout: Layout
    fingerprint: Any
    input_fingerprints: tuple[Any, ...]
    functions: tuple[Any, ...] = ()
    constants: tuple[Constant, ...] = ()
    costly: bool = False
    conditions: tuple[Pair, ...] = ()
    crops: bool = False

    def storages(self) -> tuple[Storage, ...]:
        """Return the storages of the inputs, each once."""
        return tuple(dict.fromkeys(saved.storage for saved in self.inputs))

    def bytes_to_keep(self) -> int:
        """Return the bytes that copying the constants would still take."""
        return sum(one.array.nbytes for one in self.constants if not one.is_kept)

    def check(self, device: Device, storage: Storage, planned: bool = False) -> Verdict | None:
        """Begin to find out whether the recipe would compute exactly what ``storage`` holds now, whenever it runs.

        That needs a result and inputs that nobody has written to, and inputs that nobody can write to
        unnoticed: they have a valid copy, or will have, or only the graph refers to them.

        Args:
            device: The device of the storage, which is resident.
            storage: The storage that it computes.
            planned: A plan asks: costly recipes, and inputs that are themselves discarded, are allowed.

        Returns:
            The verdict, ``None`` if the recipe may not be used.
        """
        if self.fingerprint is None or (self.costly and not planned):
            return None
        looks: list[
            tuple[Any, Storage]
        ] = []  # a fingerprint, and the storage of which to take the other
        pairs = list(self.conditions)
        for saved, before in zip(self.inputs, self.input_fingerprints, strict=True):
            needed = saved.storage
            leaves = needed.state is State.GOING_OUT and not needed.dirty
            if needed.copy is not None or leaves:
                pairs.append((before, needed.fingerprint))
            elif (
                needed.state in (State.RESIDENT, State.CHECKING)
                and not needed.referenced_externally
            ):
                looks.append((before, needed))
            elif planned and needed.state is State.DISCARDED:
                assert needed.recipe is not None
                pairs.append((before, needed.recipe.fingerprint))
            else:
                return None
        looks.append((self.fingerprint, storage))
        if any(None in pair for pair in pairs) or any(before is None for before, _ in looks):
            return None
        pairs += [(before, fingerprint_of(device, one)) for before, one in looks]
        for constant in self.constants:
            pairs += constant.pairs()
        return device.compare(pairs)


def fingerprint_of(device: Device, storage: Storage) -> Any:
    """Return the fingerprint of a resident storage's bytes as they are now."""
    return device.fingerprint(storage.owner, storage.origin, storage.nbytes)
