"""Running copies between a GPU and the host: when they end, and which memory must stay until then."""

from __future__ import annotations

from typing import Any

from chainer_ooc.swap.devices.copy_threads import FileTransfer
from chainer_ooc.swap.devices.cuda.streams import CopyStreams
from chainer_ooc.swap.devices.protocol import Span, SwappedBlock

__all__ = ["DiskTransfer", "FailedTransfer", "StreamTransfer"]


class StreamTransfer:
    """A copy on a stream, between the GPU and pinned host memory."""

    def __init__(
        self, streams: CopyStreams, copy: SwappedBlock, begin: Any, event: Any, owner: Any
    ) -> None:
        self.copy = copy
        self._streams = streams
        self._begin = begin
        self._event = event
        # Keep the memory: the pool would hand it out again while a copy still uses it.
        self._owner = owner

    def done(self) -> bool:
        """Return whether the copy has ended.

        Raises:
            CUDARuntimeError: If the GPU has failed. The memory is kept.
        """
        if not self._streams.has_passed(self._event):
            return False
        self._owner = None
        return True

    def join(self) -> None:
        """Make the computing streams wait for the copy. The host does not wait."""
        self._streams.let_compute_wait(self._event)
        self._owner = None

    def wait(self) -> None:
        """Wait until the copy has ended."""
        self._event.synchronize()
        self._owner = None

    def span(self) -> Span | None:
        """Return the copy's begin and end on its stream, ``None`` before it has ended."""
        if not self._streams.has_passed(self._event):
            return None
        return self._streams.host_time(self._begin), self._streams.host_time(self._event)

    def arrival(self) -> Any:
        """Return the event at the end of the copy."""
        return self._event


class DiskTransfer(FileTransfer):
    """Pieces that threads carry between the GPU and the swap file.

    Args:
        copy: The block of the file.
        count: The number of pieces.
        owner: The owner of the GPU's memory, which is kept until all pieces have ended.
    """

    def __init__(self, copy: SwappedBlock, count: int, owner: Any) -> None:
        super().__init__(copy, count)
        self._owner = owner

    def done(self) -> bool:
        """Return whether all pieces have ended."""
        if not super().done():
            return False
        self._owner = None
        return True

    def wait(self) -> None:
        """Wait for all pieces. Errors are not raised."""
        super().wait()
        self._owner = None

    def arrival(self) -> None:
        """Return ``None``: the host has waited for the pieces."""


class FailedTransfer:
    """A transfer that could not begin. Like one that fails later, it raises its error in :meth:`join`."""

    def __init__(self, copy: SwappedBlock, error: OSError) -> None:
        self.copy = copy
        self._arguments = error.args  # the error itself refers to frames that refer to the memory

    def done(self) -> bool:
        """Return ``True``."""
        return True

    def join(self) -> None:
        """Raise the error."""
        raise OSError(*self._arguments)

    def wait(self) -> None:
        """Return at once."""

    def span(self) -> Span | None:
        """Return ``None``: the transfer never began."""
        return None

    def arrival(self) -> None:
        """Return ``None``: the transfer never ends."""
