"""The swap file: blocks of one unlinked file, written and read with direct I/O, past the page cache."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator

from chainer_ooc.errors import SwapSpaceError
from chainer_ooc.settings import EXTENT
from chainer_ooc.swap.system import forks
from chainer_ooc.swap.tiers.forked_readers import Descriptor, ForkedReaders
from chainer_ooc.swap.tiers.free_blocks import FreeBlocks, round_up

__all__ = ["ALIGNMENT", "SwapFile"]

#: Direct I/O wants addresses, offsets and lengths in multiples of this (bytes).
ALIGNMENT = 4096


class SwapFile:
    """Space on disk: :meth:`allocate` a block, write and read it, :meth:`free` it.

    The file is made with mode 0600 in ``directory`` at the first allocation and unlinked at once. So its
    space returns to the file system when the process ends, however it ends. Freed blocks are merged with
    their neighbours and used again. Space is reserved before a block is handed out: a full disk is an error
    of :meth:`allocate`, never of a write. All methods may be called from any thread.

    A forked process may read the blocks that were in use at the fork, and no others. They are not used
    again while such a process lives, unless the disk is full. Then its reads are errors.

    Args:
        directory: The directory of the file.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._lock = threading.RLock()  # garbage collection inside one method may call another
        self._file: Descriptor | None = None
        self._forget()
        _files.add(self)

    def _forget(self) -> None:
        self.size = 0
        self.allocated = 0
        self._is_direct = False
        self._free = FreeBlocks()
        self._used: set[int] = set()  # the offsets of the blocks in use
        # Groups of forked readers, the newest one while it still grows, and the blocks that
        # were freed since: offset -> size (bytes).
        self._readers: list[ForkedReaders] = []
        self._newest: ForkedReaders | None = None
        self._kept: dict[int, int] = {}
        # In a forked process: its group, None if the parent does not know of it.
        self._is_inherited = False
        self._inherited: ForkedReaders | None = None

    def allocate(self, nbytes: int) -> int:
        """Return the offset of a block of at least ``nbytes`` bytes.

        Raises:
            SwapSpaceError: If the disk is full or the file cannot be made.
        """
        size = round_up(nbytes, ALIGNMENT)
        with self._lock:
            if self._is_inherited:
                raise SwapSpaceError(
                    errno.EBADF, "the swap file is that of the parent process", self.directory
                )
            if self._file is None:
                self._file = self._open()
            self._look_after_readers()
            offset = self._find(size)
            self.allocated += size
            self._used.add(offset)
            return offset

    def free(self, offset: int, nbytes: int) -> None:
        """Take back the block of ``nbytes`` bytes at ``offset``."""
        with self._lock:
            if offset not in self._used:  # it was closed
                return
            size = round_up(nbytes, ALIGNMENT)
            self.allocated -= size
            self._used.remove(offset)
            if self._is_inherited:
                if not self._used:
                    self.close()
                return
            self._look_after_readers()
            if any(offset in readers.blocks for readers in self._readers):
                self._kept[offset] = size
            else:
                self._free.insert(offset, size)

    def write(self, offset: int, buffer: memoryview) -> None:
        """Write the bytes of a buffer. Direct I/O needs an aligned address, offset and length.

        Raises:
            OSError: If writing fails. The error names the directory.
        """
        with self._explained("written", offset) as number:
            if self._is_inherited:
                raise OSError(errno.EBADF, "it is that of the parent process")
            self._transfer(os.pwrite, number, offset, buffer, "no more can be written")

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with bytes of the file. Direct I/O needs an aligned address, offset and length.

        Raises:
            OSError: If reading fails, the file is too short, or this process was forked and the parent uses
                the block again. The error names the directory.
        """
        with self._explained("read", offset) as number:
            self._transfer(_read_into, number, offset, buffer, "it ends there")
            if self._is_inherited:
                if self._inherited is None:
                    raise OSError(
                        errno.ESTALE,
                        "too few file descriptors were left to keep what was saved before the fork",
                    )
                self._inherited.check()

    def close(self) -> None:
        """Give all the space back to the file system."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            for readers in (*self._readers, *filter(None, [self._inherited])):
                readers.close()
            self._file = None
            self._forget()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # modules may be gone
            self.close()

    def _transfer(
        self,
        move: Callable[[int, memoryview, int], int],
        number: int,
        offset: int,
        buffer: memoryview,
        stopped: str,
    ) -> None:
        total, done = buffer.nbytes, 0
        while done < total:
            with buffer[done:] as rest:  # else an error would refer to it, and so to the memory
                moved = move(number, rest, offset + done)
            if self._is_direct:
                moved -= moved % ALIGNMENT  # go on at a page's start
            if not moved:
                raise OSError(errno.EIO, stopped)
            done += moved

    @contextlib.contextmanager
    def _explained(self, done: str, offset: int) -> Iterator[int]:
        """Yield the descriptor, and name the file in errors raised inside the ``with``."""
        file = self._file
        try:
            if file is None:
                raise OSError(errno.EBADF, "it is closed")
            yield file.number()
        except OSError as error:
            raise OSError(
                error.errno,
                f"the swap file could not be {done} at byte {offset}: {error.strerror}",
                self.directory,
            ) from error

    def _open(self) -> Descriptor:
        path = os.path.join(self.directory, f".chainer_ooc-{os.getpid()}-{uuid.uuid4().hex}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            try:
                fd = os.open(path, flags | os.O_DIRECT, 0o600)
                self._is_direct = True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                if os.path.exists(path):  # some file systems make the file before they refuse
                    os.unlink(path)
                fd = os.open(path, flags, 0o600)
            os.unlink(path)
        except OSError as error:
            raise SwapSpaceError(
                error.errno,
                f"the swap file cannot be made ({error.strerror}); set swap_dir to a directory that can be written to",
                self.directory,
            ) from error
        return Descriptor(fd)

    def _find(self, size: int) -> int:
        while (offset := self._free.take(size)) is None:
            try:
                self._grow(size)
            except SwapSpaceError:
                if not self._kept:
                    raise
                # The disk is full: use the blocks that forked processes could still read.
                for readers in self._readers:
                    readers.refuse()
                    readers.close()
                self._readers = []
                self._use_kept()
        return offset

    def _grow(self, size: int) -> None:
        extent = max(size, EXTENT)
        try:
            self._reserve(extent)
        except OSError:
            try:  # the disk may have room for this block, though not for an extent
                extent = size
                self._reserve(extent)
            except OSError as error:
                remedy = "free space there, or set swap_dir to a directory on a larger disk"
                if error.errno == errno.EFBIG:
                    remedy = "raise the limit of the size of files (ulimit -f)"
                raise SwapSpaceError(
                    error.errno,
                    f"the swap file cannot grow by {size} bytes beyond {self.size} ({error.strerror}); no data "
                    f"was lost; {remedy}",
                    self.directory,
                ) from error
        self._free.insert(self.size, extent)
        self.size += extent

    def _reserve(self, extent: int) -> None:
        assert self._file is not None
        most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if most != resource.RLIM_INFINITY and self.size + extent > most:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))  # the system would send SIGXFSZ
        os.posix_fallocate(self._file.number(), self.size, extent)

    # Forks.

    def _look_after_readers(self) -> None:
        """Seal the newest group of forked readers, and free the blocks of groups that have ended."""
        if self._newest is not None:
            self._newest.seal()
            self._newest = None
        ended = [readers for readers in self._readers if readers.have_ended()]
        if ended:
            for readers in ended:
                readers.close()
            self._readers = [readers for readers in self._readers if readers not in ended]
            self._use_kept()

    def _use_kept(self) -> None:
        for offset in tuple(self._kept):
            if not any(offset in readers.blocks for readers in self._readers):
                self._free.insert(offset, self._kept.pop(offset))

    def _before_fork(self) -> None:
        if self._used and not self._is_inherited and self._newest is None:
            self._look_after_readers()
            with contextlib.suppress(OSError):  # none left: the child's reads are errors
                self._newest = ForkedReaders(self._used)
                self._readers.append(self._newest)

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        if self._is_inherited:
            return
        for readers in self._readers:
            readers.inherit()
        self._readers, self._kept = [], {}
        self._inherited, self._newest = self._newest, None
        self._is_inherited = True
        if not self._used:  # nothing to read: do not keep its space
            self.close()


def _read_into(number: int, buffer: memoryview, offset: int) -> int:
    return os.preadv(number, [buffer], offset)


_files: weakref.WeakSet[SwapFile] = weakref.WeakSet()


def _before_fork() -> None:
    files = tuple(_files)
    forks.hold([file._lock for file in files])
    for file in files:
        file._before_fork()


def _after_fork() -> None:
    for file in tuple(_files):
        file._after_fork()


forks.register(_after_fork, _before_fork)
