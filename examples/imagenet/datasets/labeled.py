"""List files of labelled images, and the images of a list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy
from errors import InputError

from datasets import decoding
from datasets.decoding import Need, Size, read_image
from datasets.resizing import resize

Pair = tuple[str, int]
"""Path relative to the root, and label from 0."""


class Source(Protocol):
    """Labelled images of any origin, as the classes of this package offer them."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Returns what errors call the ``i``-th image."""

    def label(self, i: int) -> int:
        """Returns the class of the ``i``-th image, from 0."""

    def version(self, i: int) -> tuple[int, ...]:
        """Returns numbers that change when the ``i``-th image does, without reading it all."""

    def image_size(self, i: int) -> Size:
        """Returns the width and height of the ``i``-th image, without decoding it if possible."""

    def image(self, i: int, need: Need | None = None) -> numpy.ndarray:
        """Returns the ``i``-th image: uint8 RGB, (height, width, 3); see ``decoding.decode``."""


def parse_line(line: str) -> Pair:
    """Returns path and label of a line of a list file.

    Raises:
        ValueError: It is not a path, white space and an integer.
    """
    # from the right, so that a path may contain spaces
    name, label = line.strip().rsplit(None, 1)
    return name, int(label)


def read_lines(path: str | Path) -> list[str]:
    """Returns the lines of a list file.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not a UTF-8 text file"
        raise InputError(
            f"list file {path}: {reason}; give a text file with a path and a label on each line"
        ) from e


def allowed_labels(n_classes: int | None) -> str:
    """Returns the allowed labels in words."""
    return f"0 to {n_classes - 1}" if n_classes is not None else "0 or more"


def read_list(path: str | Path, n_classes: int | None = None) -> list[Pair]:
    """Reads a list file: one image per line, its path, a space, its label (Caffe's format).

    The path may contain spaces; empty lines are skipped.

    Args:
        path: The list file.
        n_classes: Number of classes; labels must be below it. None accepts any from 0.

    Raises:
        InputError: The file is missing, empty, or a line or label is not valid.
    """
    pairs: list[Pair] = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            name, label = parse_line(line)
        except ValueError:
            raise InputError(
                f"{path} line {number}: {line.strip()[:80]!r} is not a path and an integer label"
            ) from None
        if label < 0 or (n_classes is not None and label >= n_classes):
            raise InputError(
                f"{path} line {number}: label {label} of {name} is out of range; "
                f"allowed are {allowed_labels(n_classes)}"
            )
        pairs.append((name, label))
    if not pairs:
        raise InputError(
            f"list file {path}: no images in it; give a file with a path and a label on each line"
        )
    return pairs


def file_version(path: str | Path) -> tuple[int, int]:
    """Returns bytes and time of change (nanoseconds) of a file; zeros if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return status.st_size, status.st_mtime_ns


class LabeledImages:
    """Images of a list, decoded on demand.

    The list is kept as a few arrays: loader processes receive a copy each, and that of a million
    strings would take seconds and hundreds of megabytes.

    Args:
        pairs: Paths relative to ``root``, and labels.
        root: Folder of the paths.
        names: Names of the classes by number; None: there are only numbers.
    """

    def __init__(
        self, pairs: Sequence[Pair], root: str | Path = ".", names: list[str] | None = None
    ) -> None:
        self.root = Path(root)
        self.names = names
        names = [os.fsencode(pairs[i][0]) for i in range(len(pairs))]
        self._names = b"".join(names)
        self._ends = numpy.cumsum([0, *map(len, names)], dtype=numpy.int64)
        self.labels = numpy.array([pairs[i][1] for i in range(len(pairs))], dtype=numpy.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> Path:
        """Returns the path of the ``i``-th image."""
        return self.root / os.fsdecode(self._names[self._ends[i] : self._ends[i + 1]])

    def name(self, i: int) -> str:
        """Returns what errors call the ``i``-th image: its path."""
        return str(self.path(i))

    def label(self, i: int) -> int:
        """Returns the class of the ``i``-th image."""
        return int(self.labels[i])

    def version(self, i: int) -> tuple[int, ...]:
        """Returns bytes and time of change of the ``i``-th file; of a missing one zeros."""
        return file_version(self.path(i))

    def image_size(self, i: int) -> Size:
        """Returns the width and height of the ``i``-th image, from its header."""
        return decoding.image_size(self.path(i))

    def image(self, i: int, need: Need | None = None) -> numpy.ndarray:
        """Returns the ``i``-th image, uint8 (height, width, 3); see ``decoding.decode``."""
        return read_image(self.path(i), need)

    def __getitem__(self, i: int) -> tuple[numpy.ndarray, int]:
        """Returns the ``i``-th image, uint8 (height, width, 3), and its label."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.image(i), self.label(i)


class Enlarged:
    """Images of a source, all resized to one size when they are read.

    Args:
        source: The images.
        size: Their new width and height; the aspect ratio is not kept.
    """

    def __init__(self, source: Source, size: Size) -> None:
        self.source = source
        self.size = size

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        """Returns what errors call the ``i``-th image."""
        return self.source.name(i)

    def label(self, i: int) -> int:
        """Returns the class of the ``i``-th image."""
        return self.source.label(i)

    def version(self, i: int) -> tuple[int, ...]:
        """Returns numbers that change when the ``i``-th image does."""
        return (*self.source.version(i), *self.size)

    def image_size(self, i: int) -> Size:
        """Returns the size given."""
        return self.size

    def image(self, i: int, need: Need | None = None) -> numpy.ndarray:
        """Returns the ``i``-th image, uint8, of this size."""
        return resize(self.source.image(i), self.size)


class Subset:
    """Some images of a source, in a given order, such as those of one rank.

    Args:
        source: The images.
        indices: Which of them.
    """

    def __init__(self, source: Source, indices: numpy.ndarray) -> None:
        self.source = source
        self.indices = numpy.asarray(indices, dtype=numpy.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        """Returns what errors call the ``i``-th image."""
        return self.source.name(int(self.indices[i]))

    def label(self, i: int) -> int:
        """Returns the class of the ``i``-th image."""
        return self.source.label(int(self.indices[i]))

    def version(self, i: int) -> tuple[int, ...]:
        """Returns numbers that change when the ``i``-th image does."""
        return self.source.version(int(self.indices[i]))

    def image_size(self, i: int) -> Size:
        """Returns the width and height of the ``i``-th image."""
        return self.source.image_size(int(self.indices[i]))

    def image(self, i: int, need: Need | None = None) -> numpy.ndarray:
        """Returns the ``i``-th image; see ``decoding.decode``."""
        return self.source.image(int(self.indices[i]), need)


def shard_indices(n: int, rank: int, size: int, order_seed: int | None) -> numpy.ndarray:
    """Returns which of ``n`` images a rank has.

    Args:
        n: Number of images.
        rank: The rank, from 0.
        size: Number of ranks.
        order_seed: Shuffles the images before they are shared out, and gives every rank the same
            number, so that their epochs end together: some images are then on two ranks. None: in
            order, every image on one rank.
    """
    if order_seed is None:
        return numpy.arange(n * rank // size, n * (rank + 1) // size)
    order = numpy.random.default_rng(order_seed).permutation(n)
    start, length = n * rank // size, -(-n // size)
    return order[numpy.arange(start, start + length) % max(n, 1)]
