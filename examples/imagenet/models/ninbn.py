"""Network in Network (arXiv:1312.4400) with batch normalization and a linear classifier."""

from __future__ import annotations

import chainer.links as L
from chainer import Variable

from models.common import global_average
from models.layers import ConvBN, ScoredClassifier, Stage, max_pool


def block(in_size: int, out_size: int, ksize: int, stride: int, pad: int) -> Stage:
    """Returns a convolution and two 1x1 convolutions, each with batch normalization."""
    return Stage(
        ConvBN(in_size, out_size, ksize, stride, pad, bias=True, eps=1e-3),
        ConvBN(out_size, out_size, 1, bias=True, eps=1e-3),
        ConvBN(out_size, out_size, 1, bias=True, eps=1e-3),
    )


class NINBN(ScoredClassifier):
    """Four blocks; the average over the image is classified, so any size works."""

    def __init__(self, insize: int = 224, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        with self.init_scope():
            self.block1 = block(3, 96, 11, 4, 5)
            self.block2 = block(96, 256, 5, 1, 2)
            self.block3 = block(256, 384, 3, 1, 1)
            self.block4 = block(384, 1024, 3, 1, 1)
            self.fc = L.Linear(1024, n_classes)

    def scores(self, x: Variable) -> Variable:
        h = x
        for part in (self.block1, self.block2, self.block3):
            h = max_pool(part(h), 3, 2, pad=1)
        return self.fc(global_average(self.block4(h)))
