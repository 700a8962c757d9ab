"""The course of a run, in a bounded number of points."""

from __future__ import annotations

import json
from typing import Any

from chainer import training

from reports.figures import Synchronize

MAX_POINTS = 4096
"""Points kept of the training; when there are more, neighbours are averaged."""

COLUMNS = (
    "iteration",
    "loss",
    "accuracy",
    "lr",
    "seconds",
    "data_seconds",
    "resident_bytes",
    "peak_bytes",
    "swapped_bytes",
)
"""What a point of the training holds; without a ``Synchronize`` the last five are 0."""


class History(training.Extension):
    """Losses, accuracies and costs of the iterations and validations; a snapshot keeps them.

    Args:
        synchronize: Source of times and memory; None: only loss, accuracy and learning rate.
        max_points: Most points to keep of the training (an even number).

    Attributes:
        train: A row of ``COLUMNS`` for each iteration; of a long training, for each
            ``iterations_per_point`` iterations, with their means and the last one's number.
        validation: (iteration, loss, accuracy) of each validation.
        iterations_per_point: Iterations in a full row, a power of two.
        loss_first, loss_last: Losses of the first and the last iteration, None before.
    """

    name = "History"

    def __init__(
        self, synchronize: Synchronize | None = None, max_points: int = MAX_POINTS
    ) -> None:
        self._synchronize = synchronize
        self._max_points = max_points
        self.train: list[list[float]] = []
        self.validation: list[list[float]] = []
        self.iterations_per_point = 1
        self._in_last = 0
        self.loss_first: float | None = None
        self.loss_last: float | None = None

    def __call__(self, trainer: training.Trainer) -> None:
        """Appends what was observed in this iteration."""
        observation = trainer.observation
        iteration = trainer.updater.iteration
        if "main/loss" in observation:
            loss = float(observation["main/loss"])
            row = [
                iteration,
                loss,
                float(observation["main/accuracy"]),
                float(observation.get("lr", 0)),
                *self._costs(),
            ]
            self._append(row)
            self.loss_first = loss if self.loss_first is None else self.loss_first
            self.loss_last = loss
        if "validation/main/loss" in observation:
            values = (observation[f"validation/main/{k}"] for k in ("loss", "accuracy"))
            self.validation.append([iteration, *map(float, values)])

    def _costs(self) -> list[float]:
        figures = self._synchronize
        if figures is None:
            return [0.0] * 5
        step = figures.step
        return [
            step.seconds,
            step.data_seconds,
            step.resident_bytes,
            figures.peak_bytes,
            step.swapped_bytes,
        ]

    def _append(self, row: list[float]) -> None:
        if self.train and self._in_last < self.iterations_per_point:
            last, n = self.train[-1], self._in_last
            mean = [(a * n + b) / (n + 1) for a, b in zip(last[1:], row[1:], strict=True)]
            self.train[-1] = [row[0], *mean]
            self._in_last += 1
            return
        if len(self.train) >= self._max_points:
            pairs = zip(self.train[::2], self.train[1::2], strict=True)
            self.train = [
                [b[0], *((x + y) / 2 for x, y in zip(a[1:], b[1:], strict=True))] for a, b in pairs
            ]
            self.iterations_per_point *= 2
        self.train.append(row)
        self._in_last = 1

    def column(self, name: str) -> list[float]:
        """Returns one of ``COLUMNS`` over the points of the training."""
        index = COLUMNS.index(name)
        return [row[index] for row in self.train]

    def serialize(self, serializer: Any) -> None:
        """Saves or loads the history.

        Raises:
            ValueError: What is loaded is none.
        """
        state = {
            "train": self.train,
            "validation": self.validation,
            "iterations_per_point": self.iterations_per_point,
            "_in_last": self._in_last,
            "loss_first": self.loss_first,
            "loss_last": self.loss_last,
        }
        found = json.loads(serializer("history", json.dumps(state)))
        if not _is_history(found, state):
            raise ValueError("the history in it is none")
        vars(self).update(found)


def _is_history(found: Any, state: dict[str, Any]) -> bool:
    """Tells whether what was read is a history, and not whatever else a file may hold."""
    if not isinstance(found, dict) or found.keys() != state.keys():
        return False
    rows = (("train", len(COLUMNS)), ("validation", 3))
    return (
        all(
            isinstance(found[key], list)
            and all(isinstance(row, list) and len(row) == n for row in found[key])
            and all(type(value) in (int, float) for row in found[key] for value in row)
            for key, n in rows
        )
        and all(type(found[key]) is int for key in ("iterations_per_point", "_in_last"))
        and all(type(found[key]) in (float, int, type(None)) for key in ("loss_first", "loss_last"))
    )
