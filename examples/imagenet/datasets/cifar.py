"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from their original files, in any of their forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy

from datasets.arrays import ArrayImages
from datasets.originals import (
    Expected,
    Warn,
    broken,
    compare_checksums,
    find,
    missing,
    read,
    read_archive,
    read_npz,
    unpickle,
)

Part = tuple[numpy.ndarray, numpy.ndarray]
"""Images, uint8 (n, 32, 32, 3), and labels, (n,)."""


class Form(NamedTuple):
    """One of the forms that a set is published in.

    Attributes:
        archive: The archive, which need not be unpacked.
        train: Files of the training set.
        test: Files of the test set.
        names: File of the names of the classes.
        names_key: Where they are in a pickle; empty for a text file.
        labels: The labels' key in a pickle, or the position of the label byte, as text.
        label_bytes: Label bytes of a record of the binary form; 0 for pickles.
    """

    archive: Expected
    train: tuple[Expected, ...]
    test: tuple[Expected, ...]
    names: Expected
    names_key: str
    labels: str
    label_bytes: int


def _batches(folder: str, suffix: str, md5s: tuple[str, ...]) -> tuple[Expected, ...]:
    return tuple(
        Expected(f"{folder}/data_batch_{i}{suffix}", md5) for i, md5 in enumerate(md5s, start=1)
    )


FORMS = {
    "cifar10": (
        Form(
            Expected("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
            _batches(
                "cifar-10-batches-py",
                "",
                (
                    "c99cafc152244af753f735de768cd75f",
                    "d4bba439e000b95fd0a9bffe97cbabec",
                    "54ebc095f3ab1f0389bbae665268c751",
                    "634d18415352ddfa80567beed471001a",
                    "482c414d41f54cd18b22e5b47cb7c3cb",
                ),
            ),
            (Expected("cifar-10-batches-py/test_batch", "40351d587109b95175f43aff81a1287e"),),
            Expected("cifar-10-batches-py/batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
            "label_names",
            "labels",
            0,
        ),
        Form(
            Expected("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
            _batches("cifar-10-batches-bin", ".bin", ("",) * 5),
            (Expected("cifar-10-batches-bin/test_batch.bin", ""),),
            Expected("cifar-10-batches-bin/batches.meta.txt", ""),
            "",
            "0",
            1,
        ),
    ),
    "cifar100": (
        Form(
            Expected("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
            (Expected("cifar-100-python/train", "16019d7e3df5f24257cddd939b257f8d"),),
            (Expected("cifar-100-python/test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),),
            Expected("cifar-100-python/meta", "7973b15100ade9c7d40fb424638fde48"),
            "fine_label_names",
            "fine_labels",
            0,
        ),
        Form(
            Expected("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
            (Expected("cifar-100-binary/train.bin", "6172c7755cfe09b2fe270c85cebc1b15"),),
            (Expected("cifar-100-binary/test.bin", "4499cfba6c016c1be1438163640a0898"),),
            Expected("cifar-100-binary/fine_label_names.txt", ""),
            "",
            "1",
            2,
        ),
    ),
}
N_CLASSES = {"cifar10": 10, "cifar100": 100}


def load_cifar(name: str, root: Path, warn: Warn | None = None) -> tuple[ArrayImages, ArrayImages]:
    """Returns the training and test set, usually 50,000 and 10,000 images of 32 x 32 pixels.

    Args:
        name: ``cifar10`` or ``cifar100``.
        root: Folder that has the unpacked folder, the archive, or ``cifar10.npz`` (arrays x_train,
            y_train, x_test, y_test; images uint8, channels first or last).
        warn: Is told of files that are not the published ones; None: they are not compared.

    Raises:
        InputError: A file is missing or damaged.
    """
    for form in FORMS[name]:
        files = (*form.train, *form.test, form.names)
        found = {f: path for f in files if (path := find(root, f.name)) is not None}
        if len(found) == len(files):
            contents = {f.name: (read(path), str(path)) for f, path in found.items()}
            sets = _from_files(name, form, contents)
            compare_checksums([(path, f) for f, path in found.items()], warn)
            return sets
        archive = root / form.archive.name
        if archive.is_file():
            members = read_archive(archive, [f.name for f in files])
            sets = _from_files(
                name, form, {n: (data, f"{n} in {archive}") for n, data in members.items()}
            )
            compare_checksums([(archive, form.archive)], warn)
            return sets
    npz = root / f"{name}.npz"
    if npz.is_file():
        arrays = read_npz(npz, channels_first=True)
        classes = [str(i) for i in range(N_CLASSES[name])]
        return (
            ArrayImages(arrays["x_train"], arrays["y_train"], f"{npz}'s training set", classes),
            ArrayImages(arrays["x_test"], arrays["y_test"], f"{npz}'s test set", classes),
        )
    forms = [
        (
            f"{kind} (https://www.cs.toronto.edu/~kriz/cifar.html)",
            [form.archive, *form.train, *form.test, form.names],
        )
        for kind, form in zip(("Python", "binary"), FORMS[name], strict=True)
    ]
    what = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[name]
    raise missing(what, root, [*forms, ("NumPy", [Expected(f"{name}.npz", "")])])


def _from_files(
    name: str, form: Form, contents: dict[str, tuple[bytes, str]]
) -> tuple[ArrayImages, ArrayImages]:
    reader: Callable[[Form, bytes, str], Part] = _binary if form.label_bytes else _pickled
    classes = _class_names(form, *contents[form.names.name])
    if len(classes) != N_CLASSES[name]:
        raise broken(contents[form.names.name][1], f"it names {len(classes)} classes")
    sets = []
    for part, files in (("training", form.train), ("test", form.test)):
        parts = [reader(form, *contents[f.name]) for f in files]
        images, labels = (numpy.concatenate(arrays) for arrays in zip(*parts, strict=True))
        sets.append(ArrayImages(images, labels, f"{name}'s {part} set", classes))
    return sets[0], sets[1]


def _images(rows: numpy.ndarray) -> numpy.ndarray:
    """Returns images, channels last, of rows of 3,072 bytes: red, green, blue planes."""
    return numpy.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _pickled(form: Form, data: bytes, path: str) -> Part:
    batch = unpickle(data, path)
    rows, labels = batch.get("data"), batch.get(form.labels)
    ok = isinstance(rows, numpy.ndarray) and rows.dtype == numpy.uint8 and rows.ndim == 2
    if not ok or rows.shape[1] != 3072:
        raise broken(path, "`data` is not an array of rows of 3072 bytes")
    try:
        values = numpy.array(labels, dtype=numpy.int64)
    except (TypeError, ValueError) as e:
        raise broken(path, f"`{form.labels}` is not a list of integers") from e
    if values.shape != rows.shape[:1]:
        raise broken(path, f"`{form.labels}` has not one label for each image")
    return _images(rows), values


def _binary(form: Form, data: bytes, path: str) -> Part:
    record = form.label_bytes + 3072
    if not data or len(data) % record:
        raise broken(path, f"{len(data)} bytes are not records of {record}")
    rows = numpy.frombuffer(data, numpy.uint8).reshape(-1, record)
    return _images(rows[:, form.label_bytes :]), rows[:, int(form.labels)].astype(numpy.int64)


def _class_names(form: Form, data: bytes, path: str) -> list[str]:
    if not form.names_key:
        return data.decode("utf-8", "replace").split()
    names = unpickle(data, path).get(form.names_key)
    if not isinstance(names, list):
        raise broken(path, f"it has no list `{form.names_key}`")
    return [str(n) for n in names]
