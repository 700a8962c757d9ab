"""DenseNet-BC (Huang et al. 2016, arXiv:1608.06993) for ImageNet and CIFAR."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
from chainer import Variable

from models.common import global_average
from models.layers import ScoredClassifier, convolution


class DenseLayer(chainer.Chain):
    """Adds ``growth`` channels, made by a 1x1 and a 3x3 convolution, to its input."""

    def __init__(self, in_size: int, growth: int) -> None:
        super().__init__()
        with self.init_scope():
            self.bn1 = L.BatchNormalization(in_size)
            self.conv1 = convolution(in_size, 4 * growth, 1)
            self.bn2 = L.BatchNormalization(4 * growth)
            self.conv2 = convolution(4 * growth, growth, 3, pad=1)

    def forward(self, x: Variable) -> Variable:
        h = self.conv1(F.relu(self.bn1(x)))
        return F.concat((x, self.conv2(F.relu(self.bn2(h)))))


class Transition(chainer.Chain):
    """Halves channels by a 1x1 convolution, then height and width by an average."""

    def __init__(self, in_size: int) -> None:
        super().__init__()
        with self.init_scope():
            self.bn = L.BatchNormalization(in_size)
            self.conv = convolution(in_size, in_size // 2, 1)

    def forward(self, x: Variable) -> Variable:
        return F.average_pooling_2d(self.conv(F.relu(self.bn(x))), 2)


class DenseBlocks(chainer.ChainList):
    """Dense blocks with transitions between them; the last one is normalized.

    Args:
        in_size: Channels of the input.
        growth: Channels that each layer adds.
        layers: Number of layers of each block.

    Attributes:
        out_size: Channels of the output.
    """

    def __init__(self, in_size: int, growth: int, layers: tuple[int, ...]) -> None:
        super().__init__()
        for i, n in enumerate(layers):
            for _ in range(n):
                self.append(DenseLayer(in_size, growth))
                in_size += growth
            if i < len(layers) - 1:
                self.append(Transition(in_size))
                in_size //= 2
        self.append(L.BatchNormalization(in_size))
        self.out_size = in_size

    def forward(self, x: Variable) -> Variable:
        for link in self:
            x = link(x)
        return F.relu(x)


class DenseNet(ScoredClassifier):
    """The network for ImageNet: any size from 32 pixels works."""

    insize_min = 32
    growth = 32
    first = 64
    layers: tuple[int, int, int, int]

    def __init__(self, insize: int = 224, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        with self.init_scope():
            self.conv = convolution(3, self.first, 7, 2, 3)
            self.bn = L.BatchNormalization(self.first)
            self.blocks = DenseBlocks(self.first, self.growth, self.layers)
            self.fc = L.Linear(self.blocks.out_size, n_classes)

    def scores(self, x: Variable) -> Variable:
        h = F.max_pooling_2d(F.relu(self.bn(self.conv(x))), 3, 2, 1, cover_all=False)
        return self.fc(global_average(self.blocks(h)))


class CifarDenseNet(ScoredClassifier):
    """The network for 32 pixels: three blocks of (depth - 4) / 6 layers; any size from 4 works."""

    insize_min = 4
    depth: int
    growth: int

    def __init__(self, insize: int = 32, n_classes: int = 10) -> None:
        super().__init__(insize, n_classes)
        n = (self.depth - 4) // 6
        with self.init_scope():
            self.conv = convolution(3, 2 * self.growth, 3, pad=1)
            self.blocks = DenseBlocks(2 * self.growth, self.growth, (n, n, n))
            self.fc = L.Linear(self.blocks.out_size, n_classes)

    def scores(self, x: Variable) -> Variable:
        return self.fc(global_average(self.blocks(self.conv(x))))


class DenseNet121(DenseNet):
    """DenseNet-121."""

    layers = (6, 12, 24, 16)


class DenseNet161(DenseNet):
    """DenseNet-161, of growth 48."""

    layers = (6, 12, 36, 24)
    growth = 48
    first = 96


class DenseNet169(DenseNet):
    """DenseNet-169."""

    layers = (6, 12, 32, 32)


class DenseNet201(DenseNet):
    """DenseNet-201."""

    layers = (6, 12, 48, 32)


class DenseNetBC100(CifarDenseNet):
    """DenseNet-BC of depth 100 and growth 12."""

    depth = 100
    growth = 12


class DenseNetBC190(CifarDenseNet):
    """DenseNet-BC of depth 190 and growth 40."""

    depth = 190
    growth = 40


ARCHS: dict[str, type[ScoredClassifier]] = {
    "densenet121": DenseNet121,
    "densenet161": DenseNet161,
    "densenet169": DenseNet169,
    "densenet201": DenseNet201,
    "densenet_bc100_12": DenseNetBC100,
    "densenet_bc190_40": DenseNetBC190,
}
