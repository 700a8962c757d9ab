"""The workspace limit of convolutions."""

from __future__ import annotations

import os

from chainer_ooc.compat.cudnn import choice

__all__ = ["DEFAULT", "VARIABLE", "get_max_workspace_size", "set_max_workspace_size"]

VARIABLE = "CHAINER_OOC_CUDNN_WORKSPACE"
#: The limit without the variable (bytes).
DEFAULT = 64 << 20


def _from_environment() -> int:
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return DEFAULT
    try:
        size = int(text)
    except ValueError:
        size = -1
    if size < 0:
        choice.refuse(f"{VARIABLE}={text!r} is not understood: give a number of bytes, 0 or more")
    return size


_max_workspace_size = _from_environment()


def get_max_workspace_size() -> int:
    """Return the workspace limit of convolutions, bytes."""
    return _max_workspace_size


def set_max_workspace_size(size: int) -> None:
    """Set the workspace limit of convolutions for the process.

    Where every usable algorithm needs more, the one that needs least is used all the same.

    Args:
        size: Bytes, 0 or more.

    Raises:
        ValueError: If it is negative.
    """
    global _max_workspace_size
    if size < 0:
        raise ValueError(f"the workspace limit must be 0 bytes or more, not {size}")
    _max_workspace_size = int(size)
