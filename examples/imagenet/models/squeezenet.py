"""SqueezeNet 1.0 with simple bypass (Iandola et al. 2016, arXiv:1602.07360)."""

from __future__ import annotations

import chainer
import chainer.functions as F
from chainer import Variable

from models.common import global_average
from models.layers import ScoredClassifier, convolution


class Fire(chainer.Chain):
    """A 1x1 convolution to few channels, then 1x1 and 3x3 ones side by side.

    Args:
        in_size: Channels of the input.
        squeeze: Channels of the first convolution.
        expand: Channels of each of the others.
    """

    def __init__(self, in_size: int, squeeze: int, expand: int) -> None:
        super().__init__()
        with self.init_scope():
            self.squeeze = convolution(in_size, squeeze, 1, bias=True)
            self.expand1 = convolution(squeeze, expand, 1, bias=True)
            self.expand3 = convolution(squeeze, expand, 3, pad=1, bias=True)

    def forward(self, x: Variable) -> Variable:
        h = F.relu(self.squeeze(x))
        return F.relu(F.concat((self.expand1(h), self.expand3(h))))


class SqueezeNet(ScoredClassifier):
    """Eight fire modules; every second one is bypassed. Any size from 21 pixels works."""

    insize_min = 21

    def __init__(self, insize: int = 224, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        with self.init_scope():
            self.conv1 = convolution(3, 96, 7, 2, bias=True)
            self.fire2 = Fire(96, 16, 64)
            self.fire3 = Fire(128, 16, 64)
            self.fire4 = Fire(128, 32, 128)
            self.fire5 = Fire(256, 32, 128)
            self.fire6 = Fire(256, 48, 192)
            self.fire7 = Fire(384, 48, 192)
            self.fire8 = Fire(384, 64, 256)
            self.fire9 = Fire(512, 64, 256)
            self.conv10 = convolution(512, n_classes, 1, bias=True)

    def scores(self, x: Variable) -> Variable:
        h = F.max_pooling_2d(F.relu(self.conv1(x)), 3, stride=2)
        h = self.fire2(h)
        h = self.fire4(h + self.fire3(h))
        h = F.max_pooling_2d(h, 3, stride=2)
        h = self.fire6(h + self.fire5(h))
        h = self.fire8(h + self.fire7(h))
        h = F.max_pooling_2d(h, 3, stride=2)
        h = F.dropout(h + self.fire9(h))
        h = global_average(F.relu(self.conv10(h)))
        return F.reshape(h, (len(h), self.n_classes))
