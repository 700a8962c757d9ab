"""TensorBoard event files."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chainer import training

from reports.figures import Synchronize
from reports.units import GIB

MAX_POINTS = 10_000
"""About how many iterations of a run are written; validations all are."""


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """Lets imports of a module fail that has not been imported yet."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


class TensorBoard(training.Extension):
    """Writes loss, accuracy, learning rate, speed and memory to event files.

    ``tensorboard --logdir OUT`` shows them. A resumed run hides what an earlier one wrote after
    the iteration it continues from.

    Args:
        out: Folder of the run; the files go to its folder ``tensorboard``.
        iterations: Length of the training.
        figures: Source of speed and memory.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    name = "TensorBoard"

    def __init__(self, out: Path, iterations: int, figures: Synchronize) -> None:
        # tensorboardX would import it where it is installed: 130 MiB and more for nothing.
        with _absent("torch"):
            from tensorboardX import SummaryWriter

        # Of a loss that is no number WarnOfDivergence says more.
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
        self._make_writer = SummaryWriter
        self._folder = out / "tensorboard"
        self._every = max(1, iterations // MAX_POINTS)
        self._figures = figures
        self._writer: Any = None

    def initialize(self, trainer: training.Trainer) -> None:
        """Opens an event file."""
        done = trainer.updater.iteration
        options = {"purge_step": done + 1} if done else {}
        self._writer = self._make_writer(str(self._folder), **options)

    def __call__(self, trainer: training.Trainer) -> None:
        """Writes the figures of this iteration."""
        iteration, observation = trainer.updater.iteration, trainer.observation
        if iteration % self._every == 0 or iteration == 1:
            step = self._figures.step
            self._write("train/loss", observation["main/loss"], iteration)
            self._write("train/accuracy", observation["main/accuracy"], iteration)
            if "lr" in observation:
                self._write("train/lr", observation["lr"], iteration)
            if step.images and step.seconds:
                self._write("speed/images_per_second", step.images / step.seconds, iteration)
                self._write("speed/data_seconds", step.data_seconds, iteration)
                self._write("speed/step_seconds", step.seconds, iteration)
            self._write("memory/peak_GiB", self._figures.peak_bytes / GIB, iteration)
            self._write("memory/after_iteration_GiB", step.resident_bytes / GIB, iteration)
            self._write("memory/swapped_GiB", step.swapped_bytes / GIB, iteration)
        for key in ("loss", "accuracy", "top5", "mAP"):
            if f"validation/main/{key}" in observation:
                value = observation[f"validation/main/{key}"]
                self._write(f"validation/{key}", value, iteration)

    def _write(self, tag: str, value: Any, iteration: int) -> None:
        self._writer.add_scalar(tag, float(value), iteration)

    def serialize(self, serializer: Any) -> None:
        """Writes what is still in memory: a run that continues from the snapshot does not write it again."""
        if self._writer is not None:
            self._writer.flush()

    def finalize(self) -> None:
        """Writes what is still in memory."""
        if self._writer is not None:
            with contextlib.suppress(OSError):  # it must not hide the error that ended the run
                self._writer.close()
