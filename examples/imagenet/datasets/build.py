"""From plain arguments to the training and validation set of this rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import InputError
from transforms import AUGMENTATIONS, CropAndNormalize, load_mean, training, validation
from transforms.colour import PUBLISHED

from datasets.arrays import ArrayImages
from datasets.classes import Names
from datasets.decoding import Size
from datasets.in_memory import InMemory
from datasets.labeled import Enlarged, Source, Subset, shard_indices
from datasets.opening import open_dataset
from datasets.originals import Warn
from datasets.preprocessed import PreprocessedImages, Transform
from datasets.statistics import channel_statistics

MEAN_IMAGE = "mean_image"
ALL_AUGMENTATIONS = (MEAN_IMAGE, *AUGMENTATIONS)
"""``mean_image``: random crop and flip, less the mean file; the others are in ``transforms``."""
NORMALIZATIONS = ("published", "data")
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
        classes: Their names, if the labels go by names.
    """

    train: PreprocessedImages
    val: PreprocessedImages
    n_train: int
    n_val: int
    n_classes: int
    classes: Names


def build(
    *,
    dataset: str = "files",
    train: str | Path | None = None,
    val: str | Path | None = None,
    root: str | Path = ".",
    data_root: str | Path = "data",
    insize: int = 224,
    n_classes: int | None = None,
    classes: Names = None,
    augmentation: str = MEAN_IMAGE,
    mean: str | Path = "mean.npy",
    normalization: str = "published",
    samples: int = 10_000,
    cache: str | Path | None = None,
    ten_crop: bool = False,
    enlarge: Size | None = None,
    loadtype: str = "original",
    workers: int = 1,
    seed: int = 0,
    rank: int = 0,
    size: int = 1,
    ranks_here: int = 1,
    progress: Any = None,
    warn: Warn | None = None,
) -> Data:
    """Opens the training and validation set; reads the first image of each to find mistakes early.

    Every rank calls it by itself. Who has which image depends on (seed, rank, size) alone.

    Args:
        dataset: One of ``opening.DATASETS``; ``files``: ``train`` and ``val`` are paths.
        train: List file, folder of class folders, LMDB database or HDF5 file.
        val: The same for validation; None for an HDF5 file that has both.
        root: Folder of the paths in the lists.
        data_root: Folder of the original files of the other data sets.
        insize: Side of the network's input in pixels.
        n_classes: Number of classes; labels must be below it. None: as many as the data have.
        classes: See ``open_dataset``.
        augmentation: One of ``ALL_AUGMENTATIONS``.
        mean: Mean file, from compute_mean.py, for ``mean_image``.
        normalization: For the other augmentations: ``published``: the usual mean and standard deviation
            of CIFAR, MNIST or else ImageNet; ``data``: those of this training set.
        samples: Number of training images that ``data`` takes at most.
        cache: Folder that ``data`` keeps them in. With several ranks, call ``channel_statistics``
            of ``statistics`` on one of them first, and the others find the result there.
        ten_crop: Validation examples are ten crops each: (10, 3, insize, insize).
        enlarge: Width and height that every image is resized to when it is read; None: as it is.
        loadtype: ``original``: images are decoded when they are needed; ``custom``: this rank's
            are decoded into memory now. Augmentation is as random with either.
        workers: Threads that decode for ``custom`` and ``data``.
        seed: Seed of the share of each rank and of the augmentation.
        rank: This rank, from 0.
        size: Number of ranks.
        ranks_here: Number of ranks on this machine.
        progress: Such as ``tqdm``, shows how far reading has got; None shows nothing.
        warn: See ``open_dataset``.

    Raises:
        InputError: An argument, a file or one of the first images cannot be used.
    """
    _check("loadtype", loadtype, LOADTYPES)
    _check("augmentation", augmentation, ALL_AUGMENTATIONS)
    _check("normalization", normalization, NORMALIZATIONS)
    *sources, n_classes = open_dataset(
        dataset,
        train=train,
        val=val,
        root=root,
        data_root=data_root,
        n_classes=n_classes,
        classes=classes,
        warn=warn,
    )
    if enlarge is None and isinstance(sources[0], ArrayImages):
        # All have one size, which is seldom the network's.
        enlarge = None if sources[0].image_size(0) == (insize, insize) else (insize, insize)
    if augmentation == MEAN_IMAGE:
        if ten_crop:
            raise InputError(
                f"ten crops: not with augmentation {MEAN_IMAGE}, which has one crop; train with one of "
                f"{', '.join(AUGMENTATIONS)}"
            )
        transforms: list[Transform] = [CropAndNormalize(load_mean(mean, insize), insize)] * 2
    else:
        if normalization == "data" or dataset == "digits":
            values = channel_statistics(
                sources[0],
                n=samples,
                seed=seed,
                cache=None if cache is None else Path(cache),
                workers=workers,
                progress=progress,
            )
        else:
            values = PUBLISHED.get(dataset, PUBLISHED["imagenet"])
        transforms = [
            training(augmentation, insize, *values),
            validation(augmentation, insize, *values, ten_crop=ten_crop),
        ]
    for source in sources:
        # The most common mistakes (root, sizes, mean) show at the first image.
        PreprocessedImages(_enlarged(source, enlarge), transforms[1], None).get(0)
    shares = []
    for source, order_seed in zip(sources, (seed, None), strict=True):
        share: Source = Subset(source, shard_indices(len(source), rank, size, order_seed))
        if loadtype == "custom" and not isinstance(source, ArrayImages):
            share = InMemory(share, workers, progress, ranks_here)
        shares.append(_enlarged(share, enlarge))
    return Data(
        PreprocessedImages(shares[0], transforms[0], (seed, rank, 1)),
        PreprocessedImages(shares[1], transforms[1], None),
        len(sources[0]),
        len(sources[1]),
        n_classes,
        sources[0].names,
    )


def _check(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{option} {value!r}: allowed are {', '.join(allowed)}")


def _enlarged(source: Source, size: Size | None) -> Source:
    return source if size is None else Enlarged(source, size)
