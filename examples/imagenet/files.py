"""Files that appear under their name only when they are whole, and arrays in files of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy
from errors import InputError

from chainer_ooc.report.whole import replacing


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Like ``replacing``; makes the folder if it is missing.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            yield partial
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror or e}); free space or choose another "
                         f"place, and run the same command again") from e  # fmt: skip


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


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, numpy.ndarray]:
    """Returns arrays of an .npz file; pickled ones are refused, since they could run any code.

    Raises:
        InputError: The file is missing or damaged, or an array is.
    """
    try:
        with numpy.load(path, allow_pickle=False) as f:
            absent = [name for name in names if name not in f]
            if absent:
                raise ValueError(f"it has no array {absent[0]}")
            return {name: f[name] for name in names}
    except Exception as e:  # of zipfile, zlib, NumPy, Python's parser
        reason = " ".join(str(e).split()) or type(e).__name__
        raise InputError(
            f"{path}: damaged or not what its name says ({reason}); get it again"
        ) from e
