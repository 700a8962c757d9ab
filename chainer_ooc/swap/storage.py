"""One allocation that functions saved (``Storage``), its states, and an array's stand-in (``PackedArray``)."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from chainer_ooc import references
from chainer_ooc.errors import OutOfCoreError
from chainer_ooc.planning.states import AWAY, State
from chainer_ooc.swap.devices.protocol import Layout, SwappedBlock, Transfer, Verdict
from chainer_ooc.swap.devices.ram import native

if TYPE_CHECKING:
    from chainer_ooc.swap.prefetch import SavedSequence
    from chainer_ooc.swap.recipe import PrivateContent, Recipe

__all__ = ["AWAY", "PackedArray", "State", "Storage"]


_LEGAL = {
    State.RESIDENT: {State.GOING_OUT, State.CHECKING, State.DISCARDED, State.DROPPED},
    State.CHECKING: {State.RESIDENT, State.DISCARDED, State.DROPPED},
    State.GOING_OUT: {State.BOTH, State.RESIDENT, State.DROPPED},
    State.BOTH: {State.OUT, State.RESIDENT, State.DROPPED},
    State.OUT: {State.COMING_IN, State.DROPPED},
    State.DISCARDED: {State.RESIDENT, State.DROPPED},
    State.COMING_IN: {State.BOTH, State.OUT, State.DROPPED},
    State.DROPPED: set(),
}


class Keeper(Protocol):
    """The methods of the manager that a storage and its stand-ins call."""

    def read(self, packed: PackedArray, read_only: bool = False) -> Any:
        """Return the array, fetched first if its bytes are not in memory."""

    def is_read_only(self) -> bool:
        """Return whether the calling thread runs code that never writes to the arrays it reads."""

    def defer_free(self, storage: Storage) -> None:
        """Queue a dead storage's blocks for freeing."""


class Storage(native.Mortal):
    """One allocation, shared by all arrays that are views of it.

    Only :meth:`move_to` changes its state. It lives as long as one :class:`PackedArray` of it.

    Attributes:
        manager: The manager that moves it.
        sequence: Its place in the order of saving.
        nbytes: Its size (bytes).
        label: The name of the function that saved it first.
        state: Where its bytes are.
        owner: The object that owns the memory while the storage is resident, else ``None``: NumPy's array
            with no base, or CuPy's ``Memory``.
        origin: Bytes from the start of the owner's memory to the storage's first byte.
        page_offset: The storage's first address modulo the page size. A round trip keeps it, since
            vectorized loops may round differently on memory of another alignment.
        copy: The copy outside of memory, or ``None``.
        transfer: The copy that is running, or ``None``.
        dirty: Code outside of backward got the array after the copy began, and may have written to it.
        remaining_uses: The number of functions of the graph whose backward still needs it.
        kept: Other readers than these functions may need it: it is not dropped after its last use.
        rank: The highest rank of these functions in the graph. Backward runs in the order of falling rank.
        saved_sequence: The sequence in which it was saved, and ``number``, its place there.
        ahead: It was prefetched and has not been used since.
        arrival: The moment of the device's clock at which it last arrived; ``None`` if it never did.
        recipe: The recipe that computes its bytes again, or ``None``.
        dependents: Discarded storages whose recipes need this one.
        verdict: Whether it is unchanged, while that is being found out (CHECKING).
        fingerprint: The last fingerprint of its bytes, that of its copy if it has one; ``None`` if nothing needs one.
        content: Its bytes, if only Chainer's functions had them when they were made, else ``None``.
        exposed: Other code has had one of its arrays since it was saved.
        checksum: The last checksum of its bytes, if changes of it are reported (``verify``), else ``None``.
        key: Its key among what lasts longer than a graph (``swap/lasting.py``); ``None`` if a graph saved it.
    """

    __slots__ = (
        "__weakref__",
        "ahead",
        "arrival",
        "checksum",
        "content",
        "copy",
        "dependents",
        "dirty",
        "exposed",
        "fingerprint",
        "kept",
        "key",
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
        "verdict",
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
        self.verdict: Verdict | None = None
        self.fingerprint: Any = None
        self.content: PrivateContent | None = None
        self.exposed = False
        self.checksum: int | None = None
        self.key: int | None = None
        self.recipe: Recipe | None = None
        self.dependents: weakref.WeakSet[Storage] | None = None

    def move_to(self, state: State) -> None:
        """Change the state.

        Raises:
            OutOfCoreError: If the transition is not legal.
        """
        if state not in _LEGAL[self.state]:
            raise OutOfCoreError(f"{self!r} cannot become {state.value!r}")
        self.state = state

    @property
    def used(self) -> bool:
        """Whether no function of the graph is known to need it any more."""
        return self.remaining_uses <= 0

    @property
    def referenced_externally(self) -> bool:
        """Whether anything besides this storage refers to the memory: releasing it would free nothing."""
        return references.attribute_is_referenced_externally(self, "owner")

    def __repr__(self) -> str:
        return f"<Storage {self.sequence} of {self.label}: {self.nbytes} bytes, {self.state.value}>"

    def _die(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # modules may be gone when the interpreter ends
            self.manager.defer_free(self)


class PackedArray:
    """The stand-in for a saved array: its storage and its layout there.

    Reading it returns an array with the same bits, shape, strides and dtype: the original object while that
    is alive.
    """

    __slots__ = ("_last", "layout", "storage")

    def __init__(self, storage: Storage, layout: Layout, array: Any) -> None:
        self.storage = storage
        self.layout = layout
        self._last: weakref.ref[Any] | None = weakref.ref(array)

    def get(self) -> Any:
        """Return the array, fetched first if its bytes are not in memory.

        Raises:
            GraphReleasedError: If ``single_backward`` dropped it after its last use.
        """
        manager = self.storage.manager
        return manager.read(self, manager.is_read_only())

    def alive(self) -> Any | None:
        """Return the array that was handed out last if it is still alive, else ``None``."""
        return None if self._last is None else self._last()

    def remember(self, array: Any) -> None:
        """Make :meth:`alive` return ``array`` as long as it lives."""
        self._last = weakref.ref(array)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.get().copy()

    def __reduce__(self) -> Any:
        return self.get().__reduce__()

    def __repr__(self) -> str:
        return f"<PackedArray {self.layout.shape} {self.layout.dtype} of {self.storage!r}>"
