"""SwapFile: blocks of one unlinked file, written and read with direct I/O, past the page cache."""

from __future__ import annotations

import bisect
import errno
import os
import threading
import uuid

from chainer_ooc.errors import SwapSpaceError

__all__ = ["ALIGNMENT", "SwapFile"]

#: Direct I/O wants addresses, offsets and lengths in multiples of this (bytes).
ALIGNMENT = 4096
#: The file grows by extents of this size (bytes), or by one block if that is larger.
EXTENT = 64 << 20


class SwapFile:
    """Space outside memory: :meth:`allocate` a block, write and read it, :meth:`free` it.

    The file is made with mode 0600 in ``directory`` at the first allocation and unlinked at once: its
    space returns to the file system when the process ends, however it ends. Freed blocks are used again;
    neighbours are merged. Space is reserved before a block is handed out, so that a full disk is an error
    at :meth:`allocate`, never in the middle of a write. All methods may be called from any thread.

    Args:
        directory: Where the file is made.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.size = 0
        self.allocated = 0
        self.direct = False
        self._fd: int | None = None
        self._lock = threading.Lock()
        # Free blocks: offset -> size (bytes), and the offsets in order.
        self._free: dict[int, int] = {}
        self._offsets: list[int] = []

    def allocate(self, nbytes: int) -> int:
        """Return the offset of a block of at least ``nbytes`` bytes.

        Raises:
            SwapSpaceError: If the disk is full or the file cannot be made.
        """
        size = _round_up(nbytes)
        with self._lock:
            if self._fd is None:
                self._fd = self._open()
            # Best fit: the smallest free block that is large enough, the lowest of those.
            fits = [(free, offset) for offset, free in self._free.items() if free >= size]
            if not fits:
                self._grow(size)
                return self._take(self._offsets[-1], size)
            return self._take(min(fits)[1], size)

    def free(self, offset: int, nbytes: int) -> None:
        """Give back the block at ``offset`` that was allocated with ``nbytes`` bytes."""
        with self._lock:
            size = _round_up(nbytes)
            self.allocated -= size
            self._insert(offset, size)

    def write(self, offset: int, buffer: memoryview) -> None:
        """Write a buffer of bytes. With direct I/O all of its numbers must be aligned.

        Raises:
            OSError: If it fails.
        """
        fd = self._descriptor()
        while buffer.nbytes:
            done = os.pwrite(fd, buffer, offset)
            buffer, offset = buffer[done:], offset + done

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer of bytes. With direct I/O all of its numbers must be aligned.

        Raises:
            OSError: If it fails, or the file is shorter than that.
        """
        fd = self._descriptor()
        while buffer.nbytes:
            done = os.preadv(fd, [buffer], offset)
            if not done:
                raise OSError(errno.EIO, f"the swap file ends at {offset}", self.directory)
            buffer, offset = buffer[done:], offset + done

    def after_fork(self) -> None:
        """In a forked child: blocks can be read; freeing them changes nothing of the parent's."""
        self._lock = threading.Lock()

    def close(self) -> None:
        """Give all the space back to the file system."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
            self._fd, self.size, self.allocated = None, 0, 0
            self._free, self._offsets = {}, []

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def _descriptor(self) -> int:
        fd = self._fd
        if fd is None:
            raise OSError(errno.EBADF, "the swap file is closed", self.directory)
        return fd

    def _open(self) -> int:
        path = os.path.join(self.directory, f".chainer_ooc-{os.getpid()}-{uuid.uuid4().hex}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            try:
                fd = os.open(path, flags | os.O_DIRECT, 0o600)
                self.direct = True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                if os.path.exists(path):  # some file systems make the file before they refuse
                    os.unlink(path)
                fd = os.open(path, flags, 0o600)
                self.direct = False
            os.unlink(path)
        except OSError as error:
            raise SwapSpaceError(
                error.errno, f"the swap file cannot be made ({error.strerror})", self.directory
            ) from error
        return fd

    def _grow(self, size: int) -> None:
        extent = max(size, EXTENT)
        try:
            self._reserve(extent)
        except OSError:
            try:  # the disk may have room for this block, though not for an extent
                extent = size
                self._reserve(extent)
            except OSError as error:
                raise SwapSpaceError(
                    error.errno,
                    f"the swap file cannot grow by {size} bytes beyond {self.size} ({error.strerror}); no data "
                    "was lost; free space there, or set swap_dir to a directory on a larger disk",
                    self.directory,
                ) from error
        self._insert(self.size, extent)
        self.size += extent

    def _reserve(self, extent: int) -> None:
        assert self._fd is not None
        os.posix_fallocate(self._fd, self.size, extent)

    def _take(self, offset: int, size: int) -> int:
        """Cut ``size`` bytes off the front of the free block at ``offset``."""
        rest = self._free.pop(offset) - size
        index = bisect.bisect_left(self._offsets, offset)
        if rest:
            self._free[offset + size] = rest
            self._offsets[index] = offset + size
        else:
            del self._offsets[index]
        self.allocated += size
        return offset

    def _insert(self, offset: int, size: int) -> None:
        """Add a free block, merged with its neighbours."""
        index = bisect.bisect_left(self._offsets, offset)
        if index < len(self._offsets) and self._offsets[index] == offset + size:
            size += self._free.pop(self._offsets.pop(index))
        if index and self._offsets[index - 1] + self._free[self._offsets[index - 1]] == offset:
            self._free[self._offsets[index - 1]] += size
        else:
            self._offsets.insert(index, offset)
            self._free[offset] = size


def _round_up(nbytes: int) -> int:
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
