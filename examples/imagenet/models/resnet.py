"""Bottleneck residual networks: ResNet-50 (arXiv:1512.03385) and ResNeXt-50 (arXiv:1611.05431).

Chainer's two examples differ in which convolution of a block has the stride: ResNet-50's first
1x1 (as in the paper), ResNeXt-50's 3x3. Both are kept.
"""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
from chainer import Variable, initializers

from models.common import ImageClassifier, global_average


class Bottleneck(chainer.Chain):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut.

    Args:
        in_size: Channels of the input.
        ch: Channels of the 3x3 convolution.
        out_size: Channels of the output.
        stride: Stride of the block.
        groups: Groups of the 3x3 convolution.
        stride_at_3x3: Whether the 3x3 convolution has the stride rather than the first 1x1.
        project: Whether the shortcut is a 1x1 convolution (else the identity).
    """

    def __init__(
        self,
        in_size: int,
        ch: int,
        out_size: int,
        stride: int = 1,
        groups: int = 1,
        *,
        stride_at_3x3: bool = False,
        project: bool = False,
    ) -> None:
        super().__init__()
        init = initializers.HeNormal()
        stride1, stride2 = (1, stride) if stride_at_3x3 else (stride, 1)
        with self.init_scope():
            self.conv1 = L.Convolution2D(in_size, ch, 1, stride1, 0, initialW=init, nobias=True)
            self.bn1 = L.BatchNormalization(ch)
            self.conv2 = L.Convolution2D(
                ch, ch, 3, stride2, 1, initialW=init, nobias=True, groups=groups
            )
            self.bn2 = L.BatchNormalization(ch)
            self.conv3 = L.Convolution2D(ch, out_size, 1, 1, 0, initialW=init, nobias=True)
            self.bn3 = L.BatchNormalization(out_size)
            if project:
                self.conv4 = L.Convolution2D(
                    in_size, out_size, 1, stride, 0, initialW=init, nobias=True
                )
                self.bn4 = L.BatchNormalization(out_size)
        self.project = project

    def forward(self, x: Variable) -> Variable:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        shortcut = self.bn4(self.conv4(x)) if self.project else x
        return F.relu(h + shortcut)


class Block(chainer.ChainList):
    """A stage: one projecting bottleneck, then ``n_layers - 1`` with identity shortcuts."""

    def __init__(
        self,
        n_layers: int,
        in_size: int,
        ch: int,
        out_size: int,
        stride: int,
        groups: int,
        stride_at_3x3: bool,
    ) -> None:
        super().__init__(
            Bottleneck(
                in_size, ch, out_size, stride, groups, stride_at_3x3=stride_at_3x3, project=True
            ),
            *(Bottleneck(out_size, ch, out_size, groups=groups) for _ in range(n_layers - 1)),
        )

    def forward(self, x: Variable) -> Variable:
        for layer in self:
            x = layer(x)
        return x


class BottleneckNet(ImageClassifier):
    """A residual network of four stages; the last average covers the whole feature map."""

    # The first pooling (3, stride 2) needs two values; from 32 pixels on each stage has an input.
    insize_min = 32
    layers: tuple[int, int, int, int]
    width: int
    groups: int
    stride_at_3x3: bool

    def __init__(self, insize: int = 224, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        rest = {"groups": self.groups, "stride_at_3x3": self.stride_at_3x3}
        n2, n3, n4, n5 = self.layers
        ch = self.width
        with self.init_scope():
            self.conv1 = L.Convolution2D(3, 64, 7, 2, 3, initialW=initializers.HeNormal())
            self.bn1 = L.BatchNormalization(64)
            self.res2 = Block(n2, 64, ch, 256, 1, **rest)
            self.res3 = Block(n3, 256, 2 * ch, 512, 2, **rest)
            self.res4 = Block(n4, 512, 4 * ch, 1024, 2, **rest)
            self.res5 = Block(n5, 1024, 8 * ch, 2048, 2, **rest)
            self.fc = L.Linear(2048, n_classes)

    def forward(self, x: Variable, t: Variable) -> Variable:
        h = F.max_pooling_2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2)
        h = self.res5(self.res4(self.res3(self.res2(h))))
        return self.classify(self.fc(global_average(h)), t)


class ResNet50(BottleneckNet):
    """ResNet-50."""

    layers = (3, 4, 6, 3)
    width = 64
    groups = 1
    stride_at_3x3 = False


class ResNeXt50(BottleneckNet):
    """ResNeXt-50 (32x4d)."""

    layers = (3, 4, 6, 3)
    width = 128
    groups = 32
    stride_at_3x3 = True
