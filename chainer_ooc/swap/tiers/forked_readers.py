"""ForkedReaders: the processes forked at one time, which may read what a swap file held then."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Collection

__all__ = ["Descriptor", "ForkedReaders"]


class Descriptor:
    """A file descriptor that notices if somebody else has closed its number, and maybe opened it again.

    A daemon closes all descriptors it has inherited: what is under the number then is not ours to read or close.

    Args:
        number: The open descriptor.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._identity = _identity(number)

    def number(self) -> int:
        """Return the number.

        Raises:
            OSError: If somebody else has closed it (``EBADF``).
        """
        if _identity(self._number) != self._identity:
            raise OSError(
                errno.EBADF, "its file descriptor was closed by other code of this process"
            )
        return self._number

    def close(self) -> None:
        """Close it, unless that was done."""
        with contextlib.suppress(OSError):
            os.close(self.number())


class ForkedReaders:
    """The processes that are forked while the same blocks of a file are in use, and those that they fork.

    The kernel counts them: each has inherited the writing end of a pipe, which nobody writes to. When the last of
    them has ended, or runs another program, its reading end is at the end of file.

    Args:
        blocks: The offsets of the blocks that these processes may read.

    Raises:
        OSError: If there are no more file descriptors.
    """

    def __init__(self, blocks: Collection[int]) -> None:
        self.blocks = frozenset(blocks)
        self._is_refused = mmap.mmap(-1, 1)  # a page that these processes share
        ends = os.pipe()
        os.set_blocking(ends[0], False)
        self._reading, self._writing = map(Descriptor, ends)

    # In the process that has forked them.

    def seal(self) -> None:
        """Fork no more of them."""
        self._writing.close()

    def have_ended(self) -> bool:
        """Tell whether none of them is left. :meth:`seal` comes before."""
        try:
            return not os.read(self._reading.number(), 1)
        except (
            OSError
        ):  # BlockingIOError; or who closed the descriptor has made it impossible to know
            return False

    def refuse(self) -> None:
        """Let what they read from now on be an error: their blocks are about to be used again."""
        self._is_refused[0] = 1

    def close(self) -> None:
        """Forget them."""
        self._writing.close()
        self._reading.close()

    # In one of them.

    def inherit(self) -> None:
        """Become one of them."""
        self._reading.close()

    def check(self) -> None:
        """Make sure that what has just been read was not written by the parent process meanwhile.

        Raises:
            OSError: If it may have been.
        """
        if self._is_refused[0]:
            raise OSError(
                errno.ESTALE,
                "the disk became full, so that the process in which this was saved has used its space again after "
                "the fork",
            )
        self._writing.number()  # while it is open, the parent process knows of this one


def _identity(number: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino
