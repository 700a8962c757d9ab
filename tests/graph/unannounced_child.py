"""Trains a small convnet without the C extension: prints what it took, as JSON.

usage: unannounced_child.py LIMIT|none [SETTING=VALUE ...]
"""

import hashlib
import json
import os
import sys
import warnings

os.environ["_CHAINER_OOC_WITHOUT_EXTENSION"] = "1"

import numpy as np

import chainer_ooc
from chainer_ooc.errors import OutOfMemoryError
from chainer_ooc.swap.system.memory import ResidentMemory

import chainer  # isort: skip
import chainer.functions as F  # isort: skip
import chainer.links as L  # isort: skip

ITERATIONS = 4
peaks = []
reset_peak = ResidentMemory.reset_peak


class ConvNet(chainer.Chain):
    """Eight times a convolution and four rectifiers, on 6 MiB each; the patches of a convolution are 56 MiB."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.convolutions = chainer.ChainList(
                *[L.Convolution2D(16, 16, 3, pad=1) for _ in range(8)]
            )

    def forward(self, x):
        for convolution in self.convolutions:
            x = convolution(x)
            for _ in range(4):
                x = F.relu(x)
        return F.sum(x)


def note_peak():
    """Note the peak that the engine is about to have the kernel forget."""
    peaks.append(ResidentMemory.peak_since_reset())
    return reset_peak()


def main(limit, *settings):
    ResidentMemory.reset_peak = staticmethod(note_peak)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if limit != "none":
            given = dict(setting.split("=") for setting in settings)
            chainer_ooc.enable(limit, **given)
            chainer_ooc.enable(limit, **given)
    np.random.seed(0)
    model = ConvNet()
    optimizer = chainer.optimizers.MomentumSGD(lr=1e-6).setup(model)
    images = np.random.rand(1, 16, 320, 320).astype(np.float32)
    of_iterations, resets, error = [], [], None
    for _ in range(ITERATIONS):
        note_peak()
        peaks.clear()
        try:
            optimizer.update(model, images)
        except OutOfMemoryError as found:
            error = str(found)
            break
        resets.append(len(peaks))
        of_iterations.append(max([*peaks, ResidentMemory.peak_since_reset()]))
    digest = hashlib.sha256()
    for parameter in model.params():
        digest.update(parameter.array.tobytes())
    stats = chainer_ooc.stats()
    result = {
        "peaks": of_iterations,
        "resets": resets,
        "digest": digest.hexdigest(),
        "bytes_out": stats.bytes_out,
        "reported_peak": stats.peak_bytes,
        "warned": [str(one.message) for one in warned],
        "files": [one.filename for one in warned],
        "error": error,
    }
    print(json.dumps(result))


main(*sys.argv[1:])
