"""The files of snapshots: written to the disk itself, checked, and renamed as a whole."""

from __future__ import annotations

import os
import secrets
import shutil
import zlib
from pathlib import Path
from typing import Any

import chainer
from errors import InputError

from chainer_ooc import serializers

MANIFEST = "manifest.json"

_BLOCK = 1 << 18
"""Bytes that are read at a time: little beside any memory limit."""

DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What the readers of a state raise when the values in a file are not as they should be."""


def write_npz(path: Path, target: Any) -> list[int]:
    """Writes a file to the disk itself; returns its size in bytes and its checksum."""
    with open(path, "xb") as f:
        # Uncompressed: parameters hardly compress, and the time is the training's.
        chainer.serializers.save_npz(f, target, compression=False)
        f.flush()
        os.fsync(f.fileno())
    return fingerprint(path)


def fingerprint(path: Path) -> list[int]:
    """Returns size in bytes and CRC-32 of a file."""
    checksum = size = 0
    with open(path, "rb") as f:
        while block := f.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
            size += len(block)
    return [size, checksum]


def sync_folder(folder: Path) -> None:
    """Lets renames in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Removes a snapshot; it has no name of a snapshot while it is incomplete."""
    hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.removed")
    try:
        folder.rename(hidden)
    except FileNotFoundError:
        return
    if hidden.is_symlink():
        hidden.unlink()
    else:
        shutil.rmtree(hidden, ignore_errors=True)


def find_snapshots(out: Path) -> list[Path]:
    """Returns the snapshots in a folder of results, the latest first."""
    found = []
    for folder in out.glob("snapshot_iter_*"):
        number = folder.name.removeprefix("snapshot_iter_")
        if number.isdecimal() and (folder / MANIFEST).is_file():
            found.append((int(number), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def load_npz(path: Path, target: Any, option: str, inside: str = "") -> None:
    """Loads ``target`` from ``path``.

    Args:
        path: The file.
        target: An object with Chainer's ``serialize``.
        option: The option that named the file, for the error.
        inside: Where in the file the target is; nothing: it is all of it.

    Raises:
        InputError: The file is missing, damaged, of another model, or holds objects that would run
            code if they were loaded.
    """
    try:
        serializers.load_npz(path, target, inside)
    except (FileNotFoundError, IsADirectoryError) as e:
        raise InputError(f"{option} {path}: no such file; give one such as model_iter_N") from e
    except KeyError as e:
        missing = str(e.args[0]).removesuffix(" is not a file in the archive")
        raise InputError(
            f"{option} {path}: is of another model: it has no {missing}; use the network that it "
            f"was made with"
        ) from e
    except DAMAGE as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{option} {path}: damaged, or not a file of this model ({reason})") from e
