"""What the networks share: reporting, and poolings that follow the input's size."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import chainer
import chainer.functions as F
from chainer import Variable
from losses import full_precision, softmax_cross_entropy


class ImageClassifier(chainer.Chain):
    """Base of the networks.

    Attributes:
        insize: Height and width of the input in pixels.
        n_classes: Number of outputs.
    """

    insize_min = 1
    insize_multiple = 1

    def __init__(self, insize: int, n_classes: int) -> None:
        super().__init__()
        self.insize = insize
        self.n_classes = n_classes
        self._seen: list[Variable] | None = None

    def predict(self, x: Any) -> Variable:
        """Returns the scores (batch, n_classes) of images x (batch, 3, insize, insize).

        Of GoogLeNet's three classifiers it is the last one's. Use it in test mode.
        """
        labels = self.xp.zeros(len(x), dtype="i")
        reporter = chainer.Reporter()  # what is reported here is nobody's result
        reporter.add_observer("predict", self)
        with self.seeing() as seen, reporter.scope({}):
            self(x, labels)
        return seen[-1]

    @contextlib.contextmanager
    def seeing(self) -> Iterator[list[Variable]]:
        """Gives a list to which each forward pass adds its scores (batch, n_classes), the last one's last."""
        self._seen = []
        try:
            yield self._seen
        finally:
            self._seen = None

    def _see(self, h: Variable) -> None:
        if self._seen is not None:
            self._seen.append(h)

    def classify(self, h: Variable, t: Variable) -> Variable:
        """Reports loss and accuracy of the scores ``h`` (batch, n_classes); returns the loss."""
        self._see(h)
        loss = softmax_cross_entropy(h, t)
        chainer.report({"loss": loss, "accuracy": F.accuracy(full_precision(h), t)}, self)
        return loss

    def classify_with_auxiliaries(
        self, h: Variable, auxiliaries: Sequence[Variable], t: Variable
    ) -> Variable:
        """Like ``classify`` with GoogLeNet's auxiliary scores, weighted 0.3 each.

        Also reports the single losses: loss1 and so on, the last one's last.
        """
        self._see(h)
        losses = [softmax_cross_entropy(scores, t) for scores in (*auxiliaries, h)]
        loss = 0.3 * functools.reduce(operator.add, losses[:-1]) + losses[-1]
        report = {f"loss{i}": value for i, value in enumerate(losses, 1)}
        report |= {"loss": loss, "accuracy": F.accuracy(full_precision(h), t)}
        chainer.report(report, self)
        return loss


def global_average(h: Variable) -> Variable:
    """Averages each feature map to one value: (batch, c, y, x) -> (batch, c, 1, 1)."""
    return F.average_pooling_2d(h, h.shape[2:], stride=1)


def grid_average(h: Variable, cells: int) -> Variable:
    """Averages square feature maps of side n >= cells to ``cells`` x ``cells``.

    The stride is n // cells and the windows cover the map from edge to edge. Side ``cells`` is
    returned as it is, so a network keeps its parameters and, at its own size, its values.
    """
    n = h.shape[2]
    if n == cells:
        return h
    stride = n // cells
    return F.average_pooling_2d(h, n - stride * (cells - 1), stride=stride)
