"""Words for messages and reports. Nothing here raises, and no warning ends what runs."""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import Any

__all__ = ["label_of", "repr_of", "shape_of", "warn"]


def label_of(func: Any) -> str:
    """Return the label of a function of the graph; the name of its class where the label cannot be had."""
    for name in (
        "label",
        "_impl_name",
    ):  # the second is the class's name, also of an old-style function
        with contextlib.suppress(Exception):  # they may be the user's properties
            return str(getattr(func, name))
    return type(func).__name__


def shape_of(x: Any) -> str:
    """Return the shape of an input as text; what it is instead where it has none."""
    try:
        return "None" if x is None else str(x.shape)
    except Exception:
        return f"a {type(x).__name__}"


def repr_of(value: Any) -> str:
    """Return ``repr(value)``; the name of its class where that fails."""
    try:
        return repr(value)
    except Exception:
        return f"<{type(value).__name__}>"


def warn(message: str, stacklevel: int = 1) -> None:
    """Issue a :class:`RuntimeWarning` in the midst of a computation.

    Where the user's filters make errors of warnings, it is written to ``sys.stderr`` instead: stock Chainer
    would compute on.

    Args:
        message: Its text.
        stacklevel: As that of :func:`warnings.warn`: 1 is the caller.
    """
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)
    except Exception:  # by a filter, or of a showwarning() of the user's
        with contextlib.suppress(Exception):
            sys.stderr.write(f"RuntimeWarning: {message}\n")
