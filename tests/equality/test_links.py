"""Links and optimizers: training from copies ends with the bits of training on stock Chainer."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizer_hooks, optimizers

import chainer_ooc
from chainer_ooc.testing import assert_same_bits, force_copies
from tests.equality.link_cases import LINKS


def state(model):
    """Return all numbers of a link: parameters, gradients, and what else it saves, by name."""
    numbers = {name: p.array for name, p in sorted(model.namedparams())}
    numbers |= {name + ".grad": p.grad for name, p in sorted(model.namedparams())}
    for path, link in sorted(model.namedlinks()):
        numbers |= {f"{path}/{name}": getattr(link, name) for name in sorted(link._persistent)}
    return numbers


def train(case):
    np.random.seed(2)
    rng = np.random.RandomState(3)
    model = case.create()
    inputs = [make(rng) for make in case.makes]
    optimizer = optimizers.SGD(0.01).setup(model)
    outputs = []
    for _ in range(2):
        ys = case.call(model, *[F.tanh(x) if x.dtype.kind == "f" else x for x in inputs])
        ys = ys if isinstance(ys, list | tuple) else [ys]
        loss = sum(F.sum(F.square(y)) for y in ys)
        outputs += [np.array(y.array) for y in ys]
        del ys
        model.cleargrads()
        loss.backward()
        del loss
        optimizer.update()
    return outputs, state(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LINKS, ids=lambda case: case.name)
def test_links(case, moved_bytes):
    expected = train(case)
    with force_copies() as moved:
        actual = train(case)
    moved_bytes(moved)
    assert moved.bytes_in
    assert_same_bits(actual, expected)
    before = chainer_ooc.stats().bytes_in
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1):
        actual = train(case)
    assert chainer_ooc.stats().bytes_in > before
    assert_same_bits(actual, expected)


OPTIMIZERS = {
    "AdaDelta": optimizers.AdaDelta,
    "AdaGrad": lambda: optimizers.AdaGrad(0.01),
    "Adam": optimizers.Adam,
    "Adam decoupled": lambda: optimizers.Adam(weight_decay_rate=0.01),
    "AdamW": optimizers.AdamW,
    "AMSGrad": optimizers.AMSGrad,
    "AdaBound": optimizers.AdaBound,
    "AMSBound": optimizers.AMSBound,
    "CorrectedMomentumSGD": optimizers.CorrectedMomentumSGD,
    "MomentumSGD": optimizers.MomentumSGD,
    "MSVAG": optimizers.MSVAG,
    "NesterovAG": optimizers.NesterovAG,
    "RMSprop": optimizers.RMSprop,
    "RMSpropGraves": optimizers.RMSpropGraves,
    "SGD": optimizers.SGD,
    "SMORMS3": optimizers.SMORMS3,
}
HOOKS = (
    optimizer_hooks.WeightDecay(1e-3),
    optimizer_hooks.GradientClipping(1.0),
    optimizer_hooks.GradientLARS(),
)


class Net(chainer.Chain):
    """A network with one of each: convolution, normalization, noise, pooling, embedding by no name."""

    def __init__(self, dtype=None):
        super().__init__()
        with chainer.using_config("dtype", dtype or chainer.config.dtype), self.init_scope():
            self.conv = L.Convolution2D(1, 4, 3, pad=1)
            self.norm = L.BatchNormalization(4)
            self.hidden = L.Linear(None, 8)
            self.out = L.Linear(8, 3)

    def forward(self, x):
        h = F.max_pooling_2d(F.relu(self.norm(self.conv(x))), 2)
        return self.out(F.dropout(F.tanh(self.hidden(h)), 0.3))


def digits(dtype=np.float32):
    rng = np.random.RandomState(5)
    return rng.standard_normal((6, 1, 6, 6)).astype(dtype), rng.randint(0, 3, 6).astype(np.int32)


def optimize(create, steps=5, dtype=None, scale=None, hooks=HOOKS):
    np.random.seed(4)
    model = L.Classifier(Net(dtype))
    optimizer = create().setup(model)
    for hook in hooks:
        optimizer.add_hook(hook)
    if scale == "dynamic":
        optimizer.loss_scaling()
    elif scale:
        optimizer.loss_scaling(scale=scale)
    losses = []
    for _ in range(steps):
        optimizer.update(model, *digits(np.float16 if dtype else np.float32))
        losses.append(np.array(model.loss.array))
    numbers = {}
    for name, parameter in sorted(model.namedparams()):
        for key, value in sorted(parameter.update_rule.state.items()):
            numbers[f"{name} {key}"] = np.array(value)
    return losses, state(model), numbers


def equal(run, moved_bytes):
    expected = run()
    with force_copies() as moved:
        actual = run()
    moved_bytes(moved)
    assert moved.bytes_in
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, moved_bytes):
    equal(lambda: optimize(OPTIMIZERS[name]), moved_bytes)


@pytest.mark.parametrize("scale", [None, 8.0, "dynamic"])
def test_mixed16_with_loss_scaling(scale, moved_bytes):
    equal(
        lambda: optimize(optimizers.MomentumSGD, 3, chainer.mixed16, scale, HOOKS[:1]), moved_bytes
    )


def test_float16(moved_bytes):
    equal(lambda: optimize(optimizers.SGD, 3, np.float16, 4.0, ()), moved_bytes)


@pytest.mark.filterwarnings("ignore")
def test_multi_node_batch_normalization(moved_bytes):
    pytest.importorskip("mpi4py")
    import chainermn

    comm = chainermn.create_communicator("naive")

    def run():
        np.random.seed(0)
        model = chainermn.links.MultiNodeBatchNormalization(3, comm)
        optimizer = optimizers.SGD(0.1).setup(model)
        x = np.random.standard_normal((4, 3, 2, 2)).astype(np.float32)
        for _ in range(2):
            optimizer.update(lambda: F.sum(F.tanh(model(F.sin(x)))))
        return state(model)

    equal(run, moved_bytes)
