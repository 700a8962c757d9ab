"""What the tools share: command lines, progress, folders and tables."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import launcher
from errors import InputError, printable
from tqdm import tqdm


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, and keeps the layout of the descriptions."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_workers(self) -> None:
        """Adds --workers/-j."""
        # fmt: off
        self.add_argument("--workers", "-j", type=integer(1), default=launcher.usable_cores(),
                          metavar="N", help="threads (default: all cores, %(default)s)")
        # fmt: on


def integer(minimum: int) -> Callable[[str], int]:
    """Returns a type for integers of at least ``minimum``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {minimum}")
        return value

    return parse


def fraction(text: str) -> float:
    """Type for numbers from 0 to less than 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to less than 1")
    return value


def run(tool: Callable[[], int]) -> int:
    """Runs a tool; returns its status, 2 for an input that cannot be used, 130 for Ctrl-C."""
    name = Path(sys.argv[0]).name
    try:
        return tool()
    except InputError as e:
        sys.stdout.flush()
        print(f"{name}: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command continues", file=sys.stderr)
        return 130


def progress(items: Any = None, **options: Any) -> Any:
    """Wraps an iterable in tqdm; shows nothing where standard error is not a terminal."""
    return tqdm(items, disable=None, **options)


def require_folder(path: Path, option: str) -> Path:
    """Returns ``path``; raises InputError unless it is a folder."""
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "no such folder"
        raise InputError(f"{option} {path}: {what}; give the folder of the images")
    return path


def make_folder(path: Path, option: str) -> Path:
    """Makes a folder for results; raises InputError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(
            f"{option} {path}: cannot make this folder ({e.strerror}); choose another"
        ) from e
    return path


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """Gives a folder inside ``output`` for files that are being written.

    Those that killed runs on this machine left are removed.
    """
    host = socket.gethostname()
    for old in output.glob(f".partial.{host}.*"):
        pid = old.name.removeprefix(f".partial.{host}.").partition(".")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(old, ignore_errors=True)
    folder = output / f".partial.{host}.{os.getpid()}.{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def print_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Prints a table with aligned columns."""
    texts = [tuple(printable(str(cell)) for cell in row) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(header))]
    for row in texts:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
