"""Residual networks for 32 pixels: three stages of n blocks, whose maps halve from 32 to 8.

ResNet (arXiv:1512.03385) with 6n+2 layers and projecting shortcuts, PreResNet (arXiv:1603.05027) with
9n+2 in bottlenecks, ResNeXt-29 (arXiv:1611.05431), Wide ResNet (arXiv:1605.07146) with 6n+4, and the
small AlexNet that is trained beside them. The average of the last map is classified, so any size
from 4 pixels works.
"""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
from chainer import Variable

from models.common import global_average, grid_average
from models.layers import ConvBN, ScoredClassifier, Stage, convolution, max_pool


class ResidualBlock(chainer.Chain):
    """Convolutions with batch normalization beside a shortcut, added before the last ReLU.

    Args:
        in_size: Channels of the input.
        middle: Channels of the 3x3 convolution of a bottleneck; None: two 3x3 convolutions.
        out_size: Channels of the output.
        stride: Stride of the first 3x3 convolution.
        groups: Groups of a bottleneck's 3x3 convolution.
    """

    def __init__(
        self, in_size: int, middle: int | None, out_size: int, stride: int, groups: int = 1
    ) -> None:
        super().__init__()
        with self.init_scope():
            if middle is None:
                self.body = Stage(
                    ConvBN(in_size, out_size, 3, stride, 1),
                    ConvBN(out_size, out_size, 3, 1, 1, activate=False),
                )
            else:
                self.body = Stage(
                    ConvBN(in_size, middle, 1),
                    ConvBN(middle, middle, 3, stride, 1, groups=groups),
                    ConvBN(middle, out_size, 1, activate=False),
                )
            self.projects = stride != 1 or in_size != out_size
            if self.projects:
                self.shortcut = ConvBN(in_size, out_size, 1, stride, activate=False)

    def forward(self, x: Variable) -> Variable:
        return F.relu(self.body(x) + (self.shortcut(x) if self.projects else x))


class PreBottleneck(chainer.Chain):
    """Normalization and ReLU before each of a 1x1, a 3x3 and a 1x1 convolution."""

    def __init__(self, in_size: int, middle: int, out_size: int, stride: int) -> None:
        super().__init__()
        with self.init_scope():
            self.bn1 = L.BatchNormalization(in_size)
            self.conv1 = convolution(in_size, middle, 1)
            self.bn2 = L.BatchNormalization(middle)
            self.conv2 = convolution(middle, middle, 3, stride, 1)
            self.bn3 = L.BatchNormalization(middle)
            self.conv3 = convolution(middle, out_size, 1)
            self.projects = stride != 1 or in_size != out_size
            if self.projects:
                self.shortcut = convolution(in_size, out_size, 1, stride)

    def forward(self, x: Variable) -> Variable:
        h = self.conv1(F.relu(self.bn1(x)))
        h = self.conv2(F.relu(self.bn2(h)))
        h = self.conv3(F.relu(self.bn3(h)))
        return h + (self.shortcut(x) if self.projects else x)


class WideBlock(chainer.Chain):
    """Normalization and ReLU before each of two 3x3 convolutions; a projection shares the first."""

    def __init__(self, in_size: int, out_size: int, stride: int) -> None:
        super().__init__()
        with self.init_scope():
            self.bn1 = L.BatchNormalization(in_size)
            self.conv1 = convolution(in_size, out_size, 3, stride, 1)
            self.bn2 = L.BatchNormalization(out_size)
            self.conv2 = convolution(out_size, out_size, 3, 1, 1)
            self.projects = in_size != out_size
            if self.projects:
                self.shortcut = convolution(in_size, out_size, 1, stride)

    def forward(self, x: Variable) -> Variable:
        h = F.relu(self.bn1(x))
        shortcut = self.shortcut(h) if self.projects else x
        return self.conv2(F.relu(self.bn2(self.conv1(h)))) + shortcut


class CifarNet(ScoredClassifier):
    """First convolution, three stages and a linear classifier.

    Attributes:
        n: Number of blocks of each stage.
        widths: Channels of the first convolution and of each stage's output.
        preactivated: Whether the blocks begin with a normalization: then one follows the last.
    """

    insize_min = 4
    n: int
    widths: tuple[int, int, int, int]
    preactivated = False

    def __init__(self, insize: int = 32, n_classes: int = 10) -> None:
        super().__init__(insize, n_classes)
        first = self.widths[0]
        with self.init_scope():
            self.first = convolution(3, first, 3, pad=1)
            self.bn = L.BatchNormalization(self.widths[-1] if self.preactivated else first)
            self.stages = chainer.ChainList()
            self.fc = L.Linear(self.widths[-1], n_classes)
        in_size = first
        for i, out_size in enumerate(self.widths[1:]):
            stage = Stage()
            for j in range(self.n):
                stage.append(self.block(i, in_size, out_size, 2 if i and not j else 1))
                in_size = out_size
            self.stages.append(stage)

    def block(self, stage: int, in_size: int, out_size: int, stride: int) -> chainer.Chain:
        """Returns a block of a stage (0 to 2)."""
        raise NotImplementedError

    def scores(self, x: Variable) -> Variable:
        h = self.first(x)
        if not self.preactivated:
            h = F.relu(self.bn(h))
        for stage in self.stages:
            h = stage(h)
        if self.preactivated:
            h = F.relu(self.bn(h))
        return self.fc(global_average(h))


class CifarResNet(CifarNet):
    """ResNet of 6n+2 layers."""

    widths = (16, 16, 32, 64)

    def block(self, stage: int, in_size: int, out_size: int, stride: int) -> chainer.Chain:
        return ResidualBlock(in_size, None, out_size, stride)


class PreResNet(CifarNet):
    """PreResNet of 9n+2 layers in bottlenecks."""

    widths = (16, 64, 128, 256)
    preactivated = True

    def block(self, stage: int, in_size: int, out_size: int, stride: int) -> chainer.Chain:
        return PreBottleneck(in_size, out_size // 4, out_size, stride)


class CifarResNeXt(CifarNet):
    """ResNeXt-29, of ``groups`` x 64d."""

    n = 3
    widths = (64, 256, 512, 1024)
    groups: int

    def block(self, stage: int, in_size: int, out_size: int, stride: int) -> chainer.Chain:
        return ResidualBlock(in_size, self.groups * 64 * 2**stage, out_size, stride, self.groups)


class WideResNet(CifarNet):
    """Wide ResNet of 6n+4 layers."""

    preactivated = True

    def block(self, stage: int, in_size: int, out_size: int, stride: int) -> chainer.Chain:
        return WideBlock(in_size, out_size, stride)


class CifarAlexNet(ScoredClassifier):
    """Five convolutions and one linear layer."""

    insize_min = 21

    def __init__(self, insize: int = 32, n_classes: int = 10) -> None:
        super().__init__(insize, n_classes)
        with self.init_scope():
            self.conv1 = convolution(3, 64, 11, 4, 5, bias=True)
            self.conv2 = convolution(64, 192, 5, pad=2, bias=True)
            self.conv3 = convolution(192, 384, 3, pad=1, bias=True)
            self.conv4 = convolution(384, 256, 3, pad=1, bias=True)
            self.conv5 = convolution(256, 256, 3, pad=1, bias=True)
            self.fc = L.Linear(256, n_classes)

    def scores(self, x: Variable) -> Variable:
        h = max_pool(F.relu(self.conv1(x)), 2, 2)
        h = max_pool(F.relu(self.conv2(h)), 2, 2)
        h = F.relu(self.conv4(F.relu(self.conv3(h))))
        h = F.relu(self.conv5(h))
        h = max_pool(h, 2, 2) if h.shape[2] > 1 else h
        return self.fc(grid_average(h, 1))


def _wide(depth: int, factor: int) -> type[WideResNet]:
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    return _named(WideResNet, f"{depth}x{factor}", n=(depth - 4) // 6, widths=widths)


def _named(base: type[CifarNet], suffix: object, **attributes: object) -> type[CifarNet]:
    contents = {"__doc__": base.__doc__, "__module__": __name__, **attributes}
    return type(f"{base.__name__}{suffix}", (base,), contents)


ARCHS: dict[str, type[ScoredClassifier]] = {
    "cifar_alexnet": CifarAlexNet,
    **{
        f"cifar_resnet{depth}": _named(CifarResNet, depth, n=(depth - 2) // 6)
        for depth in (20, 32, 44, 56, 110)
    },
    **{
        f"preresnet{depth}": _named(PreResNet, depth, n=(depth - 2) // 9)
        for depth in (11, 20, 29, 56, 110, 164, 290, 470, 650, 1001)
    },
    **{
        f"cifar_resnext29_{groups}x64d": _named(CifarResNeXt, groups, groups=groups)
        for groups in (8, 16)
    },
    **{f"wrn{depth}_{k}": _wide(depth, k) for depth, k in ((16, 8), (28, 10), (40, 4))},
}
