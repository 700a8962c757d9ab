"""Validation on all ranks, in pieces that fit into memory, with the ranks' statistics averaged."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import chainer
import chainer.links as L
import metrics
import numpy
from chainer import training
from chainer.training import extensions
from datasets.preprocessed import PreprocessedImages
from errors import InputError
from models.common import ImageClassifier
from reports import terminal
from tqdm import tqdm
from training import Save, first_error, to_arrays
from world import World

import chainer_ooc

KEYS = ("loss", "accuracy", "top5")
MOST_SCORES = 4_000_000
"""With more scores (images times classes) than this, mean average precision is left to tools/evaluate.py: they
are gathered in memory for it."""


class Evaluator(extensions.Evaluator):
    """Validation whose result is the mean over all images, however they are divided.

    Chainer's evaluator averages batches, and its multi-node form averages ranks; both give
    an image of a smaller batch or shard more weight.

    A batch that does not fit into memory (out of core: under the limit) is divided into halves
    until it does, and all that follow are divided likewise. The accuracy stays exactly that of the
    whole batch, the loss but for rounding in the last digits of float32: BLAS may sum in another
    order for another number of rows.

    Beside loss and accuracy it gives the top-5 accuracy, and for sets that are not too large the
    mean average precision (mAP) over the classes; both need a model that shows its scores.

    Args:
        iterator: Iterator of this rank's images.
        model: The model.
        device: This rank's device.
        world: The ranks.
        save: Saves a snapshot.

    Attributes:
        piece: Most images that are computed at once, None before a batch did not fit.
        confusion: Of the last validation: how many images of each class (row) were taken for each
            class (column), int64; None if the model does not show its scores.
    """

    def __init__(
        self,
        iterator: chainer.dataset.Iterator,
        model: chainer.Chain,
        device: chainer.backend.Device,
        world: World,
        save: Save,
    ) -> None:
        super().__init__(iterator, model, device=device)
        self._world = world
        self._save = save
        self.piece: int | None = None
        self.confusion: numpy.ndarray | None = None
        self._scores: list[tuple[numpy.ndarray, numpy.ndarray]] | None = None

    def __call__(self, trainer: training.Trainer | None = None) -> dict[str, float]:
        """Validates; saves a snapshot first when an image cannot be used."""
        try:
            return super().__call__(trainer)
        except InputError:
            if trainer is not None:
                self._save(trainer)
            raise

    def evaluate(self) -> dict[str, float]:
        """Returns loss and accuracies on the validation images of all ranks. Collective."""
        iterator = self.get_iterator("main")
        totals = numpy.zeros(len(KEYS) + 1)
        error = None
        n_classes = getattr(self.get_target("main"), "n_classes", 0)
        (n_images,) = self._world.sum([len(iterator.dataset)])
        self._scores = [] if 0 < n_images * n_classes <= MOST_SCORES else None
        shows = isinstance(self.get_target("main"), ImageClassifier)
        self.confusion = numpy.zeros((n_classes, n_classes), numpy.int64) if shows else None
        iterator.reset()
        with self._progress(len(iterator.dataset)) as progress:
            for batch in iterator if len(iterator.dataset) else ():
                error = first_error(batch)
                if error is not None:
                    break
                totals += self._sums(batch)
                progress.update(len(batch))
        self._world.agree(error)
        *sums, count = self._world.sum(totals)
        means = dict(zip(KEYS, (value / count for value in sums), strict=True))
        if n_classes <= 5:  # all of them are among the first five
            del means["top5"]
        if self.confusion is not None:
            counts = self._world.sum(self.confusion.ravel())
            self.confusion = counts.astype(numpy.int64).reshape(self.confusion.shape)
        if self._scores is not None:
            means["mAP"] = self._mean_average_precision(n_classes)
        return {f"{self.name}/main/{key}": value for key, value in means.items()}

    def _progress(self, n_images: int) -> tqdm[Any]:
        """Returns a bar below that of the training, if there is a terminal and it takes a while."""
        shown = self._world.rank == 0 and terminal.columns() is not None
        return tqdm(
            total=n_images,
            desc=self.name,
            unit="image",
            file=sys.stdout,
            disable=not shown,
            delay=1,
            leave=False,
            position=1,
        )

    def _mean_average_precision(self, n_classes: int) -> float:
        """Returns the mean of the classes' average precisions over the images of all ranks. Collective."""
        mine, self._scores = self._scores or [], None
        scores = numpy.concatenate([one for one, _ in mine] or [numpy.zeros((0, n_classes), "f")])
        labels = numpy.concatenate([one for _, one in mine] or [numpy.zeros(0, "i")])
        gathered = self._world.gather((scores, labels))
        value = None
        if self._world.rank == 0:
            scores, labels = (numpy.concatenate(parts) for parts in zip(*gathered, strict=True))
            value = metrics.mean_average_precision(
                metrics.softmax(scores.astype(numpy.float64)), labels
            )
        return float(self._world.broadcast(value))

    def _sums(self, batch: list[Any]) -> numpy.ndarray:
        """Returns the sums of the loss and the accuracy over a batch, and its size; float64."""
        totals = numpy.zeros(len(KEYS) + 1)
        start = 0
        while start < len(batch):
            piece = batch[start : start + (self.piece or len(batch))]
            try:
                with _limited(len(piece)):
                    totals += self._forward(piece)
            except MemoryError:  # that of CuPy and of the engine, too
                if len(piece) == 1:
                    raise
                self.piece = (len(piece) + 1) // 2
                continue
            start += len(piece)
        return totals

    def _forward(self, piece: list[Any]) -> numpy.ndarray:
        observation: dict[str, Any] = {}
        model = self.get_target("main")
        x, t = to_arrays(piece, self.device)
        shows = isinstance(model, ImageClassifier)
        with (
            model.seeing() if shows else contextlib.nullcontext([]) as seen,
            chainer.reporter.report_scope(observation),
            chainer.no_backprop_mode(),
        ):
            model(x, t)
            seen = seen[-1:]
        found = (observation[f"{self.name}/main/{key}"] for key in ("loss", "accuracy"))
        loss, accuracy = (float(chainer.as_array(value)) for value in found)
        n, right_in_five = len(piece), 0.0
        if seen:
            send = chainer.get_device("@numpy").send
            scores, labels = send(seen[0].array).astype(numpy.float32), send(t)
            right_in_five = metrics.top_k(scores, labels, 5) * n
            assert self.confusion is not None
            self.confusion += metrics.confusion(scores, labels)
            if self._scores is not None:
                self._scores.append((scores, labels))
        # The numbers of right answers are whole; as float32 means they were rounded.
        return numpy.array([loss * n, round(accuracy * n), round(right_in_five), n])

    def serialize(self, serializer: Any) -> None:
        """Saves or loads the size of the pieces, so that a run that continues has the same."""
        self.piece = int(serializer("piece", self.piece or 0)) or None


def _limited(size: int) -> contextlib.AbstractContextManager[None]:
    """Makes more memory than the limit an error, if there is something left to divide."""
    if not chainer_ooc.is_enabled() or size == 1:
        return contextlib.nullcontext()
    return chainer_ooc.out_of_core_mode(strict=True)


class RecomputeStatistics(training.Extension):
    """Makes the statistics of batch normalization anew of some training images, before validation.

    The running ones lag behind the parameters, and hold what they began with: after five
    iterations more than half of it, which 150 layers raise to a power.

    The images are the first ones of this rank's share, with an augmentation that no epoch has. A
    batch that does not fit into memory makes all of them smaller.

    Args:
        model: The model.
        images: This rank's training images.
        n_images: How many of them to take.
        batchsize: How many at once.
        device: This rank's device.
        world: The ranks.
        save: Saves a snapshot.
    """

    priority = training.extension.PRIORITY_WRITER + 2  # before the average over the ranks
    name = "RecomputeStatistics"

    def __init__(
        self,
        model: chainer.Chain,
        images: PreprocessedImages,
        n_images: int,
        batchsize: int,
        device: chainer.backend.Device,
        world: World,
        save: Save,
    ) -> None:
        self._model = model
        self._images = images
        self._n = min(n_images, len(images))
        self._batchsize = batchsize
        self._device = device
        self._world = world
        self._save = save
        links = model.links()
        self._links = [link for link in links if isinstance(link, L.BatchNormalization)]

    def __call__(self, trainer: training.Trainer) -> None:
        """Changes the statistics. Collective.

        Raises:
            InputError: On any rank an image cannot be used; a snapshot is saved first.
        """
        if not self._links:
            return
        decays = [link.decay for link in self._links]
        error = None
        while True:
            try:
                error = self._recompute()
                break
            except MemoryError:  # that of CuPy and of the engine, too
                if self._batchsize == 1:
                    raise
                self._batchsize = (self._batchsize + 1) // 2
            finally:
                for link, decay in zip(self._links, decays, strict=True):
                    link.decay = decay
        try:
            self._world.agree(error)
        except InputError:
            self._save(trainer)
            raise

    def _recompute(self) -> str | None:
        for link in self._links:
            link.avg_mean.fill(0)
            link.avg_var.fill(1)
        reporter = chainer.Reporter()  # what is reported here is nobody's result
        reporter.add_observer("recompute", self._model)
        for start in range(0, self._n, self._batchsize):
            batch = [self._images[i] for i in range(start, min(start + self._batchsize, self._n))]
            error = first_error(batch)
            if error is not None:
                return error
            x, t = to_arrays(batch, self._device)
            for link in self._links:
                link.decay = start / (start + len(batch))  # the mean over all images so far
            with (
                reporter.scope({}),
                chainer.using_config("train", False),  # no dropout
                chainer.no_backprop_mode(),
                _BatchStatistics(),
                _limited(len(batch)),
            ):
                self._model(x, t)
        return None


class _BatchStatistics(chainer.LinkHook):
    """Lets batch normalization, and nothing else, act as in training."""

    name = "BatchStatistics"

    def forward_preprocess(self, args: Any) -> None:
        if isinstance(args.link, L.BatchNormalization):
            chainer.config.train = True

    def forward_postprocess(self, args: Any) -> None:
        if isinstance(args.link, L.BatchNormalization):
            chainer.config.train = False


class AverageStatistics(training.Extension):
    """Averages the model's persistent arrays over the ranks, before validation.

    Each rank has running means and variances of batch normalization of its own images. Averaged,
    they are those of all images, and rank 0's, which is validated and saved, is as good as any
    (Akiba et al. 2017, arXiv:1711.04325).

    Args:
        model: The model.
        world: The ranks.
    """

    priority = training.extension.PRIORITY_WRITER + 1  # before the evaluator
    name = "AverageStatistics"

    def __init__(self, model: chainer.Chain, world: World) -> None:
        self._model = model
        self._world = world

    def __call__(self, trainer: training.Trainer | None = None) -> None:
        """Averages in place. Collective."""
        arrays = [
            value
            for _, link in sorted(self._model.namedlinks())
            for name in sorted(link._persistent)
            if isinstance(value := link.__dict__[name], chainer.get_array_types())
            and value.dtype.kind == "f"
        ]
        if not arrays:
            return
        flat = [chainer.get_device("@numpy").send(array).ravel() for array in arrays]
        mean = self._world.sum(numpy.concatenate(flat)) / self._world.size
        ends = numpy.cumsum([array.size for array in arrays])[:-1]
        for array, values in zip(arrays, numpy.split(mean, ends), strict=True):
            device = chainer.backend.get_device_from_array(array)
            array[...] = device.send(values.reshape(array.shape).astype(array.dtype))
