"""OverFeat, the fast model (Sermanet et al. 2013, arXiv:1312.6229), as for 224 pixels."""

from __future__ import annotations

import chainer.functions as F
import chainer.links as L
from chainer import Variable

from models.common import grid_average
from models.layers import ScoredClassifier, convolution, max_pool, pooled_side

CELLS = 5
"""Side of the map before the first fully connected layer at 224 pixels."""


def side(insize: int) -> int:
    """Returns the side of the last map for images of side ``insize``."""
    n = pooled_side((insize - 11) // 4 + 1, 2, 2)
    n = pooled_side(n - 4, 2, 2)
    return pooled_side(n, 2, 2)


class OverFeat(ScoredClassifier):
    """Five convolutions and three fully connected layers, of which dropout is before two.

    Larger inputs are averaged to 5x5 before the first of them, so that the parameters stay the
    same; smaller ones make it smaller.
    """

    insize_min = 71

    def __init__(self, insize: int = 224, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        self.cells = min(CELLS, side(insize))
        with self.init_scope():
            self.conv1 = convolution(3, 96, 11, 4, bias=True)
            self.conv2 = convolution(96, 256, 5, bias=True)
            self.conv3 = convolution(256, 512, 3, pad=1, bias=True)
            self.conv4 = convolution(512, 1024, 3, pad=1, bias=True)
            self.conv5 = convolution(1024, 1024, 3, pad=1, bias=True)
            self.fc6 = L.Linear(1024 * self.cells**2, 3072)
            self.fc7 = L.Linear(3072, 4096)
            self.fc8 = L.Linear(4096, n_classes)

    def scores(self, x: Variable) -> Variable:
        h = max_pool(F.relu(self.conv1(x)), 2, 2)
        h = max_pool(F.relu(self.conv2(h)), 2, 2)
        h = F.relu(self.conv4(F.relu(self.conv3(h))))
        h = max_pool(F.relu(self.conv5(h)), 2, 2)
        h = grid_average(h, self.cells)
        h = F.relu(self.fc6(F.dropout(h)))
        h = F.relu(self.fc7(F.dropout(h)))
        return self.fc8(h)
