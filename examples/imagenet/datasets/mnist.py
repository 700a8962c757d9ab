"""MNIST from its original files, or from the .npz file that Keras made of them."""

from __future__ import annotations

import struct
from pathlib import Path

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
    read_npz,
)

FILES = {
    "train": (
        Expected("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        Expected("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
    ),
    "test": (
        Expected("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        Expected("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
}
NPZ = Expected("mnist.npz", "8a61469f7ea1b51cbae51d4f78837e45")
CLASSES = [str(digit) for digit in range(10)]


def read_idx(data: bytes, path: Path | str) -> numpy.ndarray:
    """Returns the array of an IDX file of unsigned bytes.

    Args:
        data: Its contents, uncompressed.
        path: What errors call it.

    Raises:
        InputError: It is not such a file, or truncated.
    """
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 4:
        raise broken(path, "it does not begin like an IDX file of unsigned bytes")
    n = data[3]
    header = 4 + 4 * n
    if len(data) < header:
        raise broken(path, "it ends in its header")
    shape = struct.unpack(f">{n}I", data[4:header])
    expected = header + int(numpy.prod(shape, dtype=object))
    if len(data) != expected:
        raise broken(path, f"it has {len(data)} bytes, and should have {expected}")
    return numpy.frombuffer(data, numpy.uint8, offset=header).reshape(shape)


def load_mnist(root: Path, warn: Warn | None = None) -> tuple[ArrayImages, ArrayImages]:
    """Returns the training and test set: 60,000 and 10,000 images of 28 x 28 pixels.

    Args:
        root: Folder of the files, or one that has them in ``mnist``, ``MNIST`` or ``MNIST/raw``.
        warn: Is told of files that are not the published ones; None: they are not compared.

    Raises:
        InputError: A file is missing or damaged.
    """
    for folder in (root, root / "mnist", root / "MNIST", root / "MNIST" / "raw"):
        npz = find(folder, NPZ.name)
        if npz is not None:
            arrays = read_npz(npz, channels_first=False)
            parts = {p: (arrays[f"x_{p}"], arrays[f"y_{p}"]) for p in FILES}
            used = [(npz, NPZ)]
            break
        found = [
            (path, f)
            for files in FILES.values()
            for f in files
            if (path := find(folder, f.name.removesuffix(".gz"))) is not None
        ]
        if len(found) == 4:
            used = found
            values = [read_idx(read(path), path) for path, _ in found]
            parts = {"train": tuple(values[:2]), "test": tuple(values[2:])}
            break
    else:
        raise missing(
            "MNIST",
            root,
            [
                ("original files", [f for files in FILES.values() for f in files]),
                ("one file of Keras", [NPZ]),
            ],
        )
    train, test = (ArrayImages(*parts[p], f"MNIST's {p} set", CLASSES) for p in FILES)
    compare_checksums(used, warn)
    return train, test
