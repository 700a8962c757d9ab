"""Trains a deep convnet in a process of its own: prints its peak memory and a digest of the result.

usage: limit_child.py LIMIT|none [SETTING=VALUE ...]
"""

import hashlib
import sys
import warnings

import numpy as np

import chainer_ooc

import chainer  # isort: skip
import chainer.functions as F  # isort: skip
import chainer.links as L  # isort: skip

warnings.simplefilter("error", RuntimeWarning)


class ConvNet(chainer.Chain):
    """Thirty times convolution, batch normalization, ReLU and sigmoid at full resolution."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.convolutions = chainer.ChainList(
                *[L.Convolution2D(3 if n == 0 else 16, 16, 3, pad=1) for n in range(30)]
            )
            self.normalizations = chainer.ChainList(*[L.BatchNormalization(16) for _ in range(30)])
            self.output = L.Linear(16, 10)

    def forward(self, x):
        for convolution, normalization in zip(self.convolutions, self.normalizations, strict=True):
            x = F.sigmoid(F.relu(normalization(convolution(x))))
        return self.output(F.average(x, axis=(2, 3)))


def main(limit, *settings):
    if limit != "none":
        given = dict(setting.split("=") for setting in settings)
        chainer_ooc.enable(limit, **given)
    np.random.seed(0)
    model = L.Classifier(ConvNet())
    optimizer = chainer.optimizers.MomentumSGD(lr=0.01).setup(model)
    images = np.random.rand(1, 3, 192, 192).astype(np.float32)
    for _ in range(2):
        optimizer.update(model, images, np.array([3], np.int32))
    digest = hashlib.sha256()
    for parameter in model.params():
        digest.update(parameter.array.tobytes())
    with open("/proc/self/status") as status:
        (peak,) = (int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))
    stats = chainer_ooc.stats()
    print(peak, digest.hexdigest(), stats.bytes_out, stats.bytes_in, stats.peak_bytes)


main(*sys.argv[1:])
