"""Whole networks: two iterations out of core end with the bits of stock Chainer's."""

from __future__ import annotations

import sys

import chainer
import numpy as np
import pytest

import chainer_ooc
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "imagenet"))


def train(create, insize, **mode):
    """Train two iterations from the same start; return loss, parameters and persistents, in bytes."""
    np.random.seed(3)
    model = create()
    optimizer = chainer.optimizers.MomentumSGD(lr=0.01).setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(1e-4))
    images = np.random.rand(2, 3, insize, insize).astype(np.float32)
    labels = np.array([1, 3], np.int32)
    results = []
    with chainer_ooc.out_of_core_mode(bool(mode), **mode):
        for _ in range(2):
            optimizer.update(model, images, labels)
            results.append(model.loss.array.tobytes() if hasattr(model, "loss") else b"")
    results += [parameter.array.tobytes() for _, parameter in sorted(model.namedparams())]
    for _, link in sorted(model.namedlinks()):
        results += [np.asarray(getattr(link, name)).tobytes() for name in link._persistent]
    return results


@pytest.mark.parametrize(
    ("arch", "insize"),
    [
        ("alex", 67),
        ("nin", 67),
        ("googlenet", 224),
        ("googlenetbn", 64),
        ("resnet50", 32),
        ("resnext50", 32),
    ],
)
def test_the_networks_of_the_imagenet_example(arch, insize):
    from models import create

    stock = train(lambda: create(arch, insize, 5), insize)
    for single_backward in (False, True):
        before = chainer_ooc.stats()
        mode = {"swap_all": True, "min_bytes": 1, "single_backward": single_backward}
        assert train(lambda: create(arch, insize, 5), insize, **mode) == stock
        after = chainer_ooc.stats()
        assert after.bytes_in - before.bytes_in > 1 << 20
        assert after.bytes_out - before.bytes_out >= after.bytes_in - before.bytes_in
