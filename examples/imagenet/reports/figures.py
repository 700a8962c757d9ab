"""The figures of an iteration, agreed on by all ranks."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import chainer
import devices
import out_of_core
import psutil
from chainer import training
from training import Stop
from world import World

from reports.units import GIB

SUMS = (
    "bytes_out",
    "bytes_in",
    "peak_bytes",
    "total_seconds",
    "total_data_seconds",
    "total_images",
)
"""Attributes of ``Synchronize`` that a snapshot keeps."""


@dataclass(frozen=True)
class Step:
    """What one iteration took.

    Attributes:
        seconds: Time of the iteration, its data included, on the slowest rank (s).
        data_seconds: The part of it that a rank waited for its batch, the longest of all (s).
        images: Images that all ranks together trained on.
        resident_bytes: Memory held after it by the rank that holds the most (bytes).
        swapped_bytes: Bytes moved out and in by all ranks together.
    """

    seconds: float = 0.0
    data_seconds: float = 0.0
    images: int = 0
    resident_bytes: int = 0
    swapped_bytes: int = 0


class Synchronize(training.Extension):
    """After each iteration, makes of every rank's figures those of the run.

    ``main/loss`` and ``main/accuracy`` become means over the ranks, and a signal that one rank has
    received becomes known to all.

    Args:
        world: The ranks.
        stop: The run's stop trigger.
        gpu: Whether the ranks train on GPUs.
        batchsize: Images per rank and iteration.

    Attributes:
        bytes_out, bytes_in: Bytes moved by all ranks together.
        peak_bytes: The most memory that any rank has held.
        step: The last iteration.
        total_seconds, total_data_seconds, total_images: Sums over the iterations of this process.
    """

    priority = training.extension.PRIORITY_EDITOR
    name = "Synchronize"

    def __init__(self, world: World, stop: Stop, gpu: bool, batchsize: int = 0) -> None:
        self._world = world
        self._stop = stop
        self._gpu = gpu
        self._batchsize = batchsize
        self._before = (0.0, 0.0)
        self._process = psutil.Process()
        self.bytes_out = self.bytes_in = self.peak_bytes = 0
        self.step = Step()
        self.total_seconds = self.total_data_seconds = 0.0
        self.total_images = self._iterations = 0
        self._logged = (0.0, 0.0, 0, 0)
        self._updates: tuple[int, float] = (0, 0.0)
        self._saved: Any = ({}, 0, 0.0)

    def note_peak(self) -> None:
        """Takes note of what this rank has held since the last iteration, by itself."""
        self.peak_bytes = max(self.peak_bytes, devices.peak_bytes(self._gpu))

    def note_peaks(self) -> None:
        """Takes note of what the ranks have held since the last iteration. Collective."""
        self.note_peak()
        self.peak_bytes = int(self._world.max([self.peak_bytes])[0])

    def __call__(self, trainer: training.Trainer) -> None:
        """Exchanges the figures. Collective."""
        observation, updater = trainer.observation, trainer.updater
        keys = ("main/loss", "main/accuracy")
        values = [float(chainer.backend.CpuDevice().send(_array(observation[k]))) for k in keys]
        moved = out_of_core.figures()
        total = self._world.sum([*values, moved.bytes_out, moved.bytes_in])
        for key, value in zip(keys, total / self._world.size, strict=False):
            observation[key] = float(value)
        now = (updater.seconds, updater.data_seconds)
        seconds, data_seconds = (b - a for a, b in zip(self._before, now, strict=True))
        self._before, self._updates = now, (updater.n_updates, updater.seconds)
        received, peak, resident, seconds, data_seconds = self._world.max(
            [
                self._stop.received,
                devices.peak_bytes(self._gpu),
                self._resident_bytes(),
                seconds,
                data_seconds,
            ]
        )
        self._stop.agreed, self.peak_bytes = int(received), int(peak)
        swapped = int(total[2] + total[3]) - self.bytes_out - self.bytes_in
        self.bytes_out, self.bytes_in = int(total[2]), int(total[3])
        images = self._batchsize * self._world.size
        self.step = Step(float(seconds), float(data_seconds), images, int(resident), swapped)
        self.total_seconds += self.step.seconds
        self.total_data_seconds += self.step.data_seconds
        self.total_images += images
        self._iterations += 1

    def _resident_bytes(self) -> int:
        if self._gpu:
            return int(chainer.backends.cuda.cupy.get_default_memory_pool().used_bytes())
        return int(self._process.memory_info().rss)

    def serialize(self, serializer: Any) -> None:
        """Saves the sums; loads those of the process that wrote the snapshot, for ``go_back``."""
        sums = {name: getattr(self, name) for name in SUMS}
        with contextlib.suppress(KeyError):  # of an earlier version
            self._saved = json.loads(serializer("sums", json.dumps([sums, *self._updates])))

    def go_back(self, updater: Any) -> None:
        """Takes the sums of the process that wrote the snapshot, which has ended, for this one's.

        Args:
            updater: The run's updater, which gets ``n_updates`` and ``seconds`` of that process.
        """
        sums, updater.n_updates, updater.seconds = self._saved
        vars(self).update(sums)

    def add_to_log(self, entry: dict[str, Any]) -> None:
        """Adds the figures since the last entry to one of LogReport (its ``postprocess``)."""
        sums = (self.total_seconds, self.total_data_seconds, self.total_images, self._iterations)
        seconds, data, images, n = (b - a for a, b in zip(self._logged, sums, strict=True))
        self._logged = sums
        if n:
            if images and seconds:
                entry["images/s"] = images / seconds
            entry["step s"] = seconds / n
            entry["data s"] = data / n
        entry["swapped GiB"] = (self.bytes_out + self.bytes_in) / GIB
        entry["peak GiB"] = self.peak_bytes / GIB


def _array(value: Any) -> Any:
    return chainer.as_array(value) if isinstance(value, chainer.Variable) else value
