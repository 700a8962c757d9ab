"""Free blocks in a range of addresses: best fit, with neighbours merged."""

from __future__ import annotations

import bisect

__all__ = ["FreeBlocks", "round_up"]


class FreeBlocks:
    """The free blocks by address and by size. Not thread-safe.

    Attributes:
        nbytes: The sum of their sizes (bytes).
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._size: dict[int, int] = {}
        self._by_address: list[int] = []
        self._by_size: list[tuple[int, int]] = []
        # Blocks are not merged across these addresses: a new region begins there.
        self._fences: set[int] = set()

    def add_region(self, address: int, nbytes: int) -> None:
        """Add a free region. Its blocks are never merged with those of other regions."""
        self._fences.update((address, address + nbytes))
        self.insert(address, nbytes)

    def take(self, nbytes: int) -> int | None:
        """Cut ``nbytes`` off the smallest block that is large enough, the lowest of equals; ``None`` if none is."""
        index = bisect.bisect_left(self._by_size, (nbytes, -1))
        if index == len(self._by_size):
            return None
        size, address = self._by_size[index]
        self._remove(address)
        if size > nbytes:
            self._add(address + nbytes, size - nbytes)
        return address

    def take_exactly(self, address: int, nbytes: int) -> bool:
        """Take the block at ``address`` if it is free and has that size. Return whether it was taken."""
        if self._size.get(address) != nbytes:
            return False
        self._remove(address)
        return True

    def insert(self, address: int, nbytes: int) -> None:
        """Add a free block and merge it with its neighbours."""
        index = bisect.bisect_left(self._by_address, address)
        after = address + nbytes
        if after in self._size and after not in self._fences:
            nbytes += self._remove(after)
        if index and address not in self._fences:
            before = self._by_address[index - 1]
            if before + self._size[before] == address:
                nbytes += self._remove(before)
                address = before
        self._add(address, nbytes)

    def blocks(self) -> list[tuple[int, int]]:
        """Return the address and the size (bytes) of each block, in the order of addresses."""
        return [(address, self._size[address]) for address in self._by_address]

    def last(self) -> tuple[int, int]:
        """Return the address and the size (bytes) of the block with the highest address. There must be one."""
        address = self._by_address[-1]
        return address, self._size[address]

    def largest(self) -> int:
        """Return the size of the largest block (bytes), 0 if there is none."""
        return self._by_size[-1][0] if self._by_size else 0

    def _add(self, address: int, nbytes: int) -> None:
        self._size[address] = nbytes
        bisect.insort(self._by_address, address)
        bisect.insort(self._by_size, (nbytes, address))
        self.nbytes += nbytes

    def _remove(self, address: int) -> int:
        nbytes = self._size.pop(address)
        del self._by_address[bisect.bisect_left(self._by_address, address)]
        del self._by_size[bisect.bisect_left(self._by_size, (nbytes, address))]
        self.nbytes -= nbytes
        return nbytes


def round_up(nbytes: int, unit: int) -> int:
    """Return the least multiple of ``unit``, one at least, that is not below ``nbytes``."""
    return max(-(-nbytes // unit), 1) * unit
