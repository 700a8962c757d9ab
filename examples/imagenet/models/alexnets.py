"""AlexNet in the forms of Torch7's ImageNet programs.

``alexnet`` has the two columns of Krizhevsky et al. 2012, which meet only at the first fully
connected layer. The others are the single column of arXiv:1404.5997 ("one weird trick"): plain, with
batch normalization, and with an average in place of the fully connected layers.
"""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
from chainer import Variable

from models.common import global_average, grid_average
from models.layers import ConvBN, ScoredClassifier, convolution, max_pool, pooled_side

CELLS = 6
"""Side of the map before the first fully connected layer at 224 pixels."""


class Features(chainer.Chain):
    """Five convolutions and three poolings; 6x6 at 224 pixels.

    Args:
        widths: Channels of the convolutions.
        groups: Columns that all convolutions but the first keep apart.
        normalize: Whether batch normalization follows each convolution.
    """

    def __init__(self, widths: tuple[int, ...], groups: int = 1, normalize: bool = False) -> None:
        super().__init__()
        shapes = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
        with self.init_scope():
            self.convs = chainer.ChainList()
        in_size = 3
        for i, (out_size, (ksize, stride, pad)) in enumerate(zip(widths, shapes, strict=True)):
            g = groups if i else 1
            self.convs.append(
                ConvBN(in_size, out_size, ksize, stride, pad, groups=g, bias=True, eps=1e-3)
                if normalize
                else convolution(in_size, out_size, ksize, stride, pad, groups=g, bias=True)
            )
            in_size = out_size

    def forward(self, x: Variable) -> Variable:
        for i, conv in enumerate(self.convs):
            x = F.relu(conv(x)) if isinstance(conv, L.Convolution2D) else conv(x)
            if i in (0, 1, 4):
                x = max_pool(x, 3, 2)
        return x

    @staticmethod
    def side(insize: int) -> int:
        """Returns the side of the last map for images of side ``insize``."""
        n = (insize + 4 - 11) // 4 + 1
        for _ in range(3):
            n = pooled_side(n, 3, 2)
        return n


class AlexNetOWT(ScoredClassifier):
    """One column and three fully connected layers, of which dropout is before two.

    Larger inputs are averaged to 6x6 before the first of them, so that the parameters stay the
    same; smaller ones make it smaller.
    """

    insize_min = 63
    widths = (64, 192, 384, 256, 256)
    groups = 1
    normalize = False

    def __init__(self, insize: int = 224, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        self.cells = min(CELLS, Features.side(insize))
        with self.init_scope():
            self.features = Features(self.widths, self.groups, self.normalize)
            self.fc6 = L.Linear(self.widths[-1] * self.cells**2, 4096)
            self.fc7 = L.Linear(4096, 4096)
            self.fc8 = L.Linear(4096, n_classes)
            if self.normalize:
                self.bn6 = L.BatchNormalization(4096, eps=1e-3)
                self.bn7 = L.BatchNormalization(4096, eps=1e-3)

    def scores(self, x: Variable) -> Variable:
        h = grid_average(self.features(x), self.cells)
        h = self.fc6(F.dropout(h))
        h = F.relu(self.bn6(h) if self.normalize else h)
        h = self.fc7(F.dropout(h))
        h = F.relu(self.bn7(h) if self.normalize else h)
        return self.fc8(h)


class AlexNet(AlexNetOWT):
    """Two columns."""

    widths = (96, 256, 384, 384, 256)
    groups = 2


class AlexNetOWTBN(AlexNetOWT):
    """One column, batch normalization everywhere."""

    normalize = True


class AlexNetBN(ScoredClassifier):
    """One column with batch normalization; the average of the last map is classified."""

    insize_min = 63

    def __init__(self, insize: int = 224, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        with self.init_scope():
            self.features = Features(AlexNetOWT.widths, normalize=True)
            self.bn = L.BatchNormalization(256, eps=1e-3)
            self.fc = L.Linear(256, n_classes)

    def scores(self, x: Variable) -> Variable:
        return self.fc(self.bn(global_average(self.features(x))))
