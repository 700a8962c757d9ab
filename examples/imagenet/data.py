"""The images that this rank trains on and validates with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainer import iterators
from config import Config
from datasets import digits
from datasets.labeled import LabeledImages, Pair, read_list
from datasets.preprocessed import EpochOrder, PreprocessedImages
from tqdm import tqdm
from transforms import CropAndNormalize, load_mean
from world import World


@dataclass(frozen=True)
class Data:
    """This rank's images.

    Attributes:
        train: Training images, augmented.
        val: Validation images.
        n_train: Number of images that all ranks together train on.
    """

    train: PreprocessedImages
    val: PreprocessedImages
    n_train: int


def load(config: Config, world: World, say: Callable[[str], None]) -> Data:
    """Reads the lists and shares them out. Collective.

    Args:
        config: The run's settings.
        world: The ranks.
        say: Prints a line on rank 0.

    Raises:
        InputError: A list, the mean or the first image cannot be used.
    """
    train_path, val_path, mean_path, root = _paths(config, world)
    lists: list[Any] = [None, None]
    with world.together():
        mean = load_mean(mean_path, config.insize)
        transform = CropAndNormalize(mean, config.insize)
        if world.rank == 0:
            for i, path in enumerate((train_path, val_path)):
                pairs = read_list(path, config.n_classes)
                # The most common mistakes (root, sizes, mean) show at the first image.
                PreprocessedImages(LabeledImages(pairs[:1], root), transform, None).get(0)
                lists[i] = pairs
    n_train, n_val = world.broadcast([len(x) if x else 0 for x in lists])
    say(
        f"data: {n_train} training and {n_val} validation images of {train_path} and {val_path}"
        + (" (handwritten digits)" if config.digits else "")
    )
    train = LabeledImages(_scatter(lists[0], world, config.seed), root)
    val = LabeledImages(_scatter(lists[1], world, None), root)
    return Data(
        PreprocessedImages(train, transform, (config.seed, world.rank, 1)),
        PreprocessedImages(val, transform, None),
        n_train,
    )


def _paths(config: Config, world: World) -> tuple[Path, Path, Path, Path]:
    """Returns train list, val list, mean and root; writes the digits when needed (rank 0)."""
    if not config.digits:
        return *config.lists, config.mean, config.root
    size = digits.image_size(config.insize)
    folder = config.out / "data" / f"digits-{size}"
    with world.together():
        if world.rank == 0:
            folder.parent.mkdir(exist_ok=True)
            digits.write_digits(folder, size, tqdm)
    return folder / "train.txt", folder / "val.txt", folder / "mean.npy", folder


def _scatter(pairs: list[Pair] | None, world: World, order_seed: int | None) -> Any:
    """Returns this rank's part of rank 0's list.

    Shuffled training shards have one length, so that epochs end together; validation counts each
    image once.
    """
    if world.comm is None:
        return pairs
    import chainermn

    shuffle = order_seed is not None
    return chainermn.scatter_dataset(
        pairs, world.comm, shuffle=shuffle, seed=order_seed, force_equal_length=shuffle
    )


def iterator(config: Config, world: World, dataset: PreprocessedImages, repeat: bool) -> Any:
    """Returns the iterator of training (``repeat``) or validation images."""
    batchsize = config.batchsize if repeat else config.val_batchsize
    options: dict[str, Any] = {"repeat": repeat}
    if repeat:
        options["order_sampler"] = EpochOrder(len(dataset), (config.seed, world.rank, 0))
    else:
        options["shuffle"] = False
    if config.iterator_name == "serial" or not len(dataset):
        return iterators.SerialIterator(dataset, batchsize, **options)
    if config.iterator_name == "thread":
        return iterators.MultithreadIterator(
            dataset, batchsize, n_threads=config.loaderjob, **options
        )
    return iterators.MultiprocessIterator(
        dataset, batchsize, n_processes=config.loaderjob, **options
    )
