"""Residual networks for ImageNet: ResNet (arXiv:1512.03385) and ResNeXt (arXiv:1611.05431).

``resnet50`` and ``resnext50`` are Chainer's two examples, which differ in which convolution of a block
has the stride: ResNet-50's first 1x1 (as in the paper), ResNeXt-50's 3x3. Both are kept. The others
have it in the 3x3 ("v1.5"), and no bias before the first normalization: their numbers of parameters
are the published ones. ``resnet50v15`` is ResNet-50 of that kind.
"""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
from chainer import Variable, initializers

from models.common import ImageClassifier, global_average


class BasicBlock(chainer.Chain):
    """Two 3x3 convolutions beside a shortcut.

    Args:
        in_size: Channels of the input.
        ch: Not used: the convolutions have the channels of the output.
        out_size: Channels of the output.
        stride: Stride of the first convolution.
        groups, stride_at_3x3: Not used.
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
        stride_at_3x3: bool = True,
        project: bool = False,
    ) -> None:
        super().__init__()
        init = initializers.HeNormal()
        with self.init_scope():
            self.conv1 = L.Convolution2D(in_size, out_size, 3, stride, 1, True, init)
            self.bn1 = L.BatchNormalization(out_size)
            self.conv2 = L.Convolution2D(out_size, out_size, 3, 1, 1, True, init)
            self.bn2 = L.BatchNormalization(out_size)
            if project:
                self.conv3 = L.Convolution2D(in_size, out_size, 1, stride, 0, True, init)
                self.bn3 = L.BatchNormalization(out_size)
        self.project = project

    def forward(self, x: Variable) -> Variable:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        shortcut = self.bn3(self.conv3(x)) if self.project else x
        return F.relu(h + shortcut)


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
    """A stage of blocks; the first one changes size and channels."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        n_layers: int,
        in_size: int,
        ch: int,
        out_size: int,
        stride: int,
        groups: int,
        stride_at_3x3: bool,
    ) -> None:
        project = stride != 1 or in_size != out_size
        super().__init__(
            block(
                in_size, ch, out_size, stride, groups, stride_at_3x3=stride_at_3x3, project=project
            ),
            *(block(out_size, ch, out_size, groups=groups) for _ in range(n_layers - 1)),
        )

    def forward(self, x: Variable) -> Variable:
        for layer in self:
            x = layer(x)
        return x


class ResidualNet(ImageClassifier):
    """A residual network of four stages; the last average covers the whole feature map.

    Attributes:
        layers: Number of blocks of each stage.
        block: What the stages are made of.
        width: Channels of the first stage's 3x3 convolutions, doubled by each stage.
        groups: Groups of those convolutions.
        stride_at_3x3: Whether the 3x3 convolution has the stride rather than the first 1x1.
        conv1_bias: Whether the first convolution has a bias.
    """

    # The first pooling (3, stride 2) needs two values; from 32 pixels on each stage has an input.
    insize_min = 32
    layers: tuple[int, int, int, int]
    block: type[BasicBlock] | type[Bottleneck] = Bottleneck
    width = 64
    groups = 1
    stride_at_3x3 = True
    conv1_bias = False

    def __init__(self, insize: int = 224, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        n2, n3, n4, n5 = self.layers
        ch = self.width
        out = 256 if self.block is Bottleneck else 64
        rest = (self.groups, self.stride_at_3x3)
        with self.init_scope():
            self.conv1 = L.Convolution2D(
                3, 64, 7, 2, 3, nobias=not self.conv1_bias, initialW=initializers.HeNormal()
            )
            self.bn1 = L.BatchNormalization(64)
            self.res2 = Block(self.block, n2, 64, ch, out, 1, *rest)
            self.res3 = Block(self.block, n3, out, 2 * ch, 2 * out, 2, *rest)
            self.res4 = Block(self.block, n4, 2 * out, 4 * ch, 4 * out, 2, *rest)
            self.res5 = Block(self.block, n5, 4 * out, 8 * ch, 8 * out, 2, *rest)
            self.fc = L.Linear(8 * out, n_classes)

    def forward(self, x: Variable, t: Variable) -> Variable:
        h = F.max_pooling_2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2)
        h = self.res5(self.res4(self.res3(self.res2(h))))
        return self.classify(self.fc(global_average(h)), t)


class ResNet50(ResidualNet):
    """ResNet-50 of Chainer's example."""

    layers = (3, 4, 6, 3)
    stride_at_3x3 = False
    conv1_bias = True


class ResNeXt50(ResidualNet):
    """ResNeXt-50 (32x4d) of Chainer's example."""

    layers = (3, 4, 6, 3)
    width = 128
    groups = 32
    conv1_bias = True


class ResNet18(ResidualNet):
    """ResNet-18."""

    layers = (2, 2, 2, 2)
    block = BasicBlock


class ResNet34(ResidualNet):
    """ResNet-34."""

    layers = (3, 4, 6, 3)
    block = BasicBlock


class ResNet50V15(ResidualNet):
    """ResNet-50 whose blocks have their stride in the 3x3 convolution."""

    layers = (3, 4, 6, 3)


class ResNet101(ResidualNet):
    """ResNet-101."""

    layers = (3, 4, 23, 3)


class ResNet152(ResidualNet):
    """ResNet-152."""

    layers = (3, 8, 36, 3)


class ResNet200(ResidualNet):
    """ResNet-200, with the blocks of the others (not pre-activated)."""

    layers = (3, 24, 36, 3)


class ResNeXt101(ResNet101):
    """ResNeXt-101 (32x4d)."""

    width = 128
    groups = 32


class ResNeXt101Wide(ResNet101):
    """ResNeXt-101 (32x8d)."""

    width = 256
    groups = 32


class ResNeXt152(ResNet152):
    """ResNeXt-152 (32x4d)."""

    width = 128
    groups = 32


ARCHS: dict[str, type[ResidualNet]] = {
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "resnet50v15": ResNet50V15,
    "resnet101": ResNet101,
    "resnet152": ResNet152,
    "resnet200": ResNet200,
    "resnext50": ResNeXt50,
    "resnext101": ResNeXt101,
    "resnext101_32x8d": ResNeXt101Wide,
    "resnext152": ResNeXt152,
}
