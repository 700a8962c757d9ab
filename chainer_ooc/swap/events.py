"""The interface of observers, which are told of events as they happen: traces, profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from chainer_ooc.swap.devices.protocol import Span

if TYPE_CHECKING:
    from chainer_ooc.swap.storage import Storage

__all__ = ["Copied", "Observer"]


class Copied(NamedTuple):
    """One copy of a storage, in either direction.

    Attributes:
        device: The name of the device.
        label: The name of the function that saved the storage first.
        sequence: The number of the storage.
        nbytes: The storage's size.
        out: The copy went out, not in.
    """

    device: str
    label: str
    sequence: int
    nbytes: int
    out: bool


class Observer:
    """Receive events. The threads that compute call its methods."""

    def ran(self, device: str, label: str, backward: bool, span: Span) -> None:
        """Receive a function's run, forward or backward. Its span excludes waits before it."""

    def copied(self, copied: Copied, span: Span) -> None:
        """Receive a copy of a storage, out or in."""

    def remade(self, storage: Storage, span: Span) -> None:
        """Receive a storage that was computed again."""

    def stalled(self, device: str, cause: str, span: Span) -> None:
        """Receive a wait of a computing thread. For the causes see :class:`~chainer_ooc.Stats`."""

    def used(self, device: str, time: float, nbytes: int) -> None:
        """Receive the memory in use at a moment (bytes)."""
