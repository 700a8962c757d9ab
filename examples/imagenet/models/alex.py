"""AlexNet (Krizhevsky et al. 2012), not divided into two groups of channels."""

from __future__ import annotations

import chainer.functions as F
import chainer.links as L
from chainer import Variable

from models.common import ImageClassifier, grid_average


class Alex(ImageClassifier):
    """Five convolutions and three fully connected layers.

    The feature map before ``fc6`` is 6x6 at 224 and 227 pixels. Larger inputs are averaged to
    6x6 there, so that the parameters stay the same; smaller ones make ``fc6`` smaller.
    """

    insize_min = 39

    def __init__(self, insize: int = 227, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        with self.init_scope():
            self.conv1 = L.Convolution2D(None, 96, 11, stride=4)
            self.conv2 = L.Convolution2D(None, 256, 5, pad=2)
            self.conv3 = L.Convolution2D(None, 384, 3, pad=1)
            self.conv4 = L.Convolution2D(None, 384, 3, pad=1)
            self.conv5 = L.Convolution2D(None, 256, 3, pad=1)
            self.fc6 = L.Linear(None, 4096)
            self.fc7 = L.Linear(None, 4096)
            self.fc8 = L.Linear(None, n_classes)

    def forward(self, x: Variable, t: Variable) -> Variable:
        h = x
        for conv in (self.conv1, self.conv2):
            h = F.max_pooling_2d(F.local_response_normalization(F.relu(conv(h))), 3, stride=2)
        h = F.relu(self.conv4(F.relu(self.conv3(h))))
        h = F.max_pooling_2d(F.relu(self.conv5(h)), 3, stride=2)
        h = grid_average(h, min(6, h.shape[2]))
        h = F.dropout(F.relu(self.fc6(h)))
        h = F.dropout(F.relu(self.fc7(h)))
        return self.classify(self.fc8(h), t)
