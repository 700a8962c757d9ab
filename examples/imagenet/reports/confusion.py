"""Confusion matrices: one for each validation, and their pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from chainer import training
from errors import InputError
from files import is_newer, read_arrays
from PIL import Image

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


def _matrices(out: Path) -> list[Path]:
    numbers = {p: p.stem.removeprefix("iter_") for p in (out / FOLDER).glob("iter_*.npz")}
    return sorted((p for p, n in numbers.items() if n.isdecimal()), key=lambda p: int(numbers[p]))


def confusion_pictures(out: Path) -> list[Path]:
    """Returns the pictures that there are to be of the matrices in a folder of results."""
    return [file.with_suffix(".png") for file in _matrices(out)]


def draw_confusions(out: Path) -> list[Path]:
    """Draws the matrices of a folder of results that have no picture yet.

    Returns:
        The picture of the last validation, if there is one.

    Raises:
        InputError: A file is not a matrix.
    """
    drawing: _Drawing | None = None
    for file in _matrices(out):
        picture = file.with_suffix(".png")
        if not is_newer(picture, file.stat().st_mtime_ns):
            matrix = read_arrays(file, ["confusion"])["confusion"]
            if (
                matrix.ndim != 2
                or matrix.shape[0] != matrix.shape[1]
                or matrix.dtype.kind not in "iu"
            ):
                raise InputError(f"{file}: is no confusion matrix; remove it")
            if drawing is None or drawing.n != len(matrix):
                drawing = _Drawing(len(matrix))
            drawing.draw(matrix, picture)
    return confusion_pictures(out)[-1:]


def draw_confusion(matrix: np.ndarray, path: Path) -> None:
    """Draws a confusion matrix in percent of each row's images."""
    _Drawing(len(matrix)).draw(matrix, path)


class _Drawing:
    """Pictures of matrices of one size; what all of them have in common is drawn once.

    Layout, axes and colour bar take most of the time of a picture.

    Args:
        n: Number of classes.
    """

    def __init__(self, n: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.n = n
        figure = Figure(figsize=(6.4, 5.6), dpi=120, layout="constrained")
        self._canvas = FigureCanvasAgg(figure)
        self._axes: Any = figure.add_subplot()
        self._image = self._axes.imshow(
            np.zeros((n, n)), vmin=0, vmax=100, cmap="Blues", interpolation="nearest"
        )
        figure.colorbar(self._image, label="% of the images of the class")
        self._axes.set_xlabel("taken for class")
        self._axes.set_ylabel("class")
        self._axes.xaxis.get_major_locator().set_params(integer=True)
        self._axes.yaxis.get_major_locator().set_params(integer=True)
        if n <= 20:
            self._axes.set_xticks(range(n))
            self._axes.set_yticks(range(n))
        self._changing = [self._image, *self._axes.spines.values()]
        for artist in self._changing:
            artist.set_animated(True)  # not drawn with the rest; the frame lies over the image
        self._canvas.draw()
        self._common = self._canvas.copy_from_bbox(figure.bbox)

    def draw(self, matrix: np.ndarray, path: Path) -> None:
        """Draws a matrix."""
        share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        self._image.set_data(share)
        self._canvas.restore_region(self._common)
        for artist in self._changing:
            self._axes.draw_artist(artist)
        if self.n <= 20:
            number = self._axes.text(0, 0, "", ha="center", va="center", fontsize=7)
            for i, j in np.argwhere(matrix):
                color = "white" if share[i, j] > 50 else "black"
                number.set(x=j, y=i, text=str(matrix[i, j]), color=color)
                self._axes.draw_artist(number)
            number.remove()
        picture = Image.fromarray(np.asarray(self._canvas.buffer_rgba()))
        write_atomically(path, lambda f: picture.save(f, "PNG", dpi=(120, 120)))
