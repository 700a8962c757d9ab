"""Small networks of different kinds, which are planned without data and for real."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np


class ConvNet(chainer.Chain):
    """Convolutions, batch normalization, dropout, a pooling that keeps indexes."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(3, 32, 3, pad=1)
            self.norm1 = L.BatchNormalization(32)
            self.conv2 = L.Convolution2D(32, 32, 3, pad=1)
            self.norm2 = L.BatchNormalization(32)
            self.out = L.Linear(None, 10)

    def forward(self, x, t):
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.dropout(F.relu(self.norm2(self.conv2(h))))
        h = F.max_pooling_2d(h, 2)
        return F.softmax_cross_entropy(self.out(F.average(h, axis=(2, 3))), t)


class Perceptron(chainer.Chain):
    """Products, activations, dropout."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.first = L.Linear(64, 512)
            self.second = L.Linear(512, 512)
            self.out = L.Linear(512, 10)

    def forward(self, x, t):
        h = F.dropout(F.tanh(self.first(x)))
        h = F.relu(self.second(h)) * h
        return F.softmax_cross_entropy(self.out(h), t)


class Recurrent(chainer.Chain):
    """An LSTM over steps."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.lstm = L.LSTM(64, 256)
            self.out = L.Linear(256, 10)

    def forward(self, xs, t):
        self.lstm.reset_state()
        for step in range(xs.shape[1]):
            h = self.lstm(xs[:, step])
        return F.softmax_cross_entropy(self.out(h), t)


class UNet(chainer.Chain):
    """A path down and up again, with skips."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.down1 = L.Convolution2D(3, 16, 3, pad=1)
            self.norm1 = L.BatchNormalization(16)
            self.down2 = L.Convolution2D(16, 32, 4, 2, 1)
            self.norm2 = L.BatchNormalization(32)
            self.up = L.Deconvolution2D(32, 16, 4, 2, 1)
            self.norm3 = L.BatchNormalization(16)
            self.out = L.Convolution2D(32, 4, 1)

    def forward(self, x, t):
        skip = F.relu(self.norm1(self.down1(x)))
        h = F.leaky_relu(self.norm2(self.down2(skip)))
        h = F.relu(self.norm3(self.up(h)))
        return F.softmax_cross_entropy(self.out(F.concat((h, skip))), t)


class Kept(ConvNet):
    """Its loss, and so its graph, live until the next one is there."""

    def forward(self, x, t):
        self.loss = super().forward(x, t)
        return self.loss


class Frozen(ConvNet):
    """A part without a graph, and an accuracy beside the loss."""

    def forward(self, x, t):
        with chainer.no_backprop_mode():
            x = F.tanh(F.average_pooling_2d(x, 3, 1, 1))
        self.accuracy = F.accuracy(self.out(F.average(self.conv1(x), axis=(2, 3))), t)
        return super().forward(x, t)


class Branches(chainer.Chain):
    """Arrays that several functions share: sums, views, crops, products with a small array."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(3, 8, 3)
            self.scale = chainer.Parameter(1.0, (1, 8, 1, 1))
            self.out = L.Linear(None, 10)

    def forward(self, x, t):
        h = self.conv(x)
        h = F.relu(h) + F.elu(h) * F.broadcast_to(self.scale, h.shape)
        a, b = F.split_axis(h, 2, axis=1)
        h = F.sigmoid(F.reshape(F.transpose(a, (0, 2, 3, 1)), b.shape)) * b + 1
        h = F.unpooling_2d(F.local_response_normalization(h), 2)
        return F.softmax_cross_entropy(self.out(F.average_pooling_2d(h, 4)), t)


def _images(model, batchsize, insize):
    x = np.random.RandomState(0).rand(batchsize, 3, insize, insize).astype(np.float32)
    return model, x, np.zeros(batchsize, np.int32)


def _perceptron(batchsize):
    x = np.random.RandomState(0).rand(batchsize, 64).astype(np.float32)
    return Perceptron(), x, np.zeros(batchsize, np.int32)


def _recurrent(batchsize, steps):
    x = np.random.RandomState(0).rand(batchsize, steps, 64).astype(np.float32)
    return Recurrent(), x, np.zeros(batchsize, np.int32)


def _unet(batchsize, insize):
    model, x, _ = _images(UNet(), batchsize, insize)
    return model, x, np.zeros((batchsize, insize, insize), np.int32)


#: Networks with their inputs, as small as arrays that may move allow.
NETS = {
    "convnet": lambda: _images(ConvNet(), 4, 32),
    "perceptron": lambda: _perceptron(256),
    "recurrent": lambda: _recurrent(128, 4),
    "unet": lambda: _unet(4, 32),
    "kept": lambda: _images(Kept(), 4, 32),
    "frozen": lambda: _images(Frozen(), 4, 32),
    "branches": lambda: _images(Branches(), 4, 34),
}

#: Networks whose arrays are most of the process's memory.
LARGE = {
    "convnet": lambda: _images(ConvNet(), 16, 64),
    "perceptron": lambda: _perceptron(8192),
    "recurrent": lambda: _recurrent(512, 12),
    "unet": lambda: _unet(8, 96),
}
