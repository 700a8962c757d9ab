"""Words for messages and reports. No function here raises, but for :func:`warn_user`."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from types import FrameType
from typing import Any

__all__ = ["label_of", "logger", "mib", "repr_of", "shape_of", "warn", "warn_user"]

#: Where warnings go that no line of the user's is to blame for.
logger = logging.getLogger("chainer_ooc")

#: The warnings that were logged. Each is said once.
_said: set[str] = set()

#: Packages whose lines no user wrote.
_INTERNAL = frozenset({"chainer", "chainer_ooc", "chainermn", "contextlib", "importlib"})


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


def warn(message: str) -> None:
    """Log a warning in the middle of a computation, the first time that it is said: to the logger ``chainer_ooc``.

    Where the program has configured no logging, it goes to ``sys.stderr``. Nothing is raised, whatever handlers do:
    stock Chainer would continue.
    """
    if message in _said:
        return
    _said.add(message)
    with contextlib.suppress(Exception):
        if logger.hasHandlers():
            logger.warning("%s", message, stacklevel=_stacklevel())
        elif logger.isEnabledFor(logging.WARNING):
            sys.stderr.write(f"chainer_ooc: {message}\n")


def warn_user(message: str) -> None:
    """Issue a :class:`RuntimeWarning` at the line outside of this package, Chainer and the import system.

    It is for what that line can mend: unlike :func:`warn` it may become an error.
    """
    frame = user_frame()
    warnings.warn_explicit(
        message,
        RuntimeWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__", "<unknown>"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )


def user_frame() -> FrameType:
    """Return the innermost frame outside of this package, Chainer and the import system, or the outermost one."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_internal(frame):
        frame = frame.f_back
    return frame


def _stacklevel() -> int:
    """Return the ``stacklevel`` with which the caller's logging call points at :func:`user_frame`."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _is_internal(frame):
        frame, level = frame.f_back, level + 1
    return level


def _is_internal(frame: FrameType) -> bool:
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package in _INTERNAL
