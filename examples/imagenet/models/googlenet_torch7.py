"""GoogLeNet as in Torch7's ImageNet programs: the modules of arXiv:1502.03167 without normalization.

Two 3x3 convolutions stand for the 5x5 one, 2x2 convolutions of stride 2 for two of the poolings, and
there is one auxiliary classifier. The weights begin with variance 1 / fan-in, as in Caffe's GoogLeNet: with He's
initialization the activations grow from module to module, and the loss begins at 400.
"""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
from chainer import Variable

from models.common import ImageClassifier, global_average
from models.googlenetbn import auxiliary_pool
from models.layers import Stage


class ConvReLU(chainer.Chain):
    """A convolution that keeps the size of the map, and ReLU."""

    def __init__(self, in_size: int, out_size: int, ksize: int) -> None:
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(in_size, out_size, ksize, pad=ksize // 2)

    def forward(self, x: Variable) -> Variable:
        return F.relu(self.conv(x))


class Module(chainer.Chain):
    """Branches whose maps are joined.

    Args:
        in_size: Channels of the input.
        single: Channels of the branch of one 1x1 convolution; 0: there is none.
        three: Channels of the 1x1 and the 3x3 convolution of the second branch.
        double: Channels of the 1x1 and the two 3x3 convolutions of the third.
        pooling: ``avg`` or ``max``, 3x3 with stride 1, begins the fourth.
        projected: Channels of the 1x1 convolution after it; 0: there is none.
    """

    def __init__(
        self,
        in_size: int,
        single: int,
        three: tuple[int, int],
        double: tuple[int, int],
        pooling: str,
        projected: int,
    ) -> None:
        super().__init__()
        self.pool = F.average_pooling_2d if pooling == "avg" else F.max_pooling_2d
        self.out_size = single + three[1] + double[1] + (projected or in_size)
        with self.init_scope():
            self.single = ConvReLU(in_size, single, 1) if single else None
            self.three = Stage(ConvReLU(in_size, three[0], 1), ConvReLU(*three, 3))
            self.double = Stage(
                ConvReLU(in_size, double[0], 1),
                ConvReLU(*double, 3),
                ConvReLU(double[1], double[1], 3),
            )
            self.projected = ConvReLU(in_size, projected, 1) if projected else None

    def forward(self, x: Variable) -> Variable:
        pooled = self.pool(x, 3, 1, 1)
        maps = [self.three(x), self.double(x)]
        maps.append(self.projected(pooled) if self.projected else pooled)
        return F.concat(([self.single(x)] if self.single else []) + maps)


class GoogLeNetTorch7(ImageClassifier):
    """Nine modules; any size from 63 pixels has the same parameters.

    The poolings before the classifiers follow the size of their input; at 224 pixels they are 5x5 with
    stride 3, and 7x7.
    """

    # the auxiliary classifier needs a map of 4x4
    insize_min = 63

    def __init__(self, insize: int = 224, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        with self.init_scope():
            self.conv1 = L.Convolution2D(3, 64, 7, 2, 3)
            self.conv2 = Stage(ConvReLU(64, 64, 1), ConvReLU(64, 192, 3))
            self.inc3 = Stage(
                Module(192, 64, (64, 64), (64, 96), "avg", 32),
                Module(256, 64, (64, 96), (64, 96), "avg", 64),
                Module(320, 0, (128, 160), (64, 96), "max", 0),
            )
            self.conv3 = L.Convolution2D(576, 576, 2, 2)
            self.inc4 = Stage(
                Module(576, 224, (64, 96), (96, 128), "avg", 128),
                Module(576, 192, (96, 128), (96, 128), "avg", 128),
                Module(576, 160, (128, 160), (128, 160), "avg", 96),
                Module(576, 96, (128, 192), (160, 192), "avg", 96),
            )
            self.inc4e = Module(576, 0, (128, 192), (192, 256), "max", 0)
            self.conv4 = L.Convolution2D(1024, 1024, 2, 2)
            self.inc5 = Stage(
                Module(1024, 352, (192, 320), (160, 224), "avg", 128),
                Module(1024, 352, (192, 320), (192, 224), "max", 128),
            )
            self.fc = L.Linear(1024, n_classes)

            self.auxiliary_conv = L.Convolution2D(576, 128, 1)
            self.auxiliary_fc1 = L.Linear(128 * 4 * 4, 768)
            self.auxiliary_fc2 = L.Linear(768, n_classes)

    def forward(self, x: Variable, t: Variable) -> Variable:
        h = F.max_pooling_2d(F.relu(self.conv1(x)), 3, 2)
        h = F.max_pooling_2d(self.conv2(h), 3, 2)
        h = self.inc4(self.conv3(self.inc3(h)))

        a = F.average_pooling_2d(h, *auxiliary_pool(h.shape[2]))
        a = F.relu(self.auxiliary_fc1(self.auxiliary_conv(a)))
        a = self.auxiliary_fc2(a)

        h = self.inc5(self.conv4(self.inc4e(h)))
        return self.classify_with_auxiliaries(self.fc(global_average(h)), (a,), t)
