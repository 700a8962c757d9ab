"""Trains two wide convolutions in a process of its own: prints its peak memory, a digest and the warnings.

usage: splitting_child.py LIMIT|none [SETTING=VALUE ...]
"""

import hashlib
import sys
import warnings

import numpy as np

import chainer_ooc

import chainer  # isort: skip
import chainer.functions as F  # isort: skip
import chainer.links as L  # isort: skip


def main(limit, *settings):
    if limit != "none":
        chainer_ooc.enable(limit, **dict(setting.split("=") for setting in settings))
    np.random.seed(0)
    model = chainer.Sequential(
        L.Convolution2D(3, 32, 3, pad=1),
        F.relu,
        L.Convolution2D(32, 32, 3, pad=1),
        F.relu,
        lambda x: F.max_pooling_2d(x, 3, stride=1),
        lambda x: F.average(x, axis=(2, 3)),
    )
    optimizer = chainer.optimizers.MomentumSGD(lr=0.01).setup(model)
    images = np.random.rand(16, 3, 64, 64).astype(np.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        for _ in range(2):
            optimizer.update(lambda: F.sum(model(images) ** 2))
    digest = hashlib.sha256()
    for parameter in model.params():
        digest.update(parameter.array.tobytes())
    with open("/proc/self/status") as status:
        (peak,) = (int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))
    print(peak, digest.hexdigest(), sum(w.category is RuntimeWarning for w in caught))


main(*sys.argv[1:])
