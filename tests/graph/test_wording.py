"""What words a message raises nothing: where memory is short, functions compute as on stock Chainer."""

from __future__ import annotations

import gc
import json

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc.errors import OutOfMemoryError, SettingError
from chainer_ooc.graph.hooks import describe
from chainer_ooc.testing import assert_same_bits

#: Allocations of this many rows are announced, and do not fit below the limit: what runs is described.
ROWS = 1 << 13


def variable(width, seed=0):
    data = np.random.RandomState(seed).uniform(-1, 1, (ROWS, width)).astype("f")
    return chainer.Variable(data)


def both(program, **settings):
    """Run a program on stock Chainer and where memory is short; compare the bits of what it returns."""
    np.random.seed(0)
    expected = program()
    np.random.seed(0)
    with chainer_ooc.out_of_core_mode(limit="1MiB", **settings):
        actual = program()
    assert_same_bits(actual, expected)


def gradients_of(function, *widths):
    """Return a program that returns what ``function`` gives, summed, and the gradients of its inputs."""

    def program():
        leaves = [variable(width, seed) for seed, width in enumerate(widths)]
        y = function(*[x * 1 for x in leaves])
        F.sum(y).backward()
        return [y.array, *(x.grad for x in leaves)]

    return program


def run_link(link, result):
    def program():
        model, x = link(), variable(64)
        model.cleargrads()
        y = x
        for _ in range(2):
            y = result(model, y)
        F.sum(y).backward()
        return [y.array, x.grad, *(p.grad for p in model.params())]

    return program


class Raises:
    """Cannot be worded."""

    def __init__(self, array=None):
        self.array = array

    def __repr__(self):
        raise KeyError("no repr")

    __str__ = __repr__


class Silent(chainer.FunctionNode):
    """Has a label that cannot be had once it has run: stock Chainer asks for it before."""

    has_run = False

    @property
    def label(self):
        if self.has_run:
            raise KeyError("no label")
        return "still to run"

    def forward(self, inputs):
        self.has_run = True
        self.retain_inputs((0,))
        return (inputs[0] * inputs[0],)

    def backward(self, indexes, gradients):
        (x,) = self.get_retained_inputs()
        return (gradients[0] * x * 2,)


class Mute(Silent):
    has_run = True


class Odd(Silent):
    label = Raises()


class Number(Silent):
    label = 3


class OldStyle(chainer.Function):
    """The same for functions of the old style."""

    label = Raises()

    def forward(self, inputs):
        return (inputs[0] * 3,)

    def backward(self, inputs, gradients):
        return (gradients[0] * 3,)


class Shapeless(chainer.Variable):
    """Does not tell its shape."""

    @property
    def shape(self):
        raise KeyError("no shape")


class Typeless(chainer.Variable):
    """Does not tell its type."""

    @property
    def dtype(self):
        raise KeyError("no type")


class Listed(chainer.Variable):
    """Tells its shape as a list, as other libraries do."""

    @property
    def shape(self):
        return list(super().shape)


PROGRAMS = {
    "lstm, h only": gradients_of(lambda c, x: F.lstm(c, x)[1], 32, 128),
    "lstm, c only": gradients_of(lambda c, x: F.lstm(c, x)[0], 32, 128),
    "slstm, h only": gradients_of(lambda a, b, x, y: F.slstm(a, b, x, y)[1], 32, 32, 128, 128),
    "slstm, c only": gradients_of(lambda a, b, x, y: F.slstm(a, b, x, y)[0], 32, 32, 128, 128),
    "tree_lstm, h only": gradients_of(lambda a, b, x: F.tree_lstm(a, b, x)[1], 32, 32, 160),
    "L.LSTM": run_link(lambda: L.LSTM(64, 64), lambda link, x: link(x)),
    "L.StatelessLSTM, c only": run_link(
        lambda: L.StatelessLSTM(64, 64), lambda link, x: link(None, None, x)[0]
    ),
    "L.StatefulPeepholeLSTM": run_link(
        lambda: L.StatefulPeepholeLSTM(64, 64), lambda link, x: link(x)
    ),
    "a label that raises": gradients_of(lambda x: Silent().apply((x,))[0], 64),
    "a label that is no text": gradients_of(lambda x: Odd().apply((x,))[0], 64),
    "an old function": gradients_of(lambda x: OldStyle()(x), 64),
    "a variable that tells no shape": gradients_of(lambda x: F.exp(Shapeless(x.array)) * x, 64),
    "a variable that tells no type": gradients_of(lambda x: F.exp(Typeless(x.array)) * x, 64),
    "a variable that tells a list": gradients_of(lambda x: F.exp(Listed(x.array)) * x, 64),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_runs_where_memory_is_short(name):
    both(PROGRAMS[name])


@pytest.mark.parametrize("function", [Silent, Odd, Number, OldStyle])
def test_labels_in_a_trace(function, tmp_path):
    path = tmp_path / "trace.json"

    def program():
        x = variable(64)
        y = F.tanh(OldStyle()(x) if function is OldStyle else function().apply((x,))[0])
        F.sum(y).backward()
        return [x.grad]

    both(program, trace=str(path))
    events = json.loads(path.read_text())["traceEvents"]
    name = "3" if function is Number else function.__name__
    ran = {(event["cat"], event["name"]) for event in events if event["ph"] == "X"}
    assert {("forward", name), ("backward", name)} <= ran


@pytest.mark.extension  # without it the first function that was seen is named
def test_none_is_named_in_an_error():
    with pytest.raises(OutOfMemoryError, match=r"LSTM\S*\(.*, None.*\) needs"):
        x, c = variable(1024), variable(256)
        h = F.lstm(c * 1, x * 1)[1]
        with chainer_ooc.out_of_core_mode(limit="1MiB", strict=True):
            F.sum(h).backward()


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((None, np.ones(3)), "Mute(None, (3,))"),
        ([3, "text"], "Mute(a int, a str)"),
        (None, "Mute(?)"),
        (iter(()), "Mute(?)"),
        ((Raises(), Shapeless(np.ones(2))), "Mute(a Raises, a Shapeless)"),
    ],
)
def test_whatever_the_inputs_are(inputs, said):
    assert describe((Mute(), inputs)) == said


@pytest.mark.parametrize("x", [3, "text", None, object(), [1.0, 2.0], Raises()])
def test_what_is_no_array_gets_stock_chainers_error(x):
    errors = []
    for on in (False, True):
        with chainer_ooc.out_of_core_mode(on, **({"limit": "1MiB"} if on else {})):
            with pytest.raises(Exception) as caught:
                F.exp(x)
            errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_an_iterator_of_inputs_is_stock_chainers_too():
    errors = []
    for on in (False, True):
        with chainer_ooc.out_of_core_mode(on, **({"limit": "1MiB"} if on else {})):
            with pytest.raises(Exception) as caught:
                Silent().apply(x for x in [variable(64)])
            errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


class Proxy:
    """Stands for something that is not there, as proxies of frameworks do outside of a request."""

    def __init__(self, array):
        object.__setattr__(self, "array", array)

    def __getattribute__(self, name):
        raise RuntimeError("there is no object to work on")


class Named(chainer.Variable):
    """Has a name that cannot be had."""

    @property
    def name(self):
        raise KeyError("no name")


class Key:
    def __hash__(self):
        return 1

    def __repr__(self):
        raise KeyError("no repr")


HOLDERS = {
    "proxy": Proxy,
    "variable": Named,
    "key": lambda array: {Key(): array},
    "attribute": Raises,
}


@pytest.mark.parametrize("how", HOLDERS)
def test_holders_that_cannot_be_looked_at_are_told_all_the_same(how):
    gc.collect()
    with chainer_ooc.out_of_core_mode(min_bytes=1):
        h = F.exp(np.full((50, 60), 0.5, "f"))
        graph = F.tanh(h) * 2
        y = F.sin(h)
        holder = HOLDERS[how](h.array)
        del h
        explanation = chainer_ooc.explain()
    held = [one for one in explanation.held if one.nbytes == 12000]
    assert held and all(one.holders for one in held)
    assert "held by" in str(explanation)
    del graph, y, holder


@pytest.mark.parametrize(
    ("name", "error"),
    [("limit", SettingError), ("min_bytes", SettingError), ("strict", SettingError)],
)
def test_settings_that_cannot_be_worded(name, error):
    with pytest.raises(error, match="<Raises>"):
        chainer_ooc.enable(**{name: Raises()})
    with pytest.raises(error, match="<Raises>"):
        chainer_ooc.out_of_core_mode(Raises())
    with pytest.raises(TypeError, match="<Raises>"):
        chainer_ooc.recomputable(Raises())
    assert not chainer_ooc.is_enabled()
