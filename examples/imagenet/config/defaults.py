"""Defaults that depend on the data: the user's lists, or the bundled digits."""

from __future__ import annotations

from typing import Any

DIGITS: dict[str, Any] = {
    "arch": "cifar_resnet20",
    "insize": 24,
    "batchsize": 72,
    "epoch": 10,
    "iteration": 25,
    "val_batchsize": 72,
    "optimizer": "adam",
    "lr": 0.01,
    "lr_schedule": "cosine",
    "recompute_bn": 72,
    "ooc_split": "always",
}
"""Without list files: two minutes for four ranks on two cores, after which nine digits of ten are told."""

OTHER: dict[str, Any] = {
    "insize": 96,
    "batchsize": 40,
    "epoch": 10,
    "iteration": 14,
    "val_batchsize": 15,
}
"""Without list files, for a network that the user chooses: large enough for most."""


def for_digits(given: set[str]) -> dict[str, Any]:
    """Returns the digits' defaults for a run of which ``given`` is set already."""
    defaults = dict(OTHER if "arch" in given else DIGITS)
    # The optimizer and its learning rates go together: all of them, or none.
    if any(name in ("optimizer", "regime") or name.startswith("lr") for name in given):
        for name in ("optimizer", "lr", "lr_schedule"):
            defaults.pop(name, None)
    if "epoch" in given:
        del defaults["iteration"]  # who asks for epochs does not get the digits' iterations
    return defaults
