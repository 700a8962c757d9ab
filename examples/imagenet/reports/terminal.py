"""Where rank 0's output goes: a terminal and its width, or a file."""

from __future__ import annotations

import contextlib
import os
import sys

WIDTH = 79
"""Columns to use where the output is not a terminal."""


def columns() -> int | None:
    """Returns the width of the terminal that shows standard output, None if there is none.

    Under mpiexec standard output is a pipe whose other end may be a terminal: then it is the
    terminal that controls this process. Batch jobs and services have none.
    """
    for width in (_width_of_stdout(), _width_of_controlling_terminal()):
        if width is not None:
            return width
    return None


def _width_of_stdout() -> int | None:
    try:
        # Some pseudo terminals say 0.
        return os.get_terminal_size(sys.stdout.fileno()).columns or WIDTH
    except (OSError, ValueError):
        return None


def _width_of_controlling_terminal() -> int | None:
    launched = any(name in os.environ for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK"))
    if not launched or os.environ.get("TERM", "dumb") == "dumb":
        return None
    with contextlib.suppress(OSError):
        fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        try:
            return os.get_terminal_size(fd).columns or WIDTH
        finally:
            os.close(fd)
    return None
