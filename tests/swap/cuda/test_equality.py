"""Chainer's functions and networks on the CUDA device's own code: the bits of stock Chainer, and no race."""

from __future__ import annotations

import contextlib
import gc
import sys

import chainer
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc.errors import CorruptCopyError
from chainer_ooc.swap.devices.cuda.fingerprints import COMPARISON
from chainer_ooc.testing import assert_same_bits, force_copies
from tests.conftest import ROOT
from tests.doubles.adopted_arrays import simulated_gpu
from tests.equality.function_cases import CASES
from tests.equality.test_functions import run
from tests.graph.test_networks import train

sys.path.insert(0, str(ROOT / "examples" / "imagenet"))

MIB = 1 << 20
forcing = sys.modules[force_copies.__module__]


@pytest.fixture
def forced(monkeypatch):
    """Return a function: :func:`force_copies` copies to the simulated GPU's host memory from now on."""

    def force(manager):
        mine = forcing._ForcingManager()
        mine.device = mine._transfers.device = manager.device
        monkeypatch.setattr(forcing, "_manager", mine)
        return mine

    return force


def check(case, seed, tmp_path, forced, host_limit):
    from chainer_ooc import state

    stock = run(case)
    with simulated_gpu(seed, str(tmp_path), host_limit) as machine:
        mine = forced(state.process.managers["ram"])
        with force_copies() as moved:
            results = run(case)
        assert machine.calls["memcpyAsync"] >= moved.storages_in + moved.storages_out
        assert_same_bits(results, stock)
        if case.still is None:
            assert moved.bytes_in > 0
        del results
        mine.settle()


# A few of each kind; all of them with many schedules where there is time.
@pytest.mark.parametrize("number", range(0, len(CASES), 9))
def test_functions(number, tmp_path, forced):
    host_limit = 2 * MIB if number % 2 else 64 * MIB
    check(CASES[number], number, tmp_path, forced, host_limit)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_functions(case, tmp_path, forced):
    for seed, host_limit in enumerate((0, 64 * MIB, 64 * MIB)):
        check(case, seed, tmp_path, forced, host_limit)


def test_a_network_moved_out_whole(tmp_path):
    from models import create

    stock = train(lambda: create("resnet50", 32, 5), 32)
    for seed, host_limit in enumerate((4 * MIB, 64 * MIB)):
        with simulated_gpu(seed, str(tmp_path), host_limit) as machine:
            before = chainer_ooc.stats()
            mode = {"swap_all": True, "min_bytes": 1, "single_backward": seed == 1}
            assert train(lambda: create("resnet50", 32, 5), 32, **mode) == stock
            assert chainer_ooc.stats().bytes_in - before.bytes_in > 4 * MIB
            assert machine.calls["memcpyAsync"] > 500


def three_steps(looks=False):
    """Train a small network; return losses and parameters.

    Args:
        looks: Look at each array as it is made.
    """

    class Net(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.blocks = chainer.ChainList(
                    *[chainer.links.Convolution2D(8, 8, 3, pad=1) for _ in range(12)]
                )
                self.last = chainer.links.Linear(None, 3)

        def __call__(self, x, t):
            h = x
            for block in self.blocks:
                h = chainer.functions.relu(block(h)) + chainer.functions.dropout(h, 0.2)
                assert not looks or h.array.dtype == "f"
            return chainer.functions.softmax_cross_entropy(self.last(h), t)

    np.random.seed(0)
    net = Net()
    optimizer = chainer.optimizers.SGD(0.01).setup(net)
    x = np.random.rand(4, 8, 32, 32).astype("f")
    losses = []
    for _ in range(3):
        loss = net(x, np.array([0, 1, 2, 0], "i"))
        net.cleargrads()
        loss.backward()
        optimizer.update()
        losses.append(loss.array.copy())
        del loss
    return losses + [p.array for p in net.params()]


@pytest.mark.parametrize("seed", range(4))
def test_a_network_under_a_limit(seed, tmp_path):
    """On demand: writes behind, reclaims, prefetches."""
    stock = three_steps()
    limit = 100 * MIB
    # All but 3 MiB of the limit are somebody else's.
    with simulated_gpu(seed, str(tmp_path), 2 * MIB if seed % 2 else 64 * MIB, 97 * MIB):
        before = chainer_ooc.stats()
        with chainer_ooc.out_of_core_mode(limit=limit, min_bytes=1):
            ours = three_steps()
        after = chainer_ooc.stats()
        assert_same_bits(ours, stock)
        assert after.bytes_in - before.bytes_in > MIB
        assert after.prefetched > before.prefetched
        del ours


@pytest.mark.parametrize("looks", [False, True], ids=["private", "exposed"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_network_whose_arrays_are_made_again(seed, looks, tmp_path):
    """What other code has had gets fingerprints, and is discarded once they are known to be equal."""
    stock = three_steps()
    with simulated_gpu(seed, str(tmp_path), 64 * MIB, 97 * MIB) as machine:
        before = chainer_ooc.stats().storages_remade
        mode = {"swap_all": True, "discard_all": True, "single_backward": seed == 0}
        with chainer_ooc.out_of_core_mode(min_bytes=1, **mode):
            ours = three_steps(looks)
        assert_same_bits(ours, stock)
        remade = chainer_ooc.stats().storages_remade - before
        assert remade > 10
        if looks:
            assert machine.calls[COMPARISON] > 10
        else:  # only parameters, and products, are compared
            assert 0 < machine.calls[COMPARISON] < remade
        del ours


class Noisy(chainer.FunctionNode):
    """Never the same bits twice."""

    def forward(self, inputs):
        return (inputs[0] + np.random.rand(*inputs[0].shape).astype("f"),)

    def backward(self, indexes, grads):
        return grads


@pytest.mark.parametrize("end", ["with", "disable"])
@pytest.mark.parametrize("seed", range(3))
def test_other_bits_in_the_last_backward_are_an_error_in_the_end(seed, end, tmp_path):
    """On a GPU nobody may know before."""
    chainer_ooc.recomputable(Noisy)
    mode = {"swap_all": True, "discard_all": True, "min_bytes": 1}
    raised = pytest.raises(CorruptCopyError, match=r'Noisy was run again: .*recompute="never"')
    with simulated_gpu(seed, str(tmp_path)):
        x = chainer.Variable(np.random.rand(50, 50).astype("f"))
        with raised:
            if end == "disable":
                chainer_ooc.enable(**mode)
            with (
                chainer_ooc.out_of_core_mode(**mode) if end == "with" else contextlib.nullcontext()
            ):
                h = chainer.functions.tanh(x)
                (y,) = Noisy().apply((h,))
                loss = chainer.functions.sum(y * y) + chainer.functions.sum(h * h)
                del y, h
                chainer.functions.tanh(x)
                loss.backward()
                del loss
                gc.collect()
            chainer_ooc.disable()
        with contextlib.suppress(CorruptCopyError):
            chainer_ooc.disable()
