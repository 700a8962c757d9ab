"""Networks that are trained for real, to see whether estimates hold."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np


class Pyramid(chainer.Chain):
    """Convolutions with batch normalization, poolings, concatenated branches."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.stem = L.Convolution2D(3, 16, 5, pad=2)
            self.norm = L.BatchNormalization(16)
            self.left = L.Convolution2D(None, 16, 3, pad=1)
            self.right = L.Convolution2D(None, 16, 1)
            self.out = L.Linear(None, 10)

    def forward(self, x, t):
        h = F.max_pooling_2d(F.relu(self.norm(self.stem(x))), 3, 2)
        h = F.concat((F.relu(self.left(h)), F.dropout(F.relu(self.right(h)))))
        h = F.average(F.local_response_normalization(h), axis=(2, 3))
        return F.softmax_cross_entropy(self.out(h), t)


class Recurrent(chainer.Chain):
    """An LSTM over steps."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.lstm = L.LSTM(256, 512)
            self.out = L.Linear(512, 10)

    def forward(self, xs, t):
        self.lstm.reset_state()
        for step in range(xs.shape[1]):
            h = self.lstm(xs[:, step])
        return F.softmax_cross_entropy(self.out(F.dropout(h)), t)


class Translator(chainer.Chain):
    """Word vectors, an NStepLSTM over sequences of several lengths, and attention over them."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(20000, 128)
            self.lstm = L.NStepBiLSTM(1, 128, 128, 0.1)
            self.out = L.Linear(256, 5000)

    def forward(self, xs):
        _, _, ys = self.lstm(None, None, [self.embed(x) for x in xs])
        h = F.pad_sequence(ys)
        weights = F.softmax(F.matmul(h, h, transb=True), axis=2)
        scores = self.out(F.reshape(F.matmul(weights, h), (-1, 256)))
        return F.average(F.logsumexp(scores, axis=1))


def pyramid():
    x = np.random.rand(8, 3, 96, 96).astype(np.float32)
    return Pyramid(), x, np.zeros(8, np.int32)


def recurrent():
    return Recurrent(), np.random.rand(128, 24, 256).astype(np.float32), np.zeros(128, np.int32)


def translator():
    return Translator(), [np.arange(n, dtype=np.int32) * 7 for n in (40, 33, 25, 25, 12, 8)]


NETS = {function.__name__: function for function in (pyramid, recurrent, translator)}
