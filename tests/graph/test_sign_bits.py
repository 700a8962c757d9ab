"""Signs in place of values: the bits of stock Chainer where backward needs no more, all values where it does."""

from __future__ import annotations

import gc
import json

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import mode
from chainer_ooc.errors import GraphReleasedError
from chainer_ooc.swap.devices.signs import SignCopy
from chainer_ooc.swap.storage import State
from chainer_ooc.testing import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN and overflows
ON = {"swap_all": True, "min_bytes": 1, "sign_bits": True}


def as_signs():
    return chainer_ooc.stats().bytes_as_signs


def inputs(dtype=np.float32, shape=(4, 6, 9, 9), seed=0):
    """Random numbers, with zeros of both signs, NaN and infinities."""
    x = np.random.RandomState(seed).randn(*shape)
    x.flat[:8] = 0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 5e-8, -5e-8
    return x.astype(dtype)


def both(program, packs, **settings):
    """Compare a program with stock Chainer's; tell whether signs were kept."""
    results = []
    for on in (False, True):
        np.random.seed(1)
        before = as_signs()
        with chainer_ooc.out_of_core_mode(on, **{**ON, **settings} if on else {}):
            results.append(program())
        gc.collect()
    assert_same_bits(results[1], results[0])
    assert (as_signs() > before) is packs


def gradient(function, x, **how):
    x = chainer.Variable(x)
    y = function(x * 1)
    y.grad = np.random.RandomState(1).randn(*y.shape).astype(y.dtype)
    y.backward(**how)
    return x.grad


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 6, 9, 9), (1, 13), (3, 1 << 20)], ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_pooled_in_bits(dtype, shape, again):
    def program():
        x = inputs(dtype, shape)
        with np.errstate(all="ignore"):
            return [gradient(lambda h: -F.relu(h), x) for _ in range(1 + again)]

    both(program, packs=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: F.tanh(F.relu(h) * 2.0),  # a constant factor needs no values
        lambda h: F.max_pooling_2d(F.relu(h), 2),
        lambda h: F.average_pooling_2d(F.relu(h), 2),
        lambda h: F.concat([F.relu(h), F.relu(-h)]),
        lambda h: F.dropout(F.relu(h)),
        lambda h: F.relu(h) + F.relu(-h),
        lambda h: -F.relu(F.transpose(h)),
    ],
)
def test_what_needs_no_values_needs_none(function):
    both(lambda: gradient(function, inputs()[:, :, :8, :8].copy()), packs=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: F.square(F.relu(h)),
        lambda h: F.relu(h) * F.tanh(h),
        lambda h: F.local_response_normalization(F.relu(h)),
        lambda h: F.sum(F.relu(h) @ F.relu(h), axis=1),
        lambda h: F.leaky_relu(h),
        lambda h: F.clipped_relu(h, 0.5),
    ],
)
def test_what_needs_values_gets_them(function):
    x = inputs(shape=(2, 3, 9, 9))
    both(lambda: gradient(function, np.nan_to_num(x)), packs=False)


def test_values_that_are_wanted_later_are_there():
    """Its copy, of signs, is worth nothing any more."""
    with chainer_ooc.out_of_core_mode(**{**ON, "swap_all": False}, limit=1 << 40):
        x = chainer.Variable(inputs())
        y = F.relu(x * 1)
        node = y.node
        from chainer_ooc.graph.backprop import adopt

        adopt()
        manager = mode._managers["ram"]
        (storage,) = [s for s in manager.storages() if s.signs is not None]
        for state in (State.GOING_OUT, State.BOTH):
            manager._mover.begin_out(storage)
            if state is State.BOTH:
                manager.settle()
            assert storage.state is state
            storage.wants_values = False
            z = F.square(node.get_variable())
            adopt()
            manager.settle()
            assert storage.state is State.RESIDENT
        z.grad = np.ones_like(z.array)
        expected = np.maximum(x.array, 0) * 2 * (x.array > 0)
        z.backward()
        assert_same_bits(x.grad[1:], expected[1:])


def test_nobody_else_may_read_it():
    with chainer_ooc.out_of_core_mode(**ON):
        y = F.relu(chainer.Variable(inputs()) * 1)
        z = -y
        node = y.node
        del y
        -z  # noqa: B018  moves all out
        with pytest.raises(GraphReleasedError, match=r"ReLU saved, only signs.*sign_bits=False"):
            node.data  # noqa: B018
    assert z.array is not None


def test_function_hooks_get_values():
    """They are given the inputs of all functions."""

    class Look(chainer.FunctionHook):
        def backward_preprocess(self, function, in_data, out_grad):
            seen.extend(None if a is None else a.copy() for a in in_data)

    def program():
        seen.clear()
        with Look(), chainer.function_hooks.TimerHook():
            x = np.nan_to_num(inputs())
            return gradient(lambda h: -F.average_pooling_2d(F.relu(h), 3), x), list(seen)

    seen = []
    both(program, packs=False)
    assert any(a is not None and a.shape == (4, 6, 9, 9) for a in seen)


def test_who_holds_it_may_read_it():
    with chainer_ooc.out_of_core_mode(**ON):
        x = inputs()
        y = F.relu(chainer.Variable(x) * 1)
        z = -y
        -z  # noqa: B018
        assert_same_bits(y.node.data, np.maximum(x, 0))
        assert_same_bits(y.array, np.maximum(x, 0))


def test_double_backprop():
    def program():
        x = chainer.Variable(np.nan_to_num(inputs()))
        y = F.max_pooling_2d(F.relu(F.tanh(x)), 2)
        (gx,) = chainer.grad([y], [x], enable_double_backprop=True)
        (ggx,) = chainer.grad([F.sum(gx * gx)], [x])
        return gx.array, ggx.array

    both(program, packs=True)


def test_with_what_is_made_again():
    """Signs are no input of a recipe: what is made from values keeps them."""

    def program():
        x = chainer.Variable(np.nan_to_num(inputs()))
        y = F.tanh(F.relu(F.tanh(x)) * 2.0)
        y.grad = np.ones_like(y.array)
        y.backward()
        return x.grad

    before = chainer_ooc.stats()
    for _ in range(2):  # recipes are given once memory has been short
        results = []
        for on in (False, True):
            with chainer_ooc.out_of_core_mode(on, **{**ON, "recompute": True} if on else {}):
                results.append(program())
        assert_same_bits(results[1], results[0])
    after = chainer_ooc.stats()
    assert after.bytes_as_signs + after.bytes_forgone > before.bytes_as_signs + before.bytes_forgone


def test_verify_does_not_take_signs_for_a_broken_copy():
    both(lambda: gradient(lambda h: -F.relu(h), inputs()), packs=True, verify=True)


class Net(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.convs = chainer.ChainList(*[L.Convolution2D(8, 8, 3, pad=1) for _ in range(4)])
            self.last = L.Linear(8, 3)

    def __call__(self, x):
        for conv in self.convs:
            x = F.max_pooling_2d(F.relu(conv(x)), 3, 1, 1)
        return self.last(F.average(x, axis=(2, 3)))


@pytest.mark.parametrize(
    "settings",
    [{}, {"single_backward": True}, {"plan": False}, {"skip_zeros": True}],
    ids=str,
)
def test_training_has_the_same_bits_and_moves_less(settings):
    def program():
        net = Net()
        optimizer = chainer.optimizers.MomentumSGD(0.01).setup(net)
        random = np.random.RandomState(1)
        losses = []
        for _ in range(6):
            x = random.rand(2, 8, 32, 32).astype("f")
            optimizer.update(
                lambda x=x: F.softmax_cross_entropy(net(x), np.array([0, 1], np.int32))
            )
            losses += [p.array.copy() for p in net.params()]
        return losses

    moved = {}
    for sign_bits in (False, True):
        before = chainer_ooc.stats()
        np.random.seed(2)
        both(program, packs=sign_bits, sign_bits=sign_bits, **settings)
        after = chainer_ooc.stats()
        moved[sign_bits] = after.bytes_out - before.bytes_out
        assert after.bytes_in > before.bytes_in
    assert moved[True] < 0.8 * moved[False]


def test_it_is_in_the_trace(tmp_path):
    path = tmp_path / "ooc.json"
    both(lambda: gradient(lambda h: -F.relu(h), inputs()), packs=True, trace=str(path))
    events = json.loads(path.read_text())["traceEvents"]
    (told,) = [event for event in events if event.get("cat") == "signs"]
    assert (told["name"], told["args"]["bytes"]) == ("ReLU", inputs().nbytes)
    assert not [
        e for e in events if e["name"] == "ReLU" and e.get("cat") in ("copy out", "copy in")
    ]


def test_bits_take_one_in_thirty_two():
    copy = SignCopy(np.ones(3 << 20, np.float32))
    assert sum(bits.nbytes for bits in copy._bits) == (3 << 20) // 8
    copy.free()
    assert not copy._bits
