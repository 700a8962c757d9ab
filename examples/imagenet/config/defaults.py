"""Defaults that depend on the data: the user's lists, or the bundled digits."""

from __future__ import annotations

from typing import Any

DIGITS: dict[str, Any] = {
    "arch": "googlenetbn",
    "insize": 96,
    "batchsize": 40,
    "epoch": 10,
    "iteration": 14,
    "val_batchsize": 15,
}
"""Without list files: a few minutes for four ranks on two cores."""


def for_digits(given: set[str]) -> dict[str, Any]:
    """Returns the digits' defaults for a run of which ``given`` is set already."""
    defaults = dict(DIGITS)
    if "epoch" in given:
        del defaults["iteration"]  # who asks for epochs does not get the digits' iterations
    return defaults
