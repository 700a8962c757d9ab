"""Simulate how much memory glibc's malloc keeps for a program's allocations.

It is more than the allocated bytes: blocks that are freed inside the heap stay resident until the top of
the heap is free. The rules are those of glibc's malloc.c for blocks above 1 KiB. A block is cut from the
smallest free chunk that fits, else from the top of the heap, else, from ``M_MMAP_THRESHOLD`` on, it is a
mapping of its own. That threshold grows with the mappings that are freed, up to 32 MiB (mallopt(3)).
"""

from __future__ import annotations

from collections.abc import Iterable

from chainer_ooc.swap.tiers.free_blocks import FreeBlocks

__all__ = ["resident_peak"]

_THRESHOLD = 128 << 10
_THRESHOLD_MAX = 32 << 20
_TOP_PAD = 128 << 10
_PAGE = 4096


class _Heap:
    def __init__(self, fixed_threshold: int | None) -> None:
        self.threshold = fixed_threshold or _THRESHOLD
        self.trim = 2 * self.threshold if fixed_threshold else _THRESHOLD
        self.dynamic = fixed_threshold is None
        self.mapped = 0
        self.top = 0  # the begin of the top chunk
        self.end = 0  # the end of the heap
        self.touched = 0  # the heap is resident up to here
        self.free = FreeBlocks()

    @property
    def resident(self) -> int:
        return self.mapped + self.touched

    def malloc(self, nbytes: int) -> tuple[int, int]:
        """Return (address, size). The address of a mapping is -1."""
        size = -(-(nbytes + 16) // 16) * 16
        address = self.free.take(size)
        if address is not None:
            return address, size
        if self.end - self.top < size:
            if size >= self.threshold:
                size = -(-size // _PAGE) * _PAGE
                self.mapped += size
                return -1, size
            self.end = -(-(self.top + size + _TOP_PAD) // _PAGE) * _PAGE
        address = self.top
        self.top += size
        self.touched = max(self.touched, self.top)
        return address, size

    def release(self, address: int, size: int) -> None:
        if address < 0:
            self.mapped -= size
            if self.dynamic and self.threshold < size <= _THRESHOLD_MAX:
                self.threshold, self.trim = size, 2 * size
            return
        self.free.insert(address, size)
        begin, size = self.free.last()
        if begin + size == self.top:
            self.free.take_exactly(begin, size)
            self.top = begin
            if self.end - self.top > self.trim:
                self.end = self.top + _TOP_PAD
                self.touched = min(self.touched, self.end)


def resident_peak(events: Iterable[tuple[int, int]], threshold: int | None = None) -> int:
    """Return the most resident memory (bytes) during a sequence of allocations and releases.

    Args:
        events: (number, bytes) of each allocation, (number, -bytes) of its release, in order.
        threshold: ``M_MMAP_THRESHOLD`` (bytes) if it was set; ``None``: glibc's own, which grows.
    """
    heap = _Heap(threshold)
    blocks: dict[int, tuple[int, int]] = {}
    peak = 0
    for number, nbytes in events:
        if nbytes > 0:
            blocks[number] = heap.malloc(nbytes)
            peak = max(peak, heap.resident)
        else:
            heap.release(*blocks.pop(number))
    return peak
