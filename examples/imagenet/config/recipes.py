"""Recipes: configuration files that are known by name, and their small form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arch_names import CIFAR
from errors import InputError

from config.files import read, split
from config.messages import suggestion

FOLDER = Path(__file__).resolve().parents[1] / "recipes"

SMOKE_INSIZE = {
    "alexnet": 63,
    "cifar_vgg": 32,
    "googlenet_torch7": 63,
    "googlenetbn": 43,
    "nin": 39,
    "overfeat": 71,
}
"""Sizes of the input by the beginning of a network's name, where the usual ones do not do."""

_DIGITS = 1437  # training images
_BATCHSIZE = 4
_DATA = ("dataset", "data_root", "augmentation", "normalization", "train", "val", "enlarge")
_LENGTH = ("restart_shrink", "snapshot", "loaderjob", "ooc")


def names() -> list[str]:
    """Returns the names of all recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def path_of(name: str) -> Path:
    """Returns the file of a recipe.

    Raises:
        InputError: There is none of this name.
    """
    path = FOLDER / f"{name}.yaml"
    if name not in names():
        raise InputError(f"--recipe {name}: no such recipe{suggestion(name, names())}; "
                         f"`ls {FOLDER}` shows them all")  # fmt: skip
    return path


def load(name: str, smoke: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the settings of a recipe, and what to call each in an error.

    Args:
        name: The recipe.
        smoke: Whether to make it so small that it runs in seconds: its network, optimizer and
            schedule for a few iterations on the bundled digits, in small images.

    Raises:
        InputError: There is no such recipe.
    """
    path = path_of(name)
    settings, _ = split(read(path, "--recipe"))
    if smoke:
        settings = small(settings)
    return settings, {key: f"{path}: {key}" for key in settings}


def small(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe's settings for a few iterations on the bundled digits.

    The learning rate is as much smaller as the batch is; it drops, and the restart period moves on,
    after each iteration.
    """
    kept = {k: v for k, v in settings.items() if k not in (*_DATA, *_LENGTH)}
    arch = settings.get("arch", "nin")
    usual = 8 if arch in CIFAR else 32
    insize = next((n for start, n in SMOKE_INSIZE.items() if arch.startswith(start)), usual)
    drops = settings.get("lr_drops", ())
    # in proportion to the batch, or some networks diverge at once
    factor = _BATCHSIZE / settings.get("batchsize", _BATCHSIZE)
    if "lr" in settings:
        kept["lr"] = settings["lr"] * factor
    if "regime" in settings:
        kept["regime"] = [[epoch, lr * factor, decay] for epoch, lr, decay in settings["regime"]]
    kept.update(
        dataset="digits",
        insize=insize,
        batchsize=_BATCHSIZE,
        val_batchsize=60,
        recompute_bn=120,  # the running statistics are far off after so few iterations
        iteration=len(drops) + 3,
    )
    if drops:
        kept["lr_drops"] = tuple((i + 1) * _BATCHSIZE / _DIGITS for i in range(len(drops)))
    return kept
