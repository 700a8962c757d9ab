"""Files that appear under their name only when they are whole."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import InputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path whose file takes the name ``path`` when the block ends well.

    The folder is made if it is missing.

    Raises:
        InputError: The file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror or e}); free space or choose another "
                         f"place, and run the same command again") from e  # fmt: skip
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, which appears only when it is whole."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def is_newer(path: Path, since: int) -> bool:
    """Whether a file is there and was written after ``since`` (nanoseconds since 1970)."""
    try:
        return path.stat().st_mtime_ns >= since
    except FileNotFoundError:
        return False
