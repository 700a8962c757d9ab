"""Copies in the swap file: whole pages as they are, or without their zeros."""

from __future__ import annotations

import functools
import math
import mmap
import threading
import time
from collections.abc import Callable

import numpy as np

from chainer_ooc.swap.disk import ALIGNMENT, SwapFile
from chainer_ooc.swap.observing import Span

__all__ = ["PIECE", "FileCopy", "FileTransfer"]

#: The largest piece of a storage that a thread copies at a time (bytes).
PIECE = 16 << 20
#: The same where zeros are left out: each thread has a buffer of this size.
PACKED_PIECE = 2 << 20
#: A piece that would shrink to more than this share is written as it is.
_WORTH = 0.75

_Move = Callable[[int, memoryview], None]
_local = threading.local()


class FileCopy:
    """A storage's bytes: pages in the swap file, and the unaligned bytes before and after them in RAM.

    Direct I/O moves only whole, aligned pages of memory. An allocation begins and ends somewhere in a
    page: those ends, less than two pages, are kept here.

    Args:
        file: Where.
        nbytes: The size of the storage.
        phase: Its first address, or that modulo the page size.
        skips_zeros: Words of 32 bits that are zero are not written, but one bit for each word, where that is less.
    """

    def __init__(self, file: SwapFile, nbytes: int, phase: int, skips_zeros: bool = False) -> None:
        self._head = min(-phase % ALIGNMENT, nbytes)
        self._body = (nbytes - self._head) // ALIGNMENT * ALIGNMENT
        self._ends: tuple[bytes, bytes] = (b"", b"")
        self._file = file
        self._skips_zeros = skips_zeros
        # How many words of each piece are not zero, and what is not written of it (bytes); those that were written
        # as they are have no entry.
        self._packed: dict[int, tuple[int, int]] = {}
        self._offset = file.allocate(self._body) if self._body else -1

    @property
    def skipped_bytes(self) -> int:
        """How much less is in the file than in memory."""
        return sum(skipped for _, skipped in self._packed.values())

    def free(self) -> None:
        """Give the block back to the file."""
        if self._offset >= 0:
            self._file.free(self._offset, self._body)
            self._offset = -1

    def write(self, memory: memoryview) -> list[Callable[[], Span]]:
        """Return the calls that write ``memory``, the storage's bytes. Each returns when it began and ended."""
        self._ends = (
            bytes(memory[: self._head]),
            bytes(memory[self._head + self._body :]),
        )
        return self._pieces(memory, self._write_packed if self._skips_zeros else self._file.write)

    def read(self, memory: memoryview) -> list[Callable[[], Span]]:
        """Return the calls that fill ``memory`` with the storage's bytes. Each returns when it began and ended."""
        memory[: self._head], memory[self._head + self._body :] = self._ends
        return self._pieces(memory, self._read_packed if self._skips_zeros else self._file.read)

    def _pieces(self, memory: memoryview, move: _Move) -> list[Callable[[], Span]]:
        size = PACKED_PIECE if self._skips_zeros else PIECE
        return [
            functools.partial(
                _timed,
                move,
                self._offset + start,
                memory[self._head + start : self._head + min(start + size, self._body)],
            )
            for start in range(0, self._body, size)
        ]

    # Arrays over a piece are gone before its transfer can fail: the error would hold them, and they the memory.

    def _write_packed(self, offset: int, piece: memoryview) -> None:
        words = np.frombuffer(piece, np.uint32)
        is_present = words != 0
        count = int(np.count_nonzero(is_present))
        size = _packed_bytes(words.size, count)
        if size > _WORTH * piece.nbytes:
            del words
            self._file.write(offset, piece)
            return
        packed = _buffer()[:size]
        bits, values = _parts(packed, words.size, count)
        bits[:] = np.packbits(is_present)
        np.compress(is_present, words, out=values)
        del words
        self._file.write(offset, packed)
        self._packed[offset] = count, piece.nbytes - size

    def _read_packed(self, offset: int, piece: memoryview) -> None:
        if offset not in self._packed:
            self._file.read(offset, piece)
            return
        count, skipped = self._packed[offset]
        packed = _buffer()[: piece.nbytes - skipped]
        self._file.read(offset, packed)
        words = np.frombuffer(piece, np.uint32)
        bits, values = _parts(packed, words.size, count)
        words[...] = 0
        if count:
            np.place(words, np.unpackbits(bits, count=words.size).view(bool), values)


def _packed_bytes(words: int, present: int) -> int:
    """Return how many bytes so many words are of which so many are not zero, in whole pages."""
    return -(-(words // 8 + 4 * present) // ALIGNMENT) * ALIGNMENT


def _parts(packed: memoryview, words: int, present: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the bits that tell which words are not zero, and these."""
    bits = np.frombuffer(packed, np.uint8, words // 8)
    return bits, np.frombuffer(packed, np.uint32, present, words // 8)


def _buffer() -> memoryview:
    """Return the calling thread's buffer, at the beginning of a page."""
    found: memoryview | None = getattr(_local, "buffer", None)
    if found is None:
        found = _local.buffer = memoryview(mmap.mmap(-1, PACKED_PIECE))
    return found


def _timed(move: _Move, offset: int, piece: memoryview) -> Span:
    start = time.perf_counter()
    # Released here, before the transfer counts as done: whoever then asks who holds the storage's
    # memory must not find a thread that is about to let go.
    with piece:
        move(offset, piece)
    return start, time.perf_counter()


class FileTransfer:
    """Pieces of a :class:`FileCopy` that threads are writing or reading.

    Args:
        copy: The copy.
        count: How many pieces. Each is given to :meth:`run`, once.
    """

    def __init__(self, copy: FileCopy, count: int) -> None:
        self.copy = copy
        self._left = count
        self._lock = threading.Lock()
        self._under_way = threading.Lock()  # held until the last piece has ended
        self._begin, self._end = math.inf, 0.0
        self._error: BaseException | None = None
        if count:
            self._under_way.acquire()

    def run(self, piece: Callable[[], Span]) -> None:
        """Write or read one piece, in any thread. Raises nothing."""
        begin, end = math.inf, 0.0
        try:
            begin, end = piece()
        except BaseException as error:
            self._error = self._error or error
        with self._lock:
            self._begin, self._end = min(self._begin, begin), max(self._end, end)
            self._left -= 1
            if not self._left:
                self._under_way.release()

    def done(self) -> bool:
        """Tell whether all pieces have ended."""
        return not self._left

    def wait(self) -> None:
        """Wait for all pieces, well or badly ended."""
        with self._under_way:
            pass

    def join(self) -> None:
        """Wait for all pieces; raise the first error."""
        self.wait()
        if self._error is not None:
            raise self._error

    def span(self) -> Span | None:
        """Return when the first piece began and the last ended."""
        is_over = self._end and not self._left and self._error is None
        return (self._begin, self._end) if is_over else None

    def arrival(self) -> float | None:
        """Return when the last piece ended."""
        span = self.span()
        return span[1] if span else None
