"""Trains a small network in a process of its own, and prints the statistics as JSON.

usage: advice_child.py NET OPTIMIZER ITERATIONS LIMIT|none [SETTING=VALUE ...] [disk=BYTES_PER_SECOND]
"""

import dataclasses
import json
import sys
import time

import numpy as np

import chainer_ooc

import chainer  # isort: skip
import chainer.functions as F  # isort: skip
import chainer.links as L  # isort: skip


class Chain(chainer.ChainList):
    """Cheap functions of 4 MiB each, all of them saved."""

    def __init__(self):
        super().__init__(*[L.Scale(1, (4096,)) for _ in range(8)])

    def forward(self, x):
        for scale in self:
            x = F.tanh(F.sigmoid(scale(x)))
        return F.sum(x)


class Mlp(chainer.ChainList):
    """More parameters, gradients and state of the optimizer than saved arrays."""

    def __init__(self):
        super().__init__(*[L.Linear(1024, 1024) for _ in range(4)])

    def forward(self, x):
        x = x[:, :1024]
        for linear in self:
            x = F.relu(linear(x))
        return F.sum(x)


class Conv(chainer.ChainList):
    """A convnet whose convolutions need much for themselves."""

    def __init__(self):
        super().__init__(*[L.Convolution2D(8, 8, 3, pad=1) for _ in range(6)])

    def forward(self, x):
        x = F.reshape(x, (2, 8, 256, 256))
        for convolution in self:
            x = F.relu(convolution(x))
        return F.sum(x)


class Late(chainer.ChainList):
    """The last function needs the most."""

    def __init__(self):
        super().__init__(L.Scale(1, (4096,)))

    def forward(self, x):
        return F.sum(F.concat([F.tanh(self[0](x))] * 6, axis=0))


def slow_down(bytes_per_second):
    """Let the swap file move no more than that."""
    from chainer_ooc.swap.tiers.swap_file import SwapFile

    def slowly(move):
        def wrapped(file, offset, buffer):
            time.sleep(buffer.nbytes / bytes_per_second)
            move(file, offset, buffer)

        return wrapped

    SwapFile.write, SwapFile.read = slowly(SwapFile.write), slowly(SwapFile.read)


def main(net, optimizer, iterations, limit, *settings):
    given = dict(setting.split("=") for setting in settings)
    if "disk" in given:
        slow_down(float(given.pop("disk")))
    if limit != "none":
        chainer_ooc.enable(limit, **given)
    np.random.seed(0)
    model = {"chain": Chain, "mlp": Mlp, "conv": Conv, "late": Late}[net]()
    update = getattr(chainer.optimizers, optimizer)().setup(model).update
    x = np.random.rand(256, 4096).astype(np.float32)
    for _ in range(int(iterations)):
        update(model, x)
    stats = chainer_ooc.stats()
    plans = [dataclasses.asdict(plan) for plan in chainer_ooc.plans()]
    told = {"advice": stats.advice, "text": str(stats), "plans": plans}
    json.dump({**dataclasses.asdict(stats), **told}, sys.stdout)


main(*sys.argv[1:])
