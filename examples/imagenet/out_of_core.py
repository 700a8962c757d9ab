"""Turning out-of-core training on: which memory limit, and what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launcher
from config import Config
from errors import InputError
from world import World

import chainer_ooc
from chainer_ooc.settings import parse_bytes

DIGITS_FRACTION = 0.64
"""Limit for the bundled digits as a fraction of a measured in-core step's peak."""


@dataclass(frozen=True)
class Figures:
    """What the engine has done in this process, in bytes."""

    bytes_out: int = 0
    bytes_in: int = 0


def measure_in_core_peak(config: Config, gpu: int, with_mpi: bool) -> int:
    """Returns the peak memory in bytes of an in-core step of this run, in a process of its own."""
    request = {
        "config": config.model_dump(mode="json", exclude_none=True),
        "gpu": gpu,
        "with_mpi": with_mpi,
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
    options: dict[str, Any] = {}
    if config.ooc_split is not None:
        options["split"] = config.ooc_split
    peak: int | None = None
    if config.ooc_host_limit is not None:
        with world.together():
            try:
                total = parse_bytes("--ooc-host-limit", config.ooc_host_limit)
            except ValueError as e:
                raise InputError(str(e)) from e
        options["host_limit"] = total // world.intra_size
    if config.ooc_limit is not None:
        options["limit"] = config.ooc_limit
    elif config.digits and "CHAINER_OOC_LIMIT" not in os.environ:
        if world.rank == 0:
            peak = measure_in_core_peak(config, gpu, with_mpi=world.comm is not None)
        peak = world.broadcast(peak)
        options["limit"] = int(peak * DIGITS_FRACTION)
    with world.together():
        try:
            chainer_ooc.enable(single_backward=True, **options)
        except ValueError as e:
            name = "--ooc-limit" if config.ooc_limit is not None else "--ooc"
            raise InputError(f"{name}: {e}") from e
    return peak


def figures() -> Figures:
    """Returns what the engine has moved so far; zeros when it is not enabled."""
    if not chainer_ooc.is_enabled():
        return Figures()
    stats = chainer_ooc.stats()
    return Figures(stats.bytes_out, stats.bytes_in)


def limit_bytes() -> int | None:
    """Returns the limit of this process in bytes; None when the engine is not enabled."""
    return chainer_ooc.stats().limit_bytes if chainer_ooc.is_enabled() else None
