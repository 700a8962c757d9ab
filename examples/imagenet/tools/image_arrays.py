"""Small sets of real images as arrays: the digits, MNIST's test images, a part of CIFAR-10."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets.mnist import read_idx
from datasets.originals import read
from errors import InputError
from files import read_arrays

MNIST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class Images(NamedTuple):
    """Images (n, channels, height, width) of float32 in 0..1 and labels (n,) of int32, twice."""

    title: str
    x_train: np.ndarray
    t_train: np.ndarray
    x_test: np.ndarray
    t_test: np.ndarray

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return int(max(self.t_train.max(), self.t_test.max())) + 1


def load(source: str) -> Images:
    """Loads a set.

    Args:
        source: ``digits`` (scikit-learn's 1,797 digits of 8 x 8), a folder with the two files of
            MNIST's test images (of which a fixed fifth is for testing), or an ``.npz`` file with
            the arrays ``x_train``, ``y_train``, ``x_test`` and ``y_test`` (uint8, NCHW).

    Raises:
        InputError: There is no such set, or it is damaged.
    """
    if source == "digits":
        return _digits()
    path = Path(source)
    if path.is_dir():
        return _mnist(path)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path)
    raise InputError(
        f"--data {source}: no such set; give `digits`, a folder with MNIST's test files "
        f"({MNIST[0]}.gz, {MNIST[1]}.gz), or an .npz file with x_train, y_train, x_test, y_test"
    )


def _digits() -> Images:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = (data.images[:, None] / 16).astype(np.float32)
    return _split("scikit-learn's digits, 8 x 8", x, data.target)


def _mnist(folder: Path) -> Images:
    arrays = []
    for name in MNIST:
        found = [p for p in (folder / name, folder / f"{name}.gz") if p.is_file()]
        if not found:
            raise InputError(f"--data {folder}: {name}(.gz) is not there; give the folder that has "
                             f"{MNIST[0]} and {MNIST[1]}")  # fmt: skip
        arrays.append(read_idx(read(found[0]), found[0]))
    images, labels = arrays
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise InputError(f"--data {folder}: images {images.shape} and labels {labels.shape} do not "
                         f"belong together; get both files again")  # fmt: skip
    return _split("a split of MNIST's test set", (images[:, None] / 255).astype(np.float32), labels)


def _npz(path: Path) -> Images:
    arrays = read_arrays(path, ("x_train", "y_train", "x_test", "y_test"))
    x_train, t_train, x_test, t_test = arrays.values()
    return Images(
        f"{path.stem}: {len(x_train):,} training images",
        (x_train / 255).astype(np.float32),
        t_train.reshape(-1).astype(np.int32),
        (x_test / 255).astype(np.float32),
        t_test.reshape(-1).astype(np.int32),
    )


def _split(title: str, x: np.ndarray, t: np.ndarray) -> Images:
    order = np.random.default_rng(0).permutation(len(x))
    n = len(x) * 4 // 5
    train, test = order[:n], order[n:]
    t = t.astype(np.int32)
    return Images(f"{title}: {n:,} training images", x[train], t[train], x[test], t[test])
