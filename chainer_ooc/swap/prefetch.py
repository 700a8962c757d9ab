"""UseOrder: in which order backward uses what was saved."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator

from chainer_ooc.swap.storage import Storage

__all__ = ["SavedSequence", "UseOrder"]

#: The orders of this many graphs are remembered.
_REMEMBERED = 32
#: Of graphs that are never used, as in predictions, at most this many dead storages are kept in mind.
_FEW = 64


class SavedSequence:
    """The storages that were saved in a row, until backward began to use them.

    Attributes:
        used: The numbers of those that backward has used, in the order of their first use.
        living: How many of them live.
    """

    __slots__ = ("_hash", "_next", "_order", "_places", "_storages", "living", "used")

    def __init__(self) -> None:
        self.living = 0
        self._storages: list[weakref.ref[Storage]] = []
        self._hash = 0
        self._order: list[
            int
        ] = []  # numbers in the order in which backward will use them, as expected
        self._places: dict[int, int] = {}
        self._next = 0  # a place in it: all between the last used and this one have been begun
        self.used: dict[int, None] = {}

    @property
    def signature(self) -> tuple[int, int]:
        """What tells the storages of one graph from those of another: who saved them, and their sizes."""
        return len(self._storages), self._hash

    @property
    def is_over(self) -> bool:
        """Whether what is saved next belongs to another graph: this one is in backward, or most of it is dead."""
        saved = len(self._storages)
        return bool(self.used) or (saved > _FEW and 2 * self.living < saved)

    def append(self, storage: Storage) -> None:
        """Take a storage."""
        self.living += 1
        storage.saved_sequence, storage.number = self, len(self._storages)
        self._storages.append(weakref.ref(storage))
        self._hash = hash((self._hash, storage.label, storage.nbytes))

    def begin(self, learned: Iterable[int]) -> None:
        """Fix the order in which the storages will be used.

        Chainer runs the functions of a graph by falling rank. What it really did with a graph like this one
        is known better.

        Args:
            learned: Numbers in the order of their use in an earlier graph of this signature; those it left
                out come last.
        """
        ranks = {}
        for number, reference in enumerate(self._storages):
            storage = reference()
            if storage is not None:
                ranks[number] = (-storage.rank, -number)
        self._order = list(learned)
        self._order += sorted(ranks.keys() - set(self._order), key=ranks.__getitem__)
        self._places = {number: place for place, number in enumerate(self._order)}

    def after(self, storages: Iterable[Storage]) -> Iterator[Storage]:
        """Return what is used after ``storages``, the next first, but for what has been begun."""
        places = [self._places.get(s.number, -1) for s in storages if s.saved_sequence is self]
        self._next = max(self._next, 1 + max(places, default=-1))
        for place in range(self._next, len(self._order)):
            storage = self._storages[self._order[place]]()
            if storage is not None:
                yield storage
            self._next = place + 1

    def look_again_at(self, storage: Storage) -> None:
        """Tell that a storage is out again before it was used."""
        self._next = min(self._next, self._places.get(storage.number, self._next))


class UseOrder:
    """Learns in which order backward uses what graphs have saved. Its caller holds the manager's lock."""

    def __init__(self) -> None:
        self._saved_sequence = SavedSequence()
        self._learned: OrderedDict[tuple[int, int], Iterable[int]] = OrderedDict()

    def save(self, storage: Storage) -> None:
        """Note that a storage was saved."""
        if self._saved_sequence.is_over:
            self._saved_sequence = SavedSequence()
        self._saved_sequence.append(storage)

    def use(self, storages: Collection[Storage]) -> Iterator[Storage]:
        """Note that backward uses storages now. Returns those that it uses next, the next first."""
        last = None
        for storage in storages:
            saved_sequence = storage.saved_sequence
            if not saved_sequence.used:
                signature = saved_sequence.signature
                saved_sequence.begin(self._learned.pop(signature, ()))
                self._learned[signature] = saved_sequence.used
                if len(self._learned) > _REMEMBERED:
                    self._learned.popitem(last=False)
            saved_sequence.used.setdefault(storage.number)
            if last is None or last.sequence < storage.sequence:
                last = storage
        return iter(()) if last is None else last.saved_sequence.after(storages)
