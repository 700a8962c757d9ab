"""The networks that the benchmarks train: a model that returns its loss, its inputs and its labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import chainer_ooc  # noqa: F401  the import hook comes before any import of Chainer

import chainer  # isort: skip
import chainer.functions as F  # isort: skip
import chainer.links as L  # isort: skip

Batch = tuple[chainer.Chain, np.ndarray, np.ndarray]


class Vision(chainer.Chain):
    """A network of ``chainer.links.model.vision`` that returns one of its layers."""

    def __init__(self, network: chainer.Chain, layer: str) -> None:
        super().__init__()
        self.layer = layer
        with self.init_scope():
            self.network = network

    def forward(self, x: Any) -> Any:
        return self.network(x, [self.layer])[self.layer]


class UNet3D(chainer.Chain):
    """A U-Net of three levels on volumes: the shape of networks for medical images."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        widths = [channels, 2 * channels, 4 * channels]
        with self.init_scope():
            self.down = chainer.ChainList(*[self.block(w) for w in widths])
            self.up = chainer.ChainList(*[self.block(w) for w in reversed(widths[:-1])])
            self.output = L.ConvolutionND(3, None, 2, 1)

    @staticmethod
    def block(width: int) -> chainer.Sequential:
        block = chainer.Sequential()
        for _ in range(2):
            block.append(L.ConvolutionND(3, None, width, 3, pad=1, nobias=True))
            block.append(L.BatchNormalization(width))
            block.append(F.relu)
        return block

    def forward(self, x: Any) -> Any:
        skipped = []
        for block in self.down:
            x = block(x)
            skipped.append(x)
            x = F.max_pooling_nd(x, 2)
        x = skipped.pop()
        for block in self.up:
            x = F.unpooling_nd(x, 2, cover_all=False)
            x = block(F.concat((skipped.pop(), x)))
        return self.output(x)


class Recurrent(chainer.Chain):
    """Two layers of LSTM over 64 steps."""

    def __init__(self, size: int) -> None:
        super().__init__()
        with self.init_scope():
            self.first = L.LSTM(size, 2 * size)
            self.second = L.LSTM(2 * size, 2 * size)
            self.output = L.Linear(2 * size, 10)

    def forward(self, x: Any) -> Any:
        self.first.reset_state()
        self.second.reset_state()
        for step in range(x.shape[1]):
            h = self.second(F.dropout(self.first(x[:, step])))
        return self.output(h)


def convnet() -> Batch:
    """Twenty-four convolutions at full resolution."""
    body = chainer.Sequential()
    for index in range(24):
        body.append(L.Convolution2D(3 if index == 0 else 16, 16, 3, pad=1))
        body.append(F.relu)
    body.append(lambda h: F.average(h, axis=(2, 3)))
    body.append(L.Linear(16, 10))
    return _classifier(body, (2, 3, 224, 224))


def googlenet() -> Batch:
    """GoogLeNet at 224 x 224."""
    return _classifier(Vision(L.GoogLeNet(pretrained_model=None), "loss3_fc"), (8, 3, 224, 224))


def vgg16() -> Batch:
    """The convolutions of VGG-16 at 224 x 224, and one linear layer."""
    body = chainer.Sequential()
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            body.append(L.Convolution2D(None, width, 3, pad=1))
            body.append(F.relu)
        body.append(lambda h: F.max_pooling_2d(h, 2))
    body.append(L.Linear(None, 10))
    return _classifier(body, (2, 3, 224, 224))


def resnet50() -> Batch:
    """ResNet-50 at 224 x 224."""
    return _classifier(Vision(L.ResNet50Layers(pretrained_model=None), "fc6"), (8, 3, 224, 224))


def unet3d() -> Batch:
    """A 3-D U-Net that labels each voxel."""
    model, x, _ = _classifier(UNet3D(), (1, 1, 48, 48, 48))
    return model, x, np.random.randint(0, 2, (1, 48, 48, 48)).astype(np.int32)


def lstm() -> Batch:
    """A recurrent network unrolled over 64 steps."""
    return _classifier(Recurrent(256), (64, 64, 256))


def mlp() -> Batch:
    """A perceptron so small that the time goes into Python."""
    body = chainer.Sequential()
    for _ in range(6):
        body.append(L.Linear(64, 64))
        body.append(F.relu)
    body.append(L.Linear(64, 10))
    return _classifier(body, (32, 64))


def _classifier(body: chainer.Link, shape: tuple[int, ...]) -> Batch:
    x = np.random.rand(*shape).astype(np.float32)
    return L.Classifier(body), x, (np.arange(shape[0]) % 10).astype(np.int32)


NETS: dict[str, Callable[[], Batch]] = {
    function.__name__: function
    for function in (convnet, googlenet, vgg16, resnet50, unet3d, lstm, mlp)
}
