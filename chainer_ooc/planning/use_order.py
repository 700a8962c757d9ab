"""Which storages backward uses next: the order in which they are prefetched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["UpcomingUses"]


class UpcomingUses:
    """Go through the storages of a graph, by number, in the order of their first use in backward.

    Args:
        order: The numbers of the storages in that order.
    """

    __slots__ = ("_next", "_order", "_places")

    def __init__(self, order: Iterable[int] = ()) -> None:
        self._order = list(order)
        self._places = {number: place for place, number in enumerate(self._order)}
        self._next = 0  # index into _order: fetches before it have begun

    def after(self, numbers: Iterable[int]) -> Iterator[int]:
        """Yield the storages used after these that are not being fetched yet, nearest first.

        A storage counts as being fetched once the one after it has been asked for.
        """
        places = [self._places.get(number, -1) for number in numbers]
        self._next = max(self._next, 1 + max(places, default=-1))
        for place in range(self._next, len(self._order)):
            yield self._order[place]
            self._next = place + 1

    def requeue(self, number: int) -> None:
        """Note that a storage left memory again before it was used."""
        self._next = min(self._next, self._places.get(number, self._next))
