"""GoogLeNet with batch normalization (Ioffe and Szegedy 2015, arXiv:1502.03167)."""

from __future__ import annotations

import chainer.functions as F
import chainer.links as L
from chainer import Variable

from models.common import ImageClassifier


def auxiliary_pool(n: int) -> tuple[int, int]:
    """Returns kernel and stride of an average pooling that makes 4x4 of a map of side n >= 4.

    They grow in proportion to n and are 5 and 3 for the sides 14 and 15, as published.
    """
    stride = max(1, 3 * n // 14)
    kernel = max(n - 4 * stride + 1, min(5 * n // 14, n - 3 * stride))
    return kernel, stride


class GoogLeNetBN(ImageClassifier):
    """Ten inception modules with batch normalization and two auxiliary classifiers.

    The poolings before the classifiers follow the size of their input, so any size from 43 pixels
    works with the same parameters; at 224 pixels they are those of Chainer's example.
    """

    # the first auxiliary classifier needs a map of 4x4
    insize_min = 43

    def __init__(self, insize: int = 224, n_classes: int = 1000) -> None:
        super().__init__(insize, n_classes)
        with self.init_scope():
            self.conv1 = L.Convolution2D(None, 64, 7, stride=2, pad=3, nobias=True)
            self.norm1 = L.BatchNormalization(64)
            self.conv2 = L.Convolution2D(None, 192, 3, pad=1, nobias=True)
            self.norm2 = L.BatchNormalization(192)
            self.inc3a = L.InceptionBN(None, 64, 64, 64, 64, 96, "avg", 32)
            self.inc3b = L.InceptionBN(None, 64, 64, 96, 64, 96, "avg", 64)
            self.inc3c = L.InceptionBN(None, 0, 128, 160, 64, 96, "max", stride=2)
            self.inc4a = L.InceptionBN(None, 224, 64, 96, 96, 128, "avg", 128)
            self.inc4b = L.InceptionBN(None, 192, 96, 128, 96, 128, "avg", 128)
            self.inc4c = L.InceptionBN(None, 160, 128, 160, 128, 160, "avg", 128)
            self.inc4d = L.InceptionBN(None, 96, 128, 192, 160, 192, "avg", 128)
            self.inc4e = L.InceptionBN(None, 0, 128, 192, 192, 256, "max", stride=2)
            self.inc5a = L.InceptionBN(None, 352, 192, 320, 160, 224, "avg", 128)
            self.inc5b = L.InceptionBN(None, 352, 192, 320, 192, 224, "max", 128)
            self.out = L.Linear(None, n_classes)

            self.conva = L.Convolution2D(None, 128, 1, nobias=True)
            self.norma = L.BatchNormalization(128)
            self.lina = L.Linear(None, 1024, nobias=True)
            self.norma2 = L.BatchNormalization(1024)
            self.outa = L.Linear(None, n_classes)

            self.convb = L.Convolution2D(None, 128, 1, nobias=True)
            self.normb = L.BatchNormalization(128)
            self.linb = L.Linear(None, 1024, nobias=True)
            self.normb2 = L.BatchNormalization(1024)
            self.outb = L.Linear(None, n_classes)

    def forward(self, x: Variable, t: Variable) -> Variable:
        h = F.max_pooling_2d(F.relu(self.norm1(self.conv1(x))), 3, stride=2, pad=1)
        h = F.max_pooling_2d(F.relu(self.norm2(self.conv2(h))), 3, stride=2, pad=1)
        h = self.inc4a(self.inc3c(self.inc3b(self.inc3a(h))))

        a = F.average_pooling_2d(h, *auxiliary_pool(h.shape[2]))
        a = F.relu(self.norma(self.conva(a)))
        a = self.outa(F.relu(self.norma2(self.lina(a))))

        h = self.inc4d(self.inc4c(self.inc4b(h)))
        b = F.average_pooling_2d(h, *auxiliary_pool(h.shape[2]))
        b = F.relu(self.normb(self.convb(b)))
        b = self.outb(F.relu(self.normb2(self.linb(b))))

        h = self.inc5b(self.inc5a(self.inc4e(h)))
        # One window of 7/8 of the map: 7 of 8 at 224 pixels, as in Chainer's example.
        n = h.shape[2]
        h = F.average_pooling_2d(h, max(7 * n // 8, n // 2 + 1))
        return self.classify_with_auxiliaries(self.out(h), (a, b), t)
