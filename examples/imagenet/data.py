"""The images that this rank trains on and validates with, as the settings say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import Config
from datasets import digits
from datasets.build import Data, build
from datasets.classes import Names
from datasets.iterators import make_iterator
from datasets.preprocessed import PreprocessedImages
from errors import InputError
from reports import gibibytes
from tqdm import tqdm
from world import World

from chainer_ooc.swap.system.memory import physical_bytes


def load(
    config: Config,
    world: World,
    say: Callable[[str], None],
    ten_crop: bool = False,
    classes: Names = None,
) -> Data:
    """Reads the lists and takes this rank's share. Collective.

    Args:
        config: The run's settings.
        world: The ranks.
        say: Prints a line on rank 0.
        ten_crop: Validation images are ten crops each.
        classes: Names of the classes by their numbers, of a run that was trained with them.

    Raises:
        InputError: A list, the mean or one of the first images cannot be used, or no memory of
            this machine holds a batch.
    """
    with world.together():
        _check_batch(config, world)
    if config.dataset not in (None, "files"):
        options: dict[str, Any] = {"dataset": config.dataset, "data_root": config.data_root}
        source = (
            f"{config.dataset} in {config.data_root}" if config.dataset != "digits" else "digits"
        )
    else:
        train, val, mean, root = _paths(config, world)
        options = {"train": train, "val": val, "root": root, "mean": mean}
        source = f"{train} and {val}" + (" (handwritten digits)" if config.digits else "")

    def make(warn: Callable[[str], None] | None) -> Data:
        return build(
            **options,
            insize=config.insize,
            n_classes=config.n_classes,
            classes=classes,
            augmentation=config.augmentation_name,
            ten_crop=ten_crop,
            normalization=config.normalization,
            cache=config.out / "data",
            enlarge=config.enlarge,
            loadtype=config.loadtype,
            workers=max(config.loaderjob, 1),
            seed=config.seed,
            rank=world.rank,
            size=world.size,
            ranks_here=world.intra_size,
            progress=tqdm if world.rank == 0 else None,
            warn=warn,
        )

    if config.normalization == "data" and world.size > 1:
        with world.together():
            if world.rank == 0:
                make(None)  # leaves the statistics where the other ranks find them
    with world.together():
        data = make((lambda text: say(f"warning: {text}")) if world.rank == 0 else None)
    say(f"data: {data.n_train} training and {data.n_val} validation images of {source}")
    return data


def _check_batch(config: Config, world: World) -> None:
    """Raises InputError when the images of a batch alone are more than there is memory."""
    size = config.batchsize * 3 * config.insize**2 * 4
    room = physical_bytes() // world.intra_size
    if size > room:
        raise InputError(
            f"--batchsize {config.batchsize}: so many images of {config.insize}x{config.insize} "
            f"pixels take {gibibytes(size)}, more than the {gibibytes(room)} of memory that there "
            f"is for a rank; choose fewer"
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


def iterator(config: Config, world: World, dataset: PreprocessedImages, repeat: bool) -> Any:
    """Returns the iterator of training (``repeat``) or validation images."""
    return make_iterator(
        dataset,
        config.batchsize if repeat else min(config.val_batchsize, max(len(dataset), 1)),
        iterator=config.iterator_name,
        workers=max(config.loaderjob, 1),
        repeat=repeat,
        seed=(config.seed, world.rank, 0),
    )
