"""While all fits, functions pass with no code of Python, and nothing of Chainer's graph is a property yet."""

import subprocess
import sys
import textwrap

import chainer
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.graph import hooks
from chainer_ooc.swap.devices.ram import native

pytestmark = pytest.mark.extension


@pytest.fixture
def margin():
    """Set a margin of 100 bytes and 3 functions; void it in the end."""
    hooks.install()
    settings = object()
    native.allocator.set_margin(100, 3, settings)
    yield lambda *inputs: native.allocator.covers(inputs, settings)
    native.ask_again()


def array(nbytes):
    return np.zeros(nbytes, np.uint8)


def test_the_bytes_of_arrays_and_variables_are_taken_off(margin):
    assert margin(array(40), chainer.Variable(array(59)))
    assert not margin(array(2))  # it takes nothing off
    assert margin(array(1))
    assert not margin(array(1))


def test_it_covers_so_many_functions(margin):
    assert [margin(array(1)) for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(
    "inputs",
    [
        (),
        (array(0),),
        (None,),
        (array(1), None),
        (array(1), "x"),
        (array(1).view(np.matrix),),
        (chainer.Variable(),),
        (chainer.Parameter(),),
    ],
    ids=repr,
)
def test_what_is_not_an_array_is_left_to_python(margin, inputs):
    assert not margin(*inputs)
    assert margin(array(100))  # nothing was taken off


def test_a_list_may_shrink_while_it_is_looked_at(margin):
    class Shrinking(chainer.Variable):
        @property
        def _data(self):
            inputs.clear()
            return [array(1)]

        @_data.setter
        def _data(self, value):
            pass

    settings = object()
    native.allocator.set_margin(100, 3, settings)
    inputs = [array(1)]
    inputs.append(Shrinking(array(1)))
    inputs.append(array(1))
    assert native.allocator.covers(inputs, settings)
    assert not inputs
    assert not native.allocator.covers(iter([array(1)]), settings)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_no_exception_is_lost(margin, error):
    class Failing(chainer.Variable):
        @property
        def _data(self):
            raise error("from here")

        @_data.setter
        def _data(self, value):
            pass

    with pytest.raises(error, match="from here"):
        margin(array(1), Failing(array(1)))


def test_it_is_void_where_it_was_not_made_for(margin):
    assert not native.allocator.covers((array(1),), object())
    assert margin(array(1))
    native.allocator.install()
    try:
        assert not margin(array(1))
    finally:
        native.allocator.uninstall()
    assert margin(array(1))
    native.ask_again()
    assert not margin(array(1))


def functions_that_python_sees(monkeypatch):
    """Return the list of the inputs of functions that :func:`hooks._before` will see."""
    seen, before = [], hooks._before
    monkeypatch.setattr(
        hooks, "_before", lambda inputs, how: seen.append(inputs) or before(inputs, how)
    )
    return seen


def test_python_sees_few_functions_while_all_fits_and_all_once_it_does_not(monkeypatch):
    x = chainer.Variable(np.ones((4, 4), np.float32))
    state.unhook_allocations()
    with chainer_ooc.out_of_core_mode(limit="64GiB"):
        manager = state.manager_of_ram()
        monkeypatch.setattr(manager, "has_been_short", False)  # whatever other tests did
        chainer.functions.sigmoid(x)
        seen = functions_that_python_sees(monkeypatch)
        for _ in range(50):
            chainer.functions.sigmoid(x)
        assert len(seen) <= 2
        manager._note_shortage()
        seen.clear()
        for _ in range(10):
            chainer.functions.sigmoid(x)
        assert len(seen) == 10


def test_a_trace_that_begins_later_sees_every_function(tmp_path, monkeypatch):
    x = chainer.Variable(np.ones((4, 4), np.float32))
    with chainer_ooc.out_of_core_mode(limit="1GiB"):
        chainer.functions.sigmoid(x)
        with chainer_ooc.out_of_core_mode(trace=tmp_path / "trace.json"):
            seen = functions_that_python_sees(monkeypatch)
            for _ in range(10):
                chainer.functions.sigmoid(x)
            assert len(seen) == 10


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


TRAINING = """
    import logging
    import chainer_ooc
    import chainer, chainer.functions as F, chainer.links as L, numpy as np
    stock = vars(chainer.Variable)["raw_array"]

    def step(model, x):
        h = F.relu(model[0](x))
        h.array = h.array * np.float32(0.5)  # nobody has saved the old one yet
        y = F.sum(F.tanh(model[1](h)) * h)
        model.cleargrads()
        y.backward()
        return [float(np.abs(p.grad).sum()) for p in model.params()]

    np.random.seed(0)
    model = chainer.ChainList(L.Linear(512, 512), L.Linear(512, 512))
    x = np.random.rand(2048, 512).astype(np.float32)
    sums = step(model, x)
"""


def test_nothing_is_a_property_until_memory_gets_short():
    code = (
        TRAINING
        + """
    chainer_ooc.enable("64GiB")
    assert step(model, x) == sums
    assert vars(chainer.Variable)["raw_array"] is stock
    assert vars(chainer.variable.VariableNode).get("_data") is None
    h = F.relu(model[0](x))
    h.array = h.array * np.float32(0.5)
    y = F.sum(F.tanh(model[1](h)) * h)
    logging.disable()  # that limit is too low
    chainer_ooc.enable("1MiB", single_backward=True)
    F.sigmoid(x)
    assert chainer_ooc.stats().bytes_out > 0
    assert vars(chainer.Variable)["raw_array"] is not stock
    model.cleargrads()
    y.backward()
    assert [float(np.abs(p.grad).sum()) for p in model.params()] == sums
    chainer_ooc.disable()
    print("same")
    """
    )
    assert run(code) == "same\n"
