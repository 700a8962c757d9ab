"""Storage: one allocation of a device's memory and where its bytes are. Saved: an array in it."""

from __future__ import annotations

import enum
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from chainer_ooc import references
from chainer_ooc.errors import OutOfCoreError
from chainer_ooc.swap.devices.protocol import Layout, SwappedBlock, Transfer
from chainer_ooc.swap.devices.ram import native

if TYPE_CHECKING:
    from chainer_ooc.swap.prefetch import SavedSequence
    from chainer_ooc.swap.recipe import Recipe

__all__ = ["AWAY", "PackedArray", "State", "Storage"]


class State(enum.Enum):
    """Where the bytes of a storage are."""

    __hash__ = (
        object.__hash__
    )  # that of Enum is a function of Python, and what moves is looked up by state

    RESIDENT = "resident"  #: in the device's memory alone
    GOING_OUT = "going out"  #: resident, and a copy is being written
    BOTH = "both"  #: resident, and a valid copy is outside (clean)
    OUT = "out"  #: outside alone
    DISCARDED = "discarded"  #: nowhere: its recipe makes it again
    COMING_IN = "coming in"  #: outside, and being read into memory
    DROPPED = "dropped"  #: nowhere: its last use has been

    in_memory: bool  #: whether they are in the device's memory, ready to be used


for _state in State:  # an attribute is read faster than a property
    _state.in_memory = _state in (State.RESIDENT, State.GOING_OUT, State.BOTH)

#: Not in memory, and not on the way.
AWAY = (State.OUT, State.DISCARDED)

_LEGAL = {
    State.RESIDENT: {State.GOING_OUT, State.DISCARDED, State.DROPPED},
    State.GOING_OUT: {State.BOTH, State.RESIDENT, State.DROPPED},
    State.BOTH: {State.OUT, State.RESIDENT, State.DROPPED},
    State.OUT: {State.COMING_IN, State.DROPPED},
    State.DISCARDED: {State.RESIDENT, State.DROPPED},
    State.COMING_IN: {State.BOTH, State.OUT, State.DROPPED},
    State.DROPPED: set(),
}


class Keeper(Protocol):
    """What a storage and its arrays ask of the manager that moves them."""

    def read(self, packed: PackedArray, read_only: bool = False) -> Any:
        """Return an array, fetched first where it is out."""

    def is_read_only(self) -> bool:
        """Tell whether the code that reads arrays in the calling thread leaves them as they are."""

    def defer_free(self, storage: Storage) -> None:
        """Queue what a dying storage leaves for freeing."""


class Storage(native.Mortal):
    """One allocation, shared by all arrays that are views of it.

    Its state changes in :meth:`move_to` alone. It lives as long as one :class:`PackedArray` of it.

    Attributes:
        manager: The manager that moves it.
        sequence: Its number in the order of saving.
        nbytes: Its size (bytes).
        label: The function that saved it first.
        state: Where its bytes are.
        owner: What owns the memory while it is resident, else ``None``. For NumPy the array with no
            base, for CuPy its ``Memory``.
        origin: Bytes from the start of the owner's memory to the storage's first byte.
        page_offset: The storage's first address modulo the page size: kept over a round trip, since
            vectorized loops may round differently on memory of another alignment.
        copy: The copy outside, or ``None``.
        transfer: The copy under way, or ``None``.
        dirty: Somebody outside backward got the array since the copy was begun, and may write.
        remaining_uses: How many functions of the graph have yet to use it in backward.
        kept: Others may read it than these functions: it is not dropped after its last use.
        rank: The highest rank of these functions in the graph: backward runs by falling rank.
        saved_sequence: What it was saved with, in a row, and ``number``, its place there.
        ahead: It was fetched before it was asked for, and has not been used since.
        arrival: The moment at which it came in last, for the device; ``None`` if it never did.
        recipe: How its bytes can be computed again, or ``None``.
        dependents: Storages that are out without a copy, whose recipes need this one.
        checksum: Of its bytes when it was last looked at, or ``None`` where nobody asks for it.
        verified: Whether changes of that are reported (``verify``).
    """

    __slots__ = (
        "__weakref__",
        "ahead",
        "arrival",
        "checksum",
        "copy",
        "dependents",
        "dirty",
        "kept",
        "label",
        "manager",
        "nbytes",
        "number",
        "origin",
        "owner",
        "page_offset",
        "rank",
        "recipe",
        "remaining_uses",
        "saved_sequence",
        "sequence",
        "state",
        "transfer",
        "verified",
    )

    def __init__(
        self,
        manager: Any,
        sequence: int,
        owner: Any,
        nbytes: int,
        page_offset: int,
        label: str,
    ) -> None:
        self.manager = manager
        self.sequence = sequence
        self.owner: Any = owner
        self.nbytes = nbytes
        self.page_offset = page_offset
        self.label = label
        self.origin = 0
        self.state = State.RESIDENT
        self.copy: SwappedBlock | None = None
        self.transfer: Transfer | None = None
        self.dirty = False
        self.remaining_uses = 0
        self.kept = False
        self.rank = 0
        self.saved_sequence: SavedSequence
        self.number = 0
        self.ahead = False
        self.arrival: Any = None
        self.checksum: int | None = None
        self.verified = False
        self.recipe: Recipe | None = None
        self.dependents: weakref.WeakSet[Storage] | None = None

    def move_to(self, state: State) -> None:
        """Change the state.

        Raises:
            OutOfCoreError: If there is no such transition.
        """
        if state not in _LEGAL[self.state]:
            raise OutOfCoreError(f"{self!r} cannot become {state.value!r}")
        self.state = state

    @property
    def used(self) -> bool:
        """Whether backward has used it for the last time, as far as is known."""
        return self.remaining_uses <= 0

    @property
    def referenced_externally(self) -> bool:
        """Whether somebody besides this storage refers to the memory, so that letting go frees nothing."""
        return references.attribute_is_referenced_externally(self, "owner")

    def __repr__(self) -> str:
        return f"<Storage {self.sequence} of {self.label}: {self.nbytes} bytes, {self.state.value}>"

    def _die(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # when the interpreter ends, modules may be gone
            self.manager.defer_free(self)


class PackedArray:
    """Stands in for an array: which storage it lies in, and how.

    Reading it gives an array with the same bits, shape, strides and dtype; while the original array is
    alive, that very object.
    """

    __slots__ = ("_last", "layout", "storage")

    def __init__(self, storage: Storage, layout: Layout, array: Any) -> None:
        self.storage = storage
        self.layout = layout
        self._last: weakref.ref[Any] | None = weakref.ref(array)

    def get(self) -> Any:
        """Return the array, fetched first where it is out.

        Raises:
            GraphReleasedError: If it was dropped after its last use.
        """
        manager = self.storage.manager
        return manager.read(self, manager.is_read_only())

    def alive(self) -> Any | None:
        """Return the array handed out last if it is still alive, else ``None``."""
        return None if self._last is None else self._last()

    def remember(self, array: Any) -> None:
        """Let :meth:`alive` return ``array`` as long as it lives."""
        self._last = weakref.ref(array)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.get().copy()

    def __reduce__(self) -> Any:
        return self.get().__reduce__()

    def __repr__(self) -> str:
        return f"<Saved {self.layout.shape} {self.layout.dtype} of {self.storage!r}>"
