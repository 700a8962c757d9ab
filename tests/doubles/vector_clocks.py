"""Vector clocks: which accesses to memory have an order (Mattern 1989; Fidge 1988)."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

__all__ = ["Access", "Accesses", "Clock", "merge"]

#: How far each actor is known to have got.
Clock = dict[str, int]

_PAGE = 1 << 20


class Access(NamedTuple):
    """An access to bytes ``start`` to ``stop``, the ``number``-th act of ``actor``."""

    name: str
    actor: str
    number: int
    is_write: bool
    start: int
    stop: int


def merge(clock: Clock, other: Clock) -> None:
    """Let ``clock`` know all that ``other`` knows."""
    for actor, index in other.items():
        if clock.get(actor, 0) < index:
            clock[actor] = index


class Accesses:
    """The accesses that later ones may race with."""

    def __init__(self) -> None:
        self._pages: defaultdict[int, list[Access]] = defaultdict(list)

    def add(self, access: Access, clock: Clock) -> list[Access]:
        """Add an access whose actor knows ``clock``. Returns earlier ones that it races with."""
        races: dict[Access, None] = {}
        for page in _pages(access.start, access.stop):
            kept = []
            for other in self._pages[page]:
                apart = other.stop <= access.start or access.stop <= other.start
                ordered = clock.get(other.actor, 0) >= other.number
                if not apart and not ordered and (access.is_write or other.is_write):
                    races[other] = None
                # Whoever comes after a write that covers it, and in order, comes after it as well.
                covered = access.start <= other.start and other.stop <= access.stop
                if not (covered and ordered and (access.is_write or not other.is_write)):
                    kept.append(other)
            kept.append(access)
            self._pages[page] = kept
        return list(races)

    def forget(self, start: int, stop: int) -> None:
        """Forget the accesses within a range."""
        for page in _pages(start, stop):
            kept = [a for a in self._pages[page] if a.start < start or a.stop > stop]
            self._pages[page] = kept


def _pages(start: int, stop: int) -> range:
    return range(start // _PAGE, (stop - 1) // _PAGE + 1)
