"""Observer: who is told what happens, as it happens: traces, profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from chainer_ooc.swap.devices.protocol import Span

if TYPE_CHECKING:
    from chainer_ooc.swap.storage import Storage

__all__ = ["Copied", "Observer"]


class Copied(NamedTuple):
    """What was copied.

    Attributes:
        device: The name of the device.
        label: The function that saved it first.
        sequence: The number of the storage.
        nbytes: Its size.
        out: Whether it was copied out, or back in.
    """

    device: str
    label: str
    sequence: int
    nbytes: int
    out: bool


class Observer:
    """Is told what happens; does nothing with it. Called in the threads that compute."""

    def ran(self, device: str, label: str, backward: bool, span: Span) -> None:
        """Tell that a function of the graph has run, forward or backward, without what it waited for before."""

    def copied(self, copied: Copied, span: Span) -> None:
        """Tell that a storage has been copied out, or back in."""

    def remade(self, storage: Storage, span: Span) -> None:
        """Tell that a storage has been computed again."""

    def stalled(self, device: str, cause: str, span: Span) -> None:
        """Tell that a computing thread has waited. For the causes see :class:`~chainer_ooc.Stats`."""

    def used(self, device: str, time: float, nbytes: int) -> None:
        """Tell how much memory was in use at a moment (bytes)."""
