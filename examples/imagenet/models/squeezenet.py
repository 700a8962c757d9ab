"""SqueezeNet 1.0 with simple bypass (Iandola et al. 2016, arXiv:1602.07360).

The weights begin as its authors' do: with variance 1 / fan-in, those of the last convolution 0.01 ** 2.
"""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
from chainer import Variable, initializers

from models.common import global_average
from models.layers import ScoredClassifier


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
            self.squeeze = L.Convolution2D(in_size, squeeze, 1)
            self.expand1 = L.Convolution2D(squeeze, expand, 1)
            self.expand3 = L.Convolution2D(squeeze, expand, 3, pad=1)

    def forward(self, x: Variable) -> Variable:
        h = F.relu(self.squeeze(x))
        return F.relu(F.concat((self.expand1(h), self.expand3(h))))


class SqueezeNet(ScoredClassifier):
    """Eight fire modules; every second one is bypassed. Any size from 21 pixels works."""

    insize_min = 21

    def __init__(self, insize: int = 224, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        with self.init_scope():
            self.conv1 = L.Convolution2D(3, 96, 7, 2)
            self.fire2 = Fire(96, 16, 64)
            self.fire3 = Fire(128, 16, 64)
            self.fire4 = Fire(128, 32, 128)
            self.fire5 = Fire(256, 32, 128)
            self.fire6 = Fire(256, 48, 192)
            self.fire7 = Fire(384, 48, 192)
            self.fire8 = Fire(384, 64, 256)
            self.fire9 = Fire(512, 64, 256)
            self.conv10 = L.Convolution2D(512, n_classes, 1, initialW=initializers.Normal(0.01))

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
