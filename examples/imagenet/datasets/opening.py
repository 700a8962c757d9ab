"""From a name or a path to the training and validation images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy
from errors import InputError

from datasets.arrays import ArrayImages
from datasets.cifar import load_cifar
from datasets.classes import Names, match_labels
from datasets.digits import N_VALIDATION, load_digits
from datasets.folders import read_folders
from datasets.hdf5 import Hdf5Images
from datasets.labeled import LabeledImages, read_list
from datasets.lmdb_images import LmdbImages, data_file
from datasets.mnist import load_mnist
from datasets.originals import Warn

DATASETS = ("files", "imagenet", "cifar10", "cifar100", "mnist", "digits")
"""``files``: the paths given. The others are looked for in the data root; the digits are bundled."""

LMDB_NAMES = (
    ("train.lmdb", "val.lmdb"),
    ("train_faster_imagefolder.lmdb", "val_faster_imagefolder.lmdb"),
    ("ilsvrc12_train_lmdb", "ilsvrc12_val_lmdb"),
)
"""Databases of an ImageNet data root: ours, SRSGD's, Caffe's."""

Opened = tuple[Any, Any, int]
"""Training images, validation images, number of classes. Both are sources with ``names``, those of the
classes by number, or None where the data say only numbers."""


def open_dataset(
    dataset: str = "files",
    *,
    train: str | Path | None = None,
    val: str | Path | None = None,
    root: str | Path = ".",
    data_root: str | Path = "data",
    n_classes: int | None = None,
    classes: Names = None,
    warn: Warn | None = None,
) -> Opened:
    """Opens a data set.

    Args:
        dataset: One of ``DATASETS``.
        train: For ``files``: a list file, a folder of class folders, an LMDB database or an HDF5
            file; what it is shows in its contents.
        val: The same for validation; None where ``train`` is an HDF5 file that has both.
        root: Folder of the paths in list files.
        data_root: Folder of the original files of the others.
        n_classes: Number of classes; None: as many as the data have.
        classes: Names of the classes by the number that a network gives them, where it was trained with
            names; None: the training set decides. The validation set goes by them, too.
        warn: Is told of files of CIFAR and MNIST that are not the published ones; None: they are
            not compared.

    Raises:
        InputError: It is missing, damaged, or not what it should be, or the validation set has a class
            that the training set has not.
    """
    folder = Path(data_root)
    if dataset == "files":
        if train is None:
            raise InputError("dataset files: give the training and validation images")
        both_paths = Path(train), None if val is None else Path(val)
        return _open_files(*both_paths, Path(root), n_classes, classes)
    if dataset == "imagenet":
        return _open_imagenet(folder, n_classes, classes)
    if dataset in ("cifar10", "cifar100"):
        both = load_cifar(dataset, folder, warn)
    elif dataset == "mnist":
        both = load_mnist(folder, warn)
    elif dataset == "digits":
        both = _digits()
    else:
        raise InputError(f"dataset {dataset!r}: allowed are {', '.join(DATASETS)}")
    n = len(both[0].classes)
    if n_classes is not None and n_classes < n:
        raise InputError(f"dataset {dataset}: has {n} classes, not {n_classes}")
    return *both, n_classes or n


def _digits() -> tuple[ArrayImages, ArrayImages]:
    images, labels = load_digits()
    order = numpy.random.default_rng(0).permutation(len(images))
    classes = [str(digit) for digit in range(10)]
    val, train = order[:N_VALIDATION], order[N_VALIDATION:]
    return (
        ArrayImages(images[train], labels[train], "the training digits", classes),
        ArrayImages(images[val], labels[val], "the validation digits", classes),
    )


def _open_imagenet(folder: Path, n_classes: int | None, classes: Names) -> Opened:
    lists = folder / "train.txt", folder / "val.txt"
    folders = folder / "train", folder / "val"
    if all(path.is_file() for path in lists):
        return _open_files(*lists, folder, n_classes, classes)
    for names in LMDB_NAMES:
        if all((folder / name).exists() for name in names):
            return _open_files(folder / names[0], folder / names[1], folder, n_classes, classes)
    if all(path.is_dir() for path in folders):
        return _open_files(*folders, folder, n_classes, classes)
    databases = ", or ".join(" and ".join(names) for names in LMDB_NAMES)
    raise InputError(
        f"--data-root {folder}: ImageNet is not there; nothing is downloaded, so put there train.txt "
        f"and val.txt (from make_list.py), or databases {databases}, or folders train and val with "
        f"a folder for each class"
    )


def _open_files(
    train: Path, val: Path | None, root: Path, n_classes: int | None, classes: Names
) -> Opened:
    if val is None:
        if not _is_hdf5(train):
            raise InputError(f"{train}: give the validation images as well")
        val = train
    both: list[Any] = []
    for path, part in ((train, "train"), (val, "test")):
        if not path.exists():
            kind = "list file" if path.suffix == ".txt" else "data"
            raise InputError(f"{kind} {path}: No such file or directory; correct the path")
        source = _open_part(path, part, root, n_classes, classes)
        if both or classes is not None:
            n_training = _n_classes(both[0]) if both else 0
            source.labels = match_labels(
                source.labels, source.names, classes, n_training, str(path)
            )
        else:
            classes = source.names
        source.names = classes
        both.append(source)
    n = max(_n_classes(source) for source in both)
    if n_classes is not None and n > n_classes:
        raise InputError(f"{train}: has {n} classes; allowed are {n_classes}")
    return both[0], both[1], n_classes or n


def _open_part(path: Path, part: str, root: Path, n_classes: int | None, classes: Names) -> Any:
    if _is_lmdb(path):
        lmdb = LmdbImages(path)
        if lmdb.names is None:  # else their numbers may become others
            lmdb.check_labels(n_classes)
        return lmdb
    if path.is_dir():
        pairs, names = read_folders(path, classes)
        return LabeledImages(pairs, path, names)
    if _is_hdf5(path):
        return Hdf5Images(path, part, n_classes)
    return LabeledImages(read_list(path, n_classes), root)


def _n_classes(source: Any) -> int:
    return int(source.labels.max()) + 1


def _is_hdf5(path: Path) -> bool:
    return path.suffix in (".h5", ".hdf5") or _begins(path, b"\x89HDF\r\n\x1a\n")


def _is_lmdb(path: Path) -> bool:
    if path.is_dir():
        return data_file(path).is_file()
    # its first page has a header of 16 bytes, and then the magic number in the machine's order
    magic = (0xBEEFC0DE).to_bytes(4, sys.byteorder)
    return path.suffix in (".lmdb", ".mdb") or _begins(path, magic, 16)


def _begins(path: Path, magic: bytes, offset: int = 0) -> bool:
    try:
        with open(path, "rb") as f:
            f.seek(offset)
            return f.read(len(magic)) == magic
    except OSError:
        return False
