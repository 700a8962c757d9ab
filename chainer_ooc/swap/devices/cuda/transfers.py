"""Copies under way between a GPU and the host: when they have ended, and what must not be used until then."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from chainer_ooc.swap.devices.cuda.host import DiskCopy
from chainer_ooc.swap.devices.cuda.streams import CopyStreams
from chainer_ooc.swap.devices.protocol import Span, SwappedBlock

__all__ = ["DiskTransfer", "FailedTransfer", "StreamTransfer"]


class StreamTransfer:
    """A copy on a stream, between the GPU and page-locked memory."""

    def __init__(
        self, streams: CopyStreams, copy: SwappedBlock, begin: Any, event: Any, owner: Any
    ) -> None:
        self.copy = copy
        self._streams = streams
        self._begin = begin
        self._event = event
        # The pool would hand the memory out again while it is still read or written.
        self._owner = owner

    def done(self) -> bool:
        """Tell whether it has ended."""
        if not self._event.done:
            return False
        self._owner = None
        return True

    def join(self) -> None:
        """Make the computing streams wait for it. The host does not."""
        self._streams.let_compute_wait(self._event)
        self._owner = None

    def wait(self) -> None:
        """Wait until it has ended."""
        self._event.synchronize()
        self._owner = None

    def span(self) -> Span | None:
        """Return when it began and ended on its stream, ``None`` if it has not ended yet."""
        if not self._event.done:
            return None
        return self._streams.host_time(self._begin), self._streams.host_time(self._event)

    def arrival(self) -> Any:
        """Return the event of its end."""
        return self._event


class DiskTransfer:
    """Pieces that threads carry between the GPU and the swap file."""

    def __init__(self, copy: DiskCopy, futures: list[Future[Span]], owner: Any) -> None:
        self.copy: SwappedBlock = copy
        self._futures = futures
        self._span: Span | None = None
        self._owner = owner

    def done(self) -> bool:
        """Tell whether all pieces have ended."""
        if not all(future.done() for future in self._futures):
            return False
        self._owner = None
        return True

    def join(self) -> None:
        """Wait for all pieces; raise the first error."""
        self.wait()
        # An error holds the frames it passes, this one too, and a future its error: no cycle.
        futures, self._futures = self._futures[::-1], []
        spans = []
        while futures:
            spans.append(futures.pop().result())
        self._span = min(start for start, _ in spans), max(end for _, end in spans)

    def wait(self) -> None:
        """Wait for all pieces, well or badly ended."""
        for future in self._futures:
            future.exception()
        self._owner = None

    def span(self) -> Span | None:
        """Return when the first piece began and the last ended, once it was waited for."""
        return self._span

    def arrival(self) -> None:
        """Return ``None``: the host has waited for it."""


class FailedTransfer:
    """A transfer that could not be begun: it fails when it is joined, as one that fails under way."""

    def __init__(self, copy: SwappedBlock, error: OSError) -> None:
        self.copy = copy
        self._arguments = error.args  # the error itself holds frames that hold the memory

    def done(self) -> bool:
        """Return ``True``."""
        return True

    def join(self) -> None:
        """Raise the error."""
        raise OSError(*self._arguments)

    def wait(self) -> None:
        """Return at once."""

    def span(self) -> Span | None:
        """Return ``None``: it never began."""
        return None

    def arrival(self) -> None:
        """Return ``None``: it never does."""
