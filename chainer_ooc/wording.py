"""Words for messages and reports. No function here raises, and no warning becomes an error."""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import Any

__all__ = ["label_of", "mib", "repr_of", "shape_of", "warn"]


def label_of(func: Any) -> str:
    """Return the label of a function of the graph, or the name of its class if the label raises."""
    # _impl_name is the class's name, even for old-style functions.
    for name in ("label", "_impl_name"):
        with contextlib.suppress(Exception):  # both may be the user's properties
            return str(getattr(func, name))
    return type(func).__name__


def shape_of(x: Any) -> str:
    """Return the shape of an input as text, or its type if it has no shape."""
    try:
        return "None" if x is None else str(x.shape)
    except Exception:
        return f"a {type(x).__name__}"


def mib(nbytes: int) -> str:
    """Return a number of bytes in whole mebibytes."""
    return f"{nbytes / (1 << 20):,.0f} MiB"


def repr_of(value: Any) -> str:
    """Return ``repr(value)``, or the name of its class if that raises."""
    try:
        return repr(value)
    except Exception:
        return f"<{type(value).__name__}>"


def warn(message: str, stacklevel: int = 1) -> None:
    """Issue a :class:`RuntimeWarning` in the middle of a computation.

    If the user's filters make errors of warnings, the message goes to ``sys.stderr`` instead: stock Chainer
    would continue.

    Args:
        message: The text.
        stacklevel: As that of :func:`warnings.warn`: 1 is the caller.
    """
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)
    except Exception:  # from a filter, or from the user's showwarning()
        with contextlib.suppress(Exception):
            sys.stderr.write(f"RuntimeWarning: {message}\n")
