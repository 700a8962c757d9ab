"""Turning out-of-core training on: which memory limit, and what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


class Measurement:
    """The peak memory of an in-core step of a run, which a process of its own finds out meanwhile.

    Args:
        config: The run's settings.
        gpu: This rank's GPU, or -1.
        with_mpi: Whether the run loads MPI.
    """

    def __init__(self, config: Config, gpu: int, with_mpi: bool) -> None:
        request = {
            "config": config.model_dump(mode="json", exclude_none=True),
            "gpu": gpu,
            "with_mpi": with_mpi,
        }
        script = Path(__file__).with_name("measure_step.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(request)],
            env=launcher.without_mpi(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def peak_bytes(self) -> int:
        """Waits for the peak and returns it, in bytes.

        Raises:
            RuntimeError: The process failed.
        """
        output, errors = self._process.communicate()
        status = self._process.returncode
        if status:
            raise RuntimeError(
                f"measuring an in-core step failed with status {status}; "
                f"give --ooc-limit to do without it\n{errors[-2000:]}"
            )
        return int(json.loads(output.splitlines()[-1])["peak_bytes"])

    def end(self) -> None:
        """Ends the process if it still runs."""
        with self._process as process:
            process.kill()


def _is_measured(config: Config) -> bool:
    """Whether the limit is a part of a measured peak, as neither the user nor the system says it."""
    given = config.ooc_limit is not None or "CHAINER_OOC_LIMIT" in os.environ
    return config.ooc and config.digits and not given


@contextmanager
def measuring(config: Config, gpu: int) -> Iterator[Measurement | None]:
    """Measures the peak of an in-core step on rank 0 while the block prepares the run.

    Args:
        config: The run's settings.
        gpu: This rank's GPU, or -1.
    """
    if launcher.rank() or not _is_measured(config):
        yield None
        return
    with_mpi = launcher.world_size() > 1 or config.communicator is not None
    measurement = Measurement(config, gpu, with_mpi)
    try:
        yield measurement
    finally:
        measurement.end()


def enable(config: Config, world: World, measurement: Measurement | None) -> int | None:
    """Enables the engine on every rank as ``--ooc`` and ``--ooc-limit`` say. Collective.

    Args:
        config: The run's settings.
        world: The ranks.
        measurement: What ``measuring`` has begun.

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
    elif _is_measured(config):
        with world.others_wait():
            if measurement is not None:
                peak = measurement.peak_bytes()
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


def advice() -> str | None:
    """Returns what bound this process's training and what to change; None without the engine."""
    return chainer_ooc.stats().advice if chainer_ooc.is_enabled() else None


def limit_bytes() -> int | None:
    """Returns the limit of this process in bytes; None when the engine is not enabled."""
    return chainer_ooc.stats().limit_bytes if chainer_ooc.is_enabled() else None
