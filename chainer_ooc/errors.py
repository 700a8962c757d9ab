"""The errors of chainer_ooc."""

from __future__ import annotations

__all__ = [
    "CorruptCopyError",
    "GraphReleasedError",
    "OutOfCoreError",
    "OutOfMemoryError",
    "SettingError",
    "SwapSpaceError",
]


class OutOfCoreError(Exception):
    """Base class of all errors that chainer_ooc raises of itself."""


class SettingError(OutOfCoreError, ValueError):
    """A setting has a value that is not allowed. The message names both."""


class OutOfMemoryError(OutOfCoreError, MemoryError):
    """What must be in memory at one time does not fit under the limit."""


class SwapSpaceError(OutOfCoreError, OSError):
    """The swap file cannot take more (or cannot be written). No data was lost: arrays stay resident."""


class GraphReleasedError(OutOfCoreError, RuntimeError):
    """An array was asked for that ``single_backward`` has dropped after its last use."""


class CorruptCopyError(OutOfCoreError, OSError):
    """With ``verify``: what came back is not what went out. The disk, or the memory, is broken."""
