"""Running copies between a GPU and the host: when they end, and which memory must stay until then."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from chainer_ooc.swap.devices.cuda.host import DiskCopy
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
        """Return whether the copy has ended."""
        if not self._event.done:
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
        if not self._event.done:
            return None
        return self._streams.host_time(self._begin), self._streams.host_time(self._event)

    def arrival(self) -> Any:
        """Return the event at the end of the copy."""
        return self._event


class DiskTransfer:
    """Pieces that threads carry between the GPU and the swap file."""

    def __init__(self, copy: DiskCopy, futures: list[Future[Span]], owner: Any) -> None:
        self.copy: SwappedBlock = copy
        self._futures = futures
        self._span: Span | None = None
        self._owner = owner

    def done(self) -> bool:
        """Return whether all pieces have ended."""
        if not all(future.done() for future in self._futures):
            return False
        self._owner = None
        return True

    def join(self) -> None:
        """Wait for all pieces and raise the first error."""
        self.wait()
        # Avoid a cycle: an error refers to the frames it passes, and a future to its error.
        futures, self._futures = self._futures[::-1], []
        spans = []
        while futures:
            spans.append(futures.pop().result())
        self._span = min(start for start, _ in spans), max(end for _, end in spans)

    def wait(self) -> None:
        """Wait for all pieces. Errors are not raised."""
        for future in self._futures:
            future.exception()
        self._owner = None

    def span(self) -> Span | None:
        """Return when the first piece began and the last one ended, after a wait for them."""
        return self._span

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
