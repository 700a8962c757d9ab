"""The order in which backward will use saved storages: learned from earlier iterations, or guessed by rank."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator

from chainer_ooc.planning.use_order import UpcomingUses
from chainer_ooc.swap.storage import Storage

__all__ = ["SavedSequence", "UseOrder"]

#: The number of graphs whose order of use is remembered.
_REMEMBERED = 32
#: A sequence that backward never uses (predictions) ends when it has more storages than this, most of them dead.
_FEW = 64


class SavedSequence:
    """The storages that functions saved one after the other, until backward began to use them.

    Attributes:
        used: The numbers of the storages that backward has used, in the order of first use.
        living: The number of storages that are alive.
    """

    __slots__ = ("_hash", "_storages", "_upcoming", "living", "used")

    def __init__(self) -> None:
        self.living = 0
        self._storages: list[weakref.ref[Storage]] = []
        self._hash = 0
        self._upcoming = UpcomingUses()
        self.used: dict[int, None] = {}

    @property
    def signature(self) -> tuple[int, int]:
        """The identity of the graph: the number of storages, and a hash of their functions and sizes."""
        return len(self._storages), self._hash

    @property
    def is_over(self) -> bool:
        """Whether the next storage belongs to another graph: backward uses this one, or most of it is dead."""
        saved = len(self._storages)
        return bool(self.used) or (saved > _FEW and 2 * self.living < saved)

    def append(self, storage: Storage) -> None:
        """Add a storage."""
        self.living += 1
        storage.saved_sequence, storage.number = self, len(self._storages)
        self._storages.append(weakref.ref(storage))
        self._hash = hash((self._hash, storage.label, storage.nbytes))

    def begin(self, learned: Iterable[int]) -> None:
        """Freeze the expected order of use: the learned order if this graph was seen, else descending rank.

        Chainer runs backward in the order of falling rank.

        Args:
            learned: Numbers in the order of use in an earlier graph of this signature. Storages that it
                leaves out come last.
        """
        ranks = {}
        for number, reference in enumerate(self._storages):
            storage = reference()
            if storage is not None:
                ranks[number] = (-storage.rank, -number)
        order = list(learned)
        order += sorted(ranks.keys() - set(order), key=ranks.__getitem__)
        self._upcoming = UpcomingUses(order)

    def after(self, storages: Iterable[Storage]) -> Iterator[Storage]:
        """Yield storages used after these that are not being fetched yet, nearest first."""
        numbers = [storage.number for storage in storages if storage.saved_sequence is self]
        for number in self._upcoming.after(numbers):
            storage = self._storages[number]()
            if storage is not None:
                yield storage

    def requeue(self, storage: Storage) -> None:
        """Note that a storage left memory again before it was used."""
        self._upcoming.requeue(storage.number)


class UseOrder:
    """Learn in which order backward uses saved storages. Its caller holds the manager's lock."""

    def __init__(self) -> None:
        self._saved_sequence = SavedSequence()
        self._learned: OrderedDict[tuple[int, int], Iterable[int]] = OrderedDict()

    def save(self, storage: Storage) -> None:
        """Note that a storage was saved."""
        if self._saved_sequence.is_over:
            self._saved_sequence = SavedSequence()
        self._saved_sequence.append(storage)

    def use(self, storages: Collection[Storage]) -> Iterator[Storage]:
        """Note that backward uses storages now. Return an iterator over those it uses next, nearest first."""
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
