"""Confusion matrices: one for each validation, and their pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from chainer import training
from errors import InputError
from files import read_arrays

from reports.units import write_atomically

FOLDER = "confusion"


class Validation(Protocol):
    """What has the matrix of the last validation: row i, column j: images of class i taken for j."""

    confusion: np.ndarray | None


class KeepConfusion(training.Extension):
    """Writes the matrix of each validation to ``confusion/iter_N.npz``.

    The pictures are drawn when the training is done: what draws them takes memory, which a limit
    may not leave.

    Args:
        out: Folder of the results.
        validation: The evaluator.
    """

    priority = training.extension.PRIORITY_READER  # after the evaluator
    name = "KeepConfusion"

    def __init__(self, out: Path, validation: Validation) -> None:
        self._folder = out / FOLDER
        self._validation = validation

    def __call__(self, trainer: training.Trainer) -> None:
        """Writes the matrix, if the model shows its scores."""
        matrix = self._validation.confusion
        if matrix is not None:
            self._folder.mkdir(exist_ok=True)
            path = self._folder / f"iter_{trainer.updater.iteration}.npz"
            write_atomically(path, lambda f: np.savez_compressed(f, confusion=matrix))


def draw_confusions(out: Path) -> list[Path]:
    """Draws the matrices of a folder of results that have no picture yet.

    Returns:
        The picture of the last validation, if there is one.

    Raises:
        InputError: A file is not a matrix.
    """
    numbers = {p: p.stem.removeprefix("iter_") for p in (out / FOLDER).glob("iter_*.npz")}
    files = sorted((p for p, n in numbers.items() if n.isdecimal()), key=lambda p: int(numbers[p]))
    for file in files:
        picture = file.with_suffix(".png")
        if not picture.exists() or picture.stat().st_mtime_ns < file.stat().st_mtime_ns:
            matrix = read_arrays(file, ["confusion"])["confusion"]
            if (
                matrix.ndim != 2
                or matrix.shape[0] != matrix.shape[1]
                or matrix.dtype.kind not in "iu"
            ):
                raise InputError(f"{file}: is no confusion matrix; remove it")
            draw_confusion(matrix, picture)
    return [file.with_suffix(".png") for file in files[-1:]]


def draw_confusion(matrix: np.ndarray, path: Path) -> None:
    """Draws a confusion matrix in percent of each row's images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(matrix)
    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    image = axes.imshow(share, vmin=0, vmax=100, cmap="Blues", interpolation="nearest")
    figure.colorbar(image, label="% of the images of the class")
    axes.set_xlabel("taken for class")
    axes.set_ylabel("class")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    if n <= 20:
        axes.set_xticks(range(n))
        axes.set_yticks(range(n))
        for i, j in np.argwhere(matrix):
            axes.text(
                j, i, str(matrix[i, j]), ha="center", va="center", fontsize=7,
                color="white" if share[i, j] > 50 else "black",
            )  # fmt: skip
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=120))
