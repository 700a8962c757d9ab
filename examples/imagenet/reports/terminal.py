"""Where rank 0's output goes: a terminal and its width, or a file."""

from __future__ import annotations

import contextlib
import functools
import os
import sys

import psutil

WIDTH = 79
"""Columns to use where the output is not a terminal."""

_LAUNCHERS = ("mpiexec", "mpiexec.hydra", "mpirun", "orterun", "prterun", "srun")


def columns() -> int | None:
    """Returns the width of the terminal that shows standard output, None if there is none.

    Under mpiexec standard output is a pipe to the launcher: then it is the launcher's output that
    counts.
    """
    with contextlib.suppress(OSError, ValueError):
        # Some pseudo terminals say 0.
        return os.get_terminal_size(sys.stdout.fileno()).columns or WIDTH
    path = _output_of_launcher()
    if path is None:
        return None
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOCTTY)
        try:
            return os.get_terminal_size(fd).columns or WIDTH
        finally:
            os.close(fd)
    return None


@functools.cache
def _output_of_launcher() -> str | None:
    """Returns the file that the launcher of this process writes to, None without a launcher."""
    with contextlib.suppress(psutil.Error, OSError):
        for process in psutil.Process().parents():
            if process.name() in _LAUNCHERS:
                return os.readlink(f"/proc/{process.pid}/fd/1")
    return None
