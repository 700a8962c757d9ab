"""GoogLeNet (Szegedy et al. 2014, arXiv:1409.4842) whose poolings scale with the input."""

from __future__ import annotations

import chainer.functions as F
import chainer.links as L
from chainer import Variable

from models.common import ImageClassifier


class GoogLeNet(ImageClassifier):
    """Nine inception modules and two auxiliary classifiers.

    For an input of m x 224 pixels the auxiliary average poolings have kernel 5m and stride 3m and
    the last one kernel 7m and stride m: they give 4x4 and 1x1 for every m, so the number of
    parameters does not change.
    """

    insize_min = 224
    insize_multiple = 224

    def __init__(self, insize: int = 224, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        with self.init_scope():
            self.conv1 = L.Convolution2D(None, 64, 7, stride=2, pad=3)
            self.conv2_reduce = L.Convolution2D(None, 64, 1)
            self.conv2 = L.Convolution2D(None, 192, 3, stride=1, pad=1)
            self.inc3a = L.Inception(None, 64, 96, 128, 16, 32, 32)
            self.inc3b = L.Inception(None, 128, 128, 192, 32, 96, 64)
            self.inc4a = L.Inception(None, 192, 96, 208, 16, 48, 64)
            self.inc4b = L.Inception(None, 160, 112, 224, 24, 64, 64)
            self.inc4c = L.Inception(None, 128, 128, 256, 24, 64, 64)
            self.inc4d = L.Inception(None, 112, 144, 288, 32, 64, 64)
            self.inc4e = L.Inception(None, 256, 160, 320, 32, 128, 128)
            self.inc5a = L.Inception(None, 256, 160, 320, 32, 128, 128)
            self.inc5b = L.Inception(None, 384, 192, 384, 48, 128, 128)
            self.loss3_fc = L.Linear(None, n_classes)

            self.loss1_conv = L.Convolution2D(None, 128, 1)
            self.loss1_fc1 = L.Linear(None, 1024)
            self.loss1_fc2 = L.Linear(None, n_classes)

            self.loss2_conv = L.Convolution2D(None, 128, 1)
            self.loss2_fc1 = L.Linear(None, 1024)
            self.loss2_fc2 = L.Linear(None, n_classes)

    def _auxiliary(self, h: Variable, conv: L.Convolution2D, fc1: L.Linear, fc2: L.Linear):
        m = self.insize // 224
        h = F.average_pooling_2d(h, 5 * m, stride=3 * m)
        return fc2(F.relu(fc1(F.relu(conv(h)))))

    def forward(self, x: Variable, t: Variable) -> Variable:
        m = self.insize // 224
        h = F.max_pooling_2d(F.relu(self.conv1(x)), 3, stride=2)
        h = F.local_response_normalization(h, n=5)
        h = F.relu(self.conv2(F.relu(self.conv2_reduce(h))))
        h = F.max_pooling_2d(F.local_response_normalization(h, n=5), 3, stride=2)

        h = self.inc3b(self.inc3a(h))
        h = self.inc4a(F.max_pooling_2d(h, 3, stride=2))
        scores1 = self._auxiliary(h, self.loss1_conv, self.loss1_fc1, self.loss1_fc2)
        h = self.inc4d(self.inc4c(self.inc4b(h)))
        scores2 = self._auxiliary(h, self.loss2_conv, self.loss2_fc1, self.loss2_fc2)
        h = F.max_pooling_2d(self.inc4e(h), 3, stride=2)
        h = self.inc5b(self.inc5a(h))

        h = F.average_pooling_2d(h, 7 * m, stride=m)
        h = self.loss3_fc(F.dropout(h, 0.4))
        return self.classify_with_auxiliaries(h, (scores1, scores2), t)
