"""Trains a network of wide functions in a process of its own: prints its peak and limit, a digest and the warnings.

usage: splitting_child.py NETWORK ROOM|none [SETTING=VALUE ...]

The limit is ROOM (bytes) above what the interpreter and its libraries take, which differs with their versions.
"""

import hashlib
import logging
import sys

import numpy as np

import chainer_ooc
from chainer_ooc.swap.system.memory import ResidentMemory

import chainer  # isort: skip
import chainer.functions as F  # isort: skip
import chainer.links as L  # isort: skip


def through_indexes(x):
    y, indexes = F.max_pooling_2d(x, 3, stride=1, return_indices=True)
    return F.upsampling_2d(y, indexes, 3, stride=1, outsize=x.shape[2:])


def sample(x):
    grid = np.random.RandomState(0).uniform(-1, 1, (len(x), 2, 160, 160)).astype(np.float32)
    return F.spatial_transformer_sampler(x, grid)


NETWORKS = {
    "convolutions": lambda: [
        L.Convolution2D(32, 32, 3, pad=1),
        F.relu,
        lambda x: F.max_pooling_2d(x, 3, stride=1),
    ],
    "groups": lambda: [
        L.Convolution2D(32, 32, 3, pad=1, groups=4),
        F.relu,
        L.Deconvolution2D(32, 32, 3, pad=1, groups=4),
        F.relu,
        L.DepthwiseConvolution2D(32, 1, 3),
    ],
    "averages": lambda: [
        lambda x: F.average_pooling_nd(x, 5, stride=1, pad=2, pad_value=None),
        lambda x: F.average_pooling_nd(x, 5, stride=1),
    ],
    "lrn": lambda: [lambda x: F.local_response_normalization(F.resize_images(x, (96, 96)))],
    "unpooling": lambda: [lambda x: F.unpooling_2d(x, 5, stride=1, pad=2)],
    "indexes": lambda: [through_indexes],
    "resizing": lambda: [lambda x: F.resize_images(x, (128, 128))],
    "sampling": lambda: [sample],
}


def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(name))


def main(network, room, *settings):
    limit = 0
    if room != "none":
        limit = resident("VmRSS:") + int(room)
        chainer_ooc.enable(limit, **dict(setting.split("=") for setting in settings))
    np.random.seed(0)
    model = chainer.Sequential(
        L.Convolution2D(3, 32, 3, pad=1),
        F.relu,
        *NETWORKS[network](),
        lambda x: F.average(x, axis=(2, 3)),
    )
    optimizer = chainer.optimizers.MomentumSGD(lr=0.01).setup(model)
    images = np.random.rand(16, 3, 64, 64).astype(np.float32)
    told, handler = [], logging.Handler()
    handler.emit = told.append
    logging.getLogger("chainer_ooc").addHandler(handler)
    for _ in range(2):
        optimizer.update(lambda: F.sum(model(images) ** 2))
    chainer_ooc.disable()  # a shortage is told by now
    digest = hashlib.sha256()
    for parameter in model.params():
        digest.update(parameter.array.tobytes())
    print(ResidentMemory.peak_bytes(), limit, digest.hexdigest(), len(told))


main(*sys.argv[1:])
