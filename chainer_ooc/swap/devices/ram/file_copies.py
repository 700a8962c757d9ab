"""Copies in the swap file: whole pages on disk, the unaligned ends in memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from chainer_ooc.swap.devices.copy_threads import PIECE
from chainer_ooc.swap.devices.protocol import Span
from chainer_ooc.swap.tiers.swap_file import ALIGNMENT, SwapFile

__all__ = ["FileCopy"]

_Move = Callable[[int, memoryview], None]


class FileCopy:
    """A storage's bytes: its pages in the swap file, its unaligned first and last bytes in RAM.

    Direct I/O moves only whole, aligned pages of memory. An allocation begins and ends somewhere inside a
    page. Those ends, less than two pages, stay here.

    Args:
        file: The swap file.
        nbytes: The size of the storage.
        page_offset: The storage's first address, or that modulo the page size.
    """

    def __init__(self, file: SwapFile, nbytes: int, page_offset: int) -> None:
        self._head = min(-page_offset % ALIGNMENT, nbytes)
        self._body = (nbytes - self._head) // ALIGNMENT * ALIGNMENT
        self._ends: tuple[bytes, bytes] = (b"", b"")
        self._file = file
        self._offset = file.allocate(self._body) if self._body else -1

    def free(self) -> None:
        """Free the block of the file."""
        if self._offset >= 0:
            self._file.free(self._offset, self._body)
            self._offset = -1

    def write(self, memory: memoryview) -> list[Callable[[], Span]]:
        """Return the jobs that write ``memory``, the storage's bytes. Each returns its begin and its end."""
        self._ends = (
            bytes(memory[: self._head]),
            bytes(memory[self._head + self._body :]),
        )
        return self._pieces(memory, self._file.write)

    def read(self, memory: memoryview) -> list[Callable[[], Span]]:
        """Return the jobs that fill ``memory`` with the storage's bytes. Each returns its begin and its end."""
        memory[: self._head], memory[self._head + self._body :] = self._ends
        return self._pieces(memory, self._file.read)

    def _pieces(self, memory: memoryview, move: _Move) -> list[Callable[[], Span]]:
        return [
            functools.partial(
                _timed,
                move,
                self._offset + start,
                memory[self._head + start : self._head + min(start + PIECE, self._body)],
            )
            for start in range(0, self._body, PIECE)
        ]


def _timed(move: _Move, offset: int, piece: memoryview) -> Span:
    start = time.perf_counter()
    # Release the memory before the transfer counts as done: a check of its reference count must not
    # find this thread's reference.
    with piece:
        move(offset, piece)
    return start, time.perf_counter()
