"""What the networks share: reporting, and poolings that follow the input's size."""

from __future__ import annotations

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

    def classify(self, h: Variable, t: Variable) -> Variable:
        """Reports loss and accuracy of the scores ``h`` (batch, n_classes); returns the loss."""
        loss = softmax_cross_entropy(h, t)
        chainer.report({"loss": loss, "accuracy": F.accuracy(full_precision(h), t)}, self)
        return loss

    def classify_with_auxiliaries(
        self, h: Variable, auxiliaries: tuple[Variable, Variable], t: Variable
    ) -> Variable:
        """Like ``classify`` with GoogLeNet's two auxiliary scores, weighted 0.3 each."""
        loss1, loss2 = (softmax_cross_entropy(scores, t) for scores in auxiliaries)
        loss3 = softmax_cross_entropy(h, t)
        loss = 0.3 * (loss1 + loss2) + loss3
        chainer.report(
            {
                "loss": loss,
                "loss1": loss1,
                "loss2": loss2,
                "loss3": loss3,
                "accuracy": F.accuracy(full_precision(h), t),
            },
            self,
        )
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
