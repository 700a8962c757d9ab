"""Warnings made errors, and NumPy's error states: the user gets what stock Chainer gives, and as often."""

from __future__ import annotations

import gc
import warnings

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.swap.shortages import Shortages
from chainer_ooc.testing import assert_same_bits

SETTINGS = {
    "all out": {"swap_all": True, "min_bytes": 1},
    "recompute": {"swap_all": True, "min_bytes": 1, "discard_all": True},
    "verify": {"swap_all": True, "min_bytes": 1, "verify": True},
    "little memory": {"limit": "1MiB", "split": "always", "discard_all": True},
}
#: Begins what out-of-core mode says itself.
OWN = ("an array of ", " needs ")


def watched(program, how):
    """Run a program with the user's warnings or NumPy's errors treated like that.

    Returns:
        What it returns or raises, and what the user was told meanwhile, but for what we say ourselves.
    """
    calls = []
    with (
        warnings.catch_warnings(record=how == "always") as caught,
        np.errstate(
            **{"all": how} if how in ("raise", "call") else {}, call=lambda *a: calls.append(a)
        ),
    ):
        warnings.simplefilter(how if how in ("error", "always") else "ignore")
        try:
            result = program()
        except (Warning, FloatingPointError) as error:
            result = f"{type(error).__name__}: {error}"
    told = [(str(one.message), one.filename, one.lineno) for one in caught or ()]
    return result, calls + [one for one in told if not any(own in one[0] for own in OWN)]


HOW = ("error", "always", "raise", "call")


def data(low, high, *shape):
    return np.linspace(low, high, int(np.prod(shape))).astype("f").reshape(shape)


def graph(function, low=-1.0, high=1.0, shape=(64, 4096)):
    """Return a program: forward, something else, backward."""

    def program():
        np.random.seed(3)
        x = chainer.Variable(data(low, high, *shape))
        y = function(x * 1)
        loss = F.sum(y)
        del y
        F.tanh(x)
        loss.backward()
        return [loss.array, x.grad]

    return program


def edited():
    """With ``verify`` that is worth a word of our own."""
    x = chainer.Variable(data(-1, 1, 64, 4096))
    h = F.tanh(x * 1)
    z = F.sum(F.sin(F.exp(h)))
    h.array[:] += 2
    z.backward()
    return [z.array, x.grad]


def nothing(x):
    return F.sin(F.relu(F.sigmoid(x))) * 2


def nans(x):
    """Not-a-numbers go through ReLU, of which one bit is kept."""
    return F.relu(F.relu(x / 0.5) * 2)


def in_patches(x):
    return F.local_response_normalization(F.reshape(x, (64, 16, 16, 16)) * 1e15)


def pooled(x):
    return F.average_pooling_2d(F.reshape(x, (64, 16, 16, 16)) * 3e38, 2)


def convolved(x):
    conv = L.Convolution2D(16, 16, 3, pad=1)
    conv.W.array[...] = data(-2, 2, *conv.W.shape)
    conv.b.array[...] = 3e38
    return conv(F.reshape(x - x + 3e37, (64, 16, 16, 16)))  # the same in all images


PROGRAMS = {
    "nothing": graph(nothing),
    "overflow": graph(lambda x: F.relu(F.leaky_relu(F.exp(x * 100)) * 2)),
    "overflow made again": graph(lambda x: F.sin(F.relu(F.square(F.tanh(x) * 1e30) + 1))),
    "underflow made again": graph(lambda x: F.sin(F.leaky_relu(F.square(F.tanh(x) * 1e-30)))),
    "division": graph(lambda x: F.log(F.relu(x)) * 2),
    "invalid": graph(lambda x: F.relu(F.sqrt(x) - 1)),
    "infinite differences": graph(lambda x: F.sin((x * 1e38) * 10 - (x * 1e38) * 10)),
    "in backward": graph(lambda x: F.sqrt(F.relu(F.tanh(x)))),
    "in backward, of what is made again": graph(lambda x: (F.sigmoid(x) * 0 + x) ** -1.0 * 2, 0, 1),
    "not a number": graph(nans, np.nan, np.nan),
    "half precision": graph(lambda x: F.sin(F.square(F.cast(F.tanh(x), "e") * 300))),
    "a large sum": graph(lambda x: F.softmax(F.tanh(x) * 1e38 * 3)),
    "normalization in pieces": graph(in_patches),
    "pooling in pieces": graph(pooled),
    "convolution in pieces": graph(convolved),
    "edited": edited,
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_user_is_told_what_stock_chainer_tells(name, how, settings):
    program = PROGRAMS[name]
    expected, told = watched(program, how)
    gc.collect()
    with chainer_ooc.out_of_core_mode(**SETTINGS[settings]):
        state.managers()[0].shortages.has_told = False
        actual, told_now = watched(program, how)
    assert_same_bits(actual, expected)
    assert told_now == told


@pytest.mark.parametrize("how", ["error", "raise"])
def test_after_an_error_the_next_iteration_is_right(how):
    """The first fails in the midst of forward, the second in the midst of backward."""
    x = chainer.Variable(data(-1, 1, 64, 4096))

    def run(function):
        x.cleargrad()
        loss = F.sum(F.sin(F.tanh(function(F.sigmoid(x)) * 2)))
        loss.backward()
        return [loss.array, x.grad]

    bad = {
        "forward": lambda h: F.exp(h * 1000),
        "backward": lambda h: F.sqrt(h * 0),
    }
    expected = run(F.sin)
    for settings in SETTINGS.values():
        with chainer_ooc.out_of_core_mode(**settings):
            for function in bad.values():
                result, _ = watched(lambda function=function: run(function), how)
                assert isinstance(result, str)
                assert state.local.running is None
                assert_same_bits(run(F.sin), expected)


def test_what_we_say_ends_nothing_and_is_logged(caplog):
    """Where the user's filters make errors of warnings, too."""
    x = chainer.Variable(data(-1, 1, 64, 4096))
    with chainer_ooc.out_of_core_mode(limit="1MiB"):
        (manager,) = state.managers()
        manager.shortages = Shortages(manager.device)
        result, _ = watched(lambda: F.sum(F.exp(F.exp(x))).backward(), "error")
        watched(manager.shortages.tell, "error")
    assert result is None
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("chainer_ooc", "WARNING")
    assert " needs " in record.getMessage()
    caplog.clear()
    with chainer_ooc.out_of_core_mode(**SETTINGS["verify"]):
        for _ in range(3):
            result, _ = watched(edited, "error")
    assert isinstance(result, list)
    (record,) = caplog.records  # said once
    assert "an array of 1048576 bytes that Tanh saved" in record.getMessage()
    assert record.pathname == __file__  # the user's line


def test_without_logging_what_we_say_goes_to_stderr(run_python):
    code = """
import logging, numpy as np, chainer, chainer_ooc, chainer.functions as F
chainer_ooc.enable(swap_all=True, min_bytes=1, verify=True)
logger = logging.getLogger("chainer_ooc")
def edit(rows):
    h = F.tanh(chainer.Variable(np.ones((rows, 9), "f")))
    y = F.sum(F.exp(h))
    h.array[...] = 2
    y.backward()
for rows in 1, 1, 2: edit(rows)
logger.setLevel("ERROR"); edit(3)
logger.setLevel("WARNING"); logging.disable(); edit(4)
logging.disable(logging.NOTSET); logging.basicConfig(format="%(name)s %(lineno)d %(message).20s"); edit(5)
"""
    done = run_python("-c", code)
    lines = done.stderr.splitlines()
    assert [line[:29] for line in lines] == [
        "chainer_ooc: an array of 36 b",
        "chainer_ooc: an array of 72 b",
        "chainer_ooc 9 an array of 180",
    ], done.stderr


def test_who_shows_warnings_may_fail(caplog, monkeypatch):
    def emit(*args, **kwargs):
        raise ValueError("no place to show it")

    monkeypatch.setattr(caplog.handler, "emit", emit)
    with chainer_ooc.out_of_core_mode(**SETTINGS["verify"]):
        edited()


class Warns(chainer.FunctionNode):
    """Warns whenever it runs."""

    def forward(self, inputs):
        warnings.warn("hot", UserWarning, stacklevel=1)
        return (inputs[0] * 2,)

    def backward(self, indexes, gradients):
        return (gradients[0] * 2,)


def test_functions_that_warn_are_run_again_without_a_word():
    chainer_ooc.recomputable(Warns)
    x = chainer.Variable(data(-1, 1, 64, 64))
    before = chainer_ooc.stats().storages_remade
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1, discard_all=True):
        F.tanh(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = F.sum(F.sin(Warns().apply((F.tanh(x),))[0]))
            F.tanh(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss.backward()
    assert chainer_ooc.stats().storages_remade > before
