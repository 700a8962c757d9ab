"""Turning out-of-core training on: which memory limit, and what it did."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import launcher
from config import Config
from errors import InputError
from world import World

import chainer_ooc

DIGITS_FRACTION = 0.6
"""Limit for the bundled digits as a fraction of a measured in-core step's peak."""


@dataclass(frozen=True)
class Figures:
    """What the engine has done in this process, in bytes."""

    bytes_out: int = 0
    bytes_in: int = 0


def parse_limit(text: str) -> str | int | float:
    """Turns ``--ooc-limit`` into what ``chainer_ooc.enable`` takes."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def measure_in_core_peak(config: Config, gpu: int) -> int:
    """Returns the peak memory in bytes of an in-core step of this run, in a process of its own."""
    request = {
        "arch": config.arch,
        "insize": config.insize,
        "n_classes": config.n_classes,
        "batchsize": config.batchsize,
        "gpu": gpu,
    }
    script = Path(__file__).with_name("measure_step.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(request)],
        env=launcher.without_mpi(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"measuring an in-core step failed with status {done.returncode}; "
            f"give --ooc-limit to do without it\n{done.stderr[-2000:]}"
        )
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def enable(config: Config, world: World, gpu: int) -> int | None:
    """Enables the engine on every rank as ``--ooc`` and ``--ooc-limit`` say. Collective.

    Args:
        config: The run's settings.
        world: The ranks.
        gpu: This rank's GPU, or -1.

    Returns:
        The measured peak of an in-core step in bytes, or None when it was not measured.

    Raises:
        InputError: The limit is not valid.
    """
    if not config.ooc:
        return None
    limit: str | int | float | None = None
    peak = None
    if config.ooc_limit is not None:
        limit = parse_limit(config.ooc_limit)
    elif config.digits:
        peak = world.broadcast(measure_in_core_peak(config, gpu) if world.rank == 0 else None)
        limit = int(peak * DIGITS_FRACTION)
    with world.together():
        try:
            chainer_ooc.enable(limit=limit, single_backward=True)
        except ValueError as e:
            raise InputError(f"--ooc-limit: {e}" if config.ooc_limit else str(e)) from e
    return peak


def figures() -> Figures:
    """Returns what the engine has moved so far; zeros when it is not enabled."""
    if not (hasattr(chainer_ooc, "is_enabled") and chainer_ooc.is_enabled()):
        return Figures()
    stats = chainer_ooc.stats()
    return Figures(stats.bytes_out, stats.bytes_in)


def limit_bytes() -> int | None:
    """Returns the limit of this process in bytes; None when the engine is not enabled."""
    if not (hasattr(chainer_ooc, "is_enabled") and chainer_ooc.is_enabled()):
        return None
    return chainer_ooc.stats().limit_bytes
