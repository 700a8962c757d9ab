"""List files of labelled images, and decoding with errors that name the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
from errors import InputError
from PIL import Image

Pair = tuple[str, int]
"""Path relative to the root, and label from 0."""


def read_list(path: str | Path, n_classes: int | None = None) -> list[Pair]:
    """Reads a list file: one image per line, its path, a space, its label (Caffe's format).

    The path may contain spaces; empty lines are skipped.

    Args:
        path: The list file.
        n_classes: Number of classes; labels must be below it. None accepts any from 0.

    Raises:
        InputError: The file is missing, empty, or a line or label is not valid.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not a UTF-8 text file"
        raise InputError(
            f"list file {path}: {reason}; give a text file with a path and a label on each line"
        ) from e
    pairs: list[Pair] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        # from the right, so that a path may contain spaces
        name, *rest = line.strip().rsplit(None, 1)
        try:
            label = int(rest[0])
        except (IndexError, ValueError):
            raise InputError(
                f"{path} line {number}: {line.strip()[:80]!r} is not a path and an integer label"
            ) from None
        if label < 0 or (n_classes is not None and label >= n_classes):
            allowed = f"0 to {n_classes - 1}" if n_classes is not None else "0 or more"
            raise InputError(
                f"{path} line {number}: label {label} of {name} is out of range; "
                f"allowed are {allowed}"
            )
        pairs.append((name, label))
    if not pairs:
        raise InputError(f"list file {path}: no images in it")
    return pairs


def read_image(path: str | Path) -> numpy.ndarray:
    """Decodes an image to uint8 RGB of shape (height, width, 3).

    Raises:
        InputError: The file is missing, not an image, truncated or otherwise damaged.
    """
    try:
        with Image.open(path) as image:
            return numpy.asarray(image.convert("RGB"))
    except FileNotFoundError as e:
        raise InputError(f"image {path}: no such file; correct the list file or --root/-R") from e
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        # Pillow reports damaged data by OSError, and some broken headers by the other two.
        # Where it names the file, it only says that this is not an image.
        reason = " ".join(str(e).split())
        why = f" ({reason})" if reason and str(path) not in reason else ""
        raise InputError(
            f"image {path}: cannot be decoded{why}; replace it or remove it from the list"
        ) from e


class LabeledImages:
    """Images of a list, decoded on demand.

    Args:
        pairs: Paths relative to ``root``, and labels.
        root: Folder of the paths.
    """

    def __init__(self, pairs: Sequence[Pair], root: str | Path = ".") -> None:
        self.pairs = pairs
        self.root = Path(root)

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, i: int) -> Path:
        """Returns the path of the ``i``-th image."""
        return self.root / self.pairs[i][0]

    def __getitem__(self, i: int) -> tuple[numpy.ndarray, int]:
        """Returns the ``i``-th image, uint8 (height, width, 3), and its label."""
        return read_image(self.path(i)), self.pairs[i][1]
