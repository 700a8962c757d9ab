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
    """The base class of the errors that chainer_ooc raises."""


class SettingError(OutOfCoreError, ValueError):
    """A setting has a value that is not allowed. The message names the setting and the value."""


class OutOfMemoryError(OutOfCoreError, MemoryError):
    """The arrays that must be in memory at one time do not fit under the limit."""


class SwapSpaceError(OutOfCoreError, OSError):
    """The swap file is full or cannot be written. No data was lost: the arrays stay in memory."""


class GraphReleasedError(OutOfCoreError, RuntimeError):
    """``single_backward`` dropped the requested array after its last use."""


class CorruptCopyError(OutOfCoreError, OSError):
    """With ``verify``: a copy came back with other bytes. The disk, or the memory, is broken."""
