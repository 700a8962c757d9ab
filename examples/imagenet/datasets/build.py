"""From plain arguments to the training and validation set of this rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import InputError
from transforms import CropAndNormalize, load_mean

from datasets.decoding import Size
from datasets.in_memory import InMemory
from datasets.labeled import (
    Enlarged,
    LabeledImages,
    Source,
    Subset,
    read_list,
    shard_indices,
)
from datasets.preprocessed import PreprocessedImages

LOADTYPES = ("original", "custom")


@dataclass(frozen=True)
class Data:
    """The data of this rank.

    Attributes:
        train: Training examples, augmented; every rank has the same number.
        val: Validation examples, not augmented; each is on one rank.
        n_train: Number of training images of all ranks together.
        n_val: Number of validation images of all ranks together.
        n_classes: Number of classes.
    """

    train: PreprocessedImages
    val: PreprocessedImages
    n_train: int
    n_val: int
    n_classes: int


def build(
    *,
    train: str | Path,
    val: str | Path,
    root: str | Path = ".",
    mean: str | Path = "mean.npy",
    insize: int = 224,
    n_classes: int = 1000,
    enlarge: Size | None = None,
    loadtype: str = "original",
    workers: int = 1,
    seed: int = 0,
    rank: int = 0,
    size: int = 1,
    ranks_here: int = 1,
    progress: Any = None,
) -> Data:
    """Opens the training and validation set; reads the first image of each to find mistakes early.

    Every rank calls it by itself. Who has which image depends on (seed, rank, size) alone.

    Args:
        train: List file of the training images.
        val: List file of the validation images.
        root: Folder of the paths in the lists.
        mean: Mean file, from compute_mean.py.
        insize: Side of the network's input in pixels.
        n_classes: Number of classes; labels must be below it.
        enlarge: Width and height that every image is resized to when it is read; None: as it is.
        loadtype: ``original``: images are decoded when they are needed; ``custom``: this rank's
            are decoded into memory now. Augmentation is as random with either.
        workers: Threads that decode for ``custom``.
        seed: Seed of the share of each rank and of the augmentation.
        rank: This rank, from 0.
        size: Number of ranks.
        ranks_here: Number of ranks on this machine.
        progress: Such as ``tqdm``, shows how far ``custom`` has got; None shows nothing.

    Raises:
        InputError: An argument, a list or one of the first images cannot be used.
    """
    if loadtype not in LOADTYPES:
        raise InputError(f"loadtype {loadtype!r}: allowed are {', '.join(LOADTYPES)}")
    transform = CropAndNormalize(load_mean(mean, insize), insize)
    sources: list[Source] = []
    for path in (train, val):
        source: Source = LabeledImages(read_list(path, n_classes), root)
        # The most common mistakes (root, sizes, mean) show at the first image.
        PreprocessedImages(_enlarged(source, enlarge), transform, None).get(0)
        sources.append(source)
    shares = []
    for source, order_seed in zip(sources, (seed, None), strict=True):
        share: Source = Subset(source, shard_indices(len(source), rank, size, order_seed))
        if loadtype == "custom":
            share = InMemory(share, workers, progress, ranks_here)
        shares.append(_enlarged(share, enlarge))
    return Data(
        PreprocessedImages(shares[0], transform, (seed, rank, 1)),
        PreprocessedImages(shares[1], transform, None),
        len(sources[0]),
        len(sources[1]),
        n_classes,
    )


def _enlarged(source: Source, size: Size | None) -> Source:
    return source if size is None else Enlarged(source, size)
