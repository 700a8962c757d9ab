"""Track the forked processes that may still read what a swap file held at the fork."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Collection

__all__ = ["Descriptor", "ForkedReaders"]


class Descriptor:
    """A file descriptor that notices if other code has closed its number, and maybe opened it again.

    A daemon closes all descriptors that it inherits. What has the number then is not ours to read or close.

    Args:
        number: The open descriptor.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._identity = _identity(number)

    def number(self) -> int:
        """Return the number.

        Raises:
            OSError: If other code has closed it (``EBADF``).
        """
        if _identity(self._number) != self._identity:
            raise OSError(
                errno.EBADF, "its file descriptor was closed by other code of this process"
            )
        return self._number

    def close(self) -> None:
        """Close the descriptor, unless that was done."""
        with contextlib.suppress(OSError):
            os.close(self.number())


class ForkedReaders:
    """The processes forked while the same blocks of a file were in use, and their own children.

    The kernel counts them. Each inherits the writing end of a pipe, and nobody writes to it. When the last
    of them has ended, or runs another program, the reading end is at the end of file.

    Args:
        blocks: The offsets of the blocks that these processes may read.

    Raises:
        OSError: If no file descriptors are left.
    """

    def __init__(self, blocks: Collection[int]) -> None:
        self.blocks = frozenset(blocks)
        self._is_refused = mmap.mmap(-1, 1)  # a page that these processes share
        ends = os.pipe()
        os.set_blocking(ends[0], False)
        self._reading, self._writing = map(Descriptor, ends)

    # Called in the parent.

    def seal(self) -> None:
        """Close the group: processes that are forked later do not belong to it."""
        self._writing.close()

    def have_ended(self) -> bool:
        """Return whether no process of the group is left. Call :meth:`seal` first."""
        try:
            return not os.read(self._reading.number(), 1)
        except OSError:  # BlockingIOError, or the descriptor was closed and nobody can know
            return False

    def refuse(self) -> None:
        """Make every later read by these processes an error: their blocks are about to be used again."""
        self._is_refused[0] = 1

    def close(self) -> None:
        """Close the descriptors of the group."""
        self._writing.close()
        self._reading.close()

    # Called in a forked child.

    def inherit(self) -> None:
        """Make this process, a forked child, a member of the group."""
        self._reading.close()

    def check(self) -> None:
        """Check, in a member, that the parent did not use the block again before the last read.

        Raises:
            OSError: If it may have.
        """
        if self._is_refused[0]:
            raise OSError(
                errno.ESTALE,
                "the disk became full, so that the process in which this was saved has used its space again after "
                "the fork",
            )
        self._writing.number()  # while it is open, the parent waits for this process


def _identity(number: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino
