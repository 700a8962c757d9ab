"""A recipe computes a storage's bytes again, instead of a copy out and back."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from chainer_ooc.swap.devices.protocol import Known, Layout, bytes_of_array
from chainer_ooc.swap.storage import PackedArray, State, Storage

if TYPE_CHECKING:
    from chainer_ooc.swap.devices.protocol import Device, Location, Verdict

__all__ = [
    "PRIVATE",
    "Constant",
    "PrivateContent",
    "Recipe",
    "fingerprint_if_taken",
    "fingerprint_of",
    "to_be_made",
]

#: The attribute of a graph's node with its array's :class:`PrivateContent`.
PRIVATE = "_ooc_private"
#: Two fingerprints that are equal if nobody has written to an array.
Pair = tuple[Any, Any]


class PrivateContent:
    """The bytes that a function of Chainer has made, for as long as only such functions have had the array.

    Nobody can have written to them: they need no fingerprint. It is taken when other code gets the array.

    Args:
        device: The device of the array.
        array: The array that the function has returned; ``None`` if nothing but its storage has it.

    Attributes:
        is_exposed: Other code has had the array.
        is_needed: A recipe depends on these bytes.
        fingerprint: Their fingerprint, if they are exposed and needed.
    """

    __slots__ = ("_array", "_device", "_storage", "fingerprint", "is_exposed", "is_needed")

    def __init__(self, device: Device, array: Any = None) -> None:
        self._device = device
        self._array: Callable[[], Any] = (lambda: None) if array is None else weakref.ref(array)
        self._storage: weakref.ref[Storage] | None = None
        self.is_exposed = self.is_needed = False
        self.fingerprint: Any = None

    def is_of(self, array: Any) -> bool:
        """Return whether ``array`` is the object that the function has returned."""
        return array is not None and self._array() is array

    def lies_in(self, storage: Storage) -> None:
        """Note the storage in which the array has been saved."""
        storage.content = self
        self._storage = weakref.ref(storage)

    def expose(self) -> None:
        """Note that other code is about to get the array: compute first what is made again from it."""
        if self.is_exposed:
            return
        self.is_exposed = True
        if not self.is_needed:
            return
        array, storage = self._array(), None if self._storage is None else self._storage()
        if storage is not None:
            if storage.state.in_memory:
                self.fingerprint = fingerprint_of(self._device, storage)
            if storage.dependents:
                storage.manager.make_dependents(storage)
        elif array is not None:
            found = bytes_of_array(array, self._device.locate)
            self.fingerprint = None if found is None else self._device.fingerprint(*found[:3])

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return ``None``: the owner of a copy may write to it."""

    def __reduce__(self) -> Any:
        return type(None), ()


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

    __slots__ = ("_device", "_fingerprint", "_of_copy", "array", "is_kept")

    def __init__(self, device: Device, array: Any, guarded: bool = True) -> None:
        self.array = array
        self.is_kept = False
        self._device = device
        self._fingerprint = self._look() if guarded else None
        self._of_copy: Any = None

    def pairs(self) -> list[Pair]:
        """Return the fingerprints that are equal if the array, or its copy, is as the array was when this was made."""
        return [(self._fingerprint, self._of_copy if self.is_kept else self._look())]

    def keep(self) -> None:
        """Copy the array before its owner can modify it. The copy has the same page offset.

        Whether it was modified before is known only by :meth:`pairs`: on a GPU not yet, and other recipes have this
        constant, too.
        """
        if not self.is_kept:
            array, place = self.array, self._place()
            layout = Layout(array.dtype, array.shape, array.strides, 0, True)
            page_offset = place.address + place.offset
            own = self._device.duplicate(array, layout, array.nbytes, page_offset)
            self.array = self._device.view(*own, layout)
            self.is_kept = True
            self._of_copy = self._look()

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
        content: The result's bytes: a :class:`PrivateContent`, or else their fingerprint; ``None`` if nobody has
            taken that.
        input_contents: The same of the inputs' storages, when the result was computed.
        functions: The functions that it runs, by whatever name the caller gives them.
        constants: The arrays that it reads besides the inputs.
        costly: Only a plan, which has weighed the cost, may use it.
        trusted: Its functions are known to give the same bits each time. Else the result is checked.
        conditions: Contents that must be equal: each function has read what the one before it made.
        crops: The result may be a part of a larger array that ``run`` makes, which is the storage.
        maker: The name of the function that made the result, for messages.
    """

    inputs: tuple[PackedArray, ...]
    run: Callable[[Sequence[Any]], Any]
    layout: Layout
    content: Any
    input_contents: tuple[Any, ...]
    functions: tuple[Any, ...] = ()
    constants: tuple[Constant, ...] = ()
    costly: bool = False
    trusted: bool = False
    conditions: tuple[Pair, ...] = ()
    crops: bool = False
    maker: str = ""

    def storages(self) -> tuple[Storage, ...]:
        """Return the storages of the inputs, each once."""
        return tuple(dict.fromkeys(saved.storage for saved in self.inputs))

    def open_inputs(self) -> tuple[Storage, ...]:
        """Return the storages of the inputs to which code may write unnoticed as long as it refers to them."""
        inputs = zip(self.inputs, self.input_contents, strict=True)
        found = (
            saved.storage for saved, content in inputs if not is_private(saved.storage, content)
        )
        return tuple(dict.fromkeys(found))

    def bytes_to_keep(self) -> int:
        """Return the bytes that copying the constants would still take."""
        return sum(one.array.nbytes for one in self.constants if not one.is_kept)

    def check(self, device: Device, storage: Storage, planned: bool = False) -> Verdict | None:
        """Begin to find out whether the recipe would compute exactly what ``storage`` holds now, whenever it runs.

        That needs a result and inputs that nobody has written to, and inputs that nobody can write to
        unnoticed: they are private, or have a valid copy, or will have, or only the graph refers to them.

        Args:
            device: The device of the storage, which is resident.
            storage: The storage that it computes.
            planned: A plan asks: costly recipes, and inputs that are themselves discarded, are allowed.

        Returns:
            The verdict, ``None`` if the recipe may not be used.
        """
        if self.content is None or (self.costly and not planned):
            return None
        pairs = list(self.conditions)
        for saved, before in zip(self.inputs, self.input_contents, strict=True):
            needed = saved.storage
            is_known = is_private(needed, before)
            if needed.state is State.DISCARDED:
                assert needed.recipe is not None
                now = needed.recipe.content if planned else None
            elif needed.state in (State.RESIDENT, State.CHECKING):
                if needed.referenced_externally and not is_known:
                    return None
                now = before if is_known else fingerprint_of(device, needed)
            elif needed.copy is not None or (needed.state is State.GOING_OUT and not needed.dirty):
                # It has a valid copy, or will have.
                now = before if is_known else needed.fingerprint
            else:
                return None
            pairs.append((before, now))
        is_known = is_private(storage, self.content)
        now = self.content if is_known else fingerprint_of(device, storage)
        pairs.append((self.content, now))
        for constant in self.constants:
            pairs += constant.pairs()
        found = [
            (fingerprint_if_taken(a), fingerprint_if_taken(b))
            for a, b in pairs
            if a is not b or a is None
        ]
        if any(None in pair for pair in found):
            return None
        return device.compare(found) if found else Known(True)


def is_private(storage: Storage, content: Any) -> bool:
    """Return whether a storage still has a content that no other code than Chainer's functions has had."""
    own = storage.content
    return own is not None and own is content and not own.is_exposed


def fingerprint_if_taken(content: Any) -> Any:
    """Return the fingerprint of a content, ``None`` if nobody has taken it."""
    return content.fingerprint if type(content) is PrivateContent else content


def fingerprint_of(device: Device, storage: Storage) -> Any:
    """Return the fingerprint of a resident storage's bytes as they are now."""
    return device.fingerprint(storage.owner, storage.origin, storage.nbytes)


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
