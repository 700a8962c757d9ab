"""explain(): what is held, and by whom."""

from __future__ import annotations

import gc

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

import chainer_ooc


class Net(chainer.Chain):
    """Keeps what it computes as attributes."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.first = L.Linear(64, 64)
            self.second = L.Linear(64, 64)

    def forward(self, x):
        self.hidden = F.relu(self.first(x))
        return F.sigmoid(self.second(self.hidden))


def test_holders_are_named():
    model = Net()
    kept = []
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1):
        y = model(np.ones((32, 64), np.float32))
        kept.append(F.tanh(y).array)
        alone = F.tanh(F.exp(y) * 2)
        explanation = chainer_ooc.explain(model)
    by_function = {one.function: one for one in explanation.held}
    assert by_function["ReLU"].holders == ("/hidden",)
    assert by_function["ReLU"].nbytes == 32 * 64 * 4
    assert any("local variable" in h or "Variable" in h for h in by_function["Sigmoid"].holders)
    assert "Exp" not in by_function
    assert explanation.resident_bytes < explanation.saved_bytes
    text = str(explanation)
    assert "/hidden" in text
    assert "ReLU" in text
    held_before = len(explanation.held)
    del model.hidden, y, kept, alone
    with chainer_ooc.out_of_core_mode():
        assert len(chainer_ooc.explain(model).held) < held_before


def test_a_list_and_a_dict_are_named():
    with chainer_ooc.out_of_core_mode(min_bytes=1):
        x = chainer.Variable(np.ones(1000, np.float32))
        outputs = [F.exp(x).array, 1]
        table = {"out": F.tanh(x).array}
        y = F.exp(chainer.as_variable(outputs[0])) + F.tanh(chainer.as_variable(table["out"]))
        graph = [F.exp(x)]
        row = {one.function: one.holders for one in chainer_ooc.explain().held}
    assert y is not None
    assert "a live Variable (1000,)" in row["Exp"] or "a list of 1" in row["Exp"]
    del graph


def test_with_nothing_saved_it_says_so():
    gc.collect()
    with chainer_ooc.out_of_core_mode():
        pass
    assert "0 saved allocations" in str(chainer_ooc.explain())
