"""Images in folders, one folder for each class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from errors import InputError

from datasets.labeled import Pair

SUFFIXES = frozenset(
    [
        ".bmp",
        ".gif",
        ".jfif",
        ".jp2",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
"""Suffixes, in lower case, of the files that count as images."""


def find_images(folder: Path) -> Iterator[Path]:
    """Yields the paths of the images below a folder, relative to it, in a fixed order."""
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(root, name).relative_to(folder)


def class_folders(folder: Path) -> list[str]:
    """Returns the names of the folders in a folder, in order: its classes.

    Raises:
        InputError: There is no such folder, or it has no folders.
    """
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    except OSError as e:
        raise InputError(f"{folder}: {e.strerror}; give the folder of the images") from e
    if not names:
        raise InputError(f"{folder}: has no folders; give a folder with one folder for each class")
    return names


def class_images(folder: Path, name: str) -> list[str]:
    """Returns the paths of the images of a class, relative to ``folder``.

    Raises:
        InputError: There are none.
    """
    images = [str(Path(name) / path) for path in find_images(folder / name)]
    if not images:
        raise InputError(
            f"{folder / name}: no images ({', '.join(sorted(SUFFIXES))}) in this class; remove the "
            f"folder or fill it"
        )
    return images


def read_folders(folder: Path, classes: list[str] | None = None) -> tuple[list[Pair], list[str]]:
    """Returns paths relative to ``folder`` and labels of its images, and the classes' names.

    Args:
        folder: Has a folder for each class.
        classes: The names of label 0 and so on, from the training set; None: those in ``folder``.

    Raises:
        InputError: A class is empty or, with ``classes``, not one of them.
    """
    found = class_folders(folder)
    if classes is None:
        classes = found
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise InputError(f"{folder / unknown[0]}: is not a class of the training set; remove it")
    labels = {name: label for label, name in enumerate(classes)}
    pairs = [(path, labels[name]) for name in found for path in class_images(folder, name)]
    return pairs, classes
