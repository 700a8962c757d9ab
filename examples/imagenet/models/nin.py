"""Network in Network (Lin et al. 2013, arXiv:1312.4400)."""

from __future__ import annotations

import chainer.functions as F
import chainer.links as L
from chainer import Variable, initializers

from models.common import ImageClassifier, global_average


class NIN(ImageClassifier):
    """Four blocks of one convolution and two 1x1 convolutions, averaged over the image.

    The last average covers the whole feature map, so any size from 39 pixels works with the
    same parameters.
    """

    # 39 -> 8 -> 4 -> 2 -> 1 (each pooling of 3, stride 2, needs at least 2 values)
    insize_min = 39

    def __init__(self, insize: int = 227, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        init = initializers.HeNormal()
        with self.init_scope():
            self.mlpconv1 = L.MLPConvolution2D(None, (96, 96, 96), 11, stride=4, conv_init=init)
            self.mlpconv2 = L.MLPConvolution2D(None, (256, 256, 256), 5, pad=2, conv_init=init)
            self.mlpconv3 = L.MLPConvolution2D(None, (384, 384, 384), 3, pad=1, conv_init=init)
            self.mlpconv4 = L.MLPConvolution2D(
                None, (1024, 1024, n_classes), 3, pad=1, conv_init=init
            )

    def forward(self, x: Variable, t: Variable) -> Variable:
        h = x
        for block in (self.mlpconv1, self.mlpconv2, self.mlpconv3):
            h = F.max_pooling_2d(F.relu(block(h)), 3, stride=2)
        h = global_average(self.mlpconv4(F.dropout(h)))
        return self.classify(F.reshape(h, (len(x), self.n_classes)), t)
