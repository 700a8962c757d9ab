"""From a name or a path to the training and validation images."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy
from errors import InputError

from datasets.arrays import ArrayImages
from datasets.cifar import load_cifar
from datasets.digits import N_VALIDATION, load_digits
from datasets.folders import read_folders
from datasets.hdf5 import Hdf5Images
from datasets.labeled import LabeledImages, Source, read_list
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

Opened = tuple[Source, Source, int]
"""Training images, validation images, number of classes."""


def open_dataset(
    dataset: str = "files",
    *,
    train: str | Path | None = None,
    val: str | Path | None = None,
    root: str | Path = ".",
    data_root: str | Path = "data",
    n_classes: int | None = None,
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
        warn: Is told of files of CIFAR and MNIST that are not the published ones; None: they are
            not compared.

    Raises:
        InputError: It is missing, damaged, or not what it should be.
    """
    folder = Path(data_root)
    if dataset == "files":
        if train is None:
            raise InputError("dataset files: give the training and validation images")
        return _open_files(Path(train), None if val is None else Path(val), Path(root), n_classes)
    if dataset == "imagenet":
        return _open_imagenet(folder, n_classes)
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


def _open_imagenet(folder: Path, n_classes: int | None) -> Opened:
    lists = folder / "train.txt", folder / "val.txt"
    folders = folder / "train", folder / "val"
    if all(path.is_file() for path in lists):
        return _open_files(*lists, folder, n_classes)
    for names in LMDB_NAMES:
        if all((folder / name).exists() for name in names):
            return _open_files(folder / names[0], folder / names[1], folder, n_classes)
    if all(path.is_dir() for path in folders):
        return _open_files(*folders, folder, n_classes)
    databases = ", or ".join(" and ".join(names) for names in LMDB_NAMES)
    raise InputError(
        f"--data-root {folder}: ImageNet is not there; nothing is downloaded, so put there train.txt "
        f"and val.txt (from make_list.py), or databases {databases}, or folders train and val with "
        f"a folder for each class"
    )


def _open_files(train: Path, val: Path | None, root: Path, n_classes: int | None) -> Opened:
    if val is None:
        if not _is_hdf5(train):
            raise InputError(f"{train}: give the validation images as well")
        val = train
    classes: list[str] | None = None
    sources: list[Source] = []
    for path, part in ((train, "train"), (val, "test")):
        if not path.exists():
            kind = "list file" if path.suffix == ".txt" else "data"
            raise InputError(f"{kind} {path}: No such file or directory; correct the path")
        source: Source
        if _is_lmdb(path):
            source = LmdbImages(path, n_classes)
        elif path.is_dir():
            pairs, classes = read_folders(path, classes)
            source = LabeledImages(pairs, path)
        elif _is_hdf5(path):
            source = Hdf5Images(path, part, n_classes)
        else:
            source = LabeledImages(read_list(path, n_classes), root)
        sources.append(source)
    n = max(_n_classes(source) for source in sources)
    if n_classes is not None and n > n_classes:
        raise InputError(f"{train}: has {n} classes; allowed are {n_classes}")
    return sources[0], sources[1], n_classes or n


def _n_classes(source: Source) -> int:
    return int(source.labels.max()) + 1  # type: ignore[attr-defined]


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
