"""Graphs die properly: however one ends, every byte in RAM and on disk comes back."""

from __future__ import annotations

import gc
import threading
import weakref

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer.training import extensions

import chainer_ooc
from chainer_ooc import state

X = np.random.RandomState(0).standard_normal((64, 80)).astype(np.float32)


class Broken(chainer.FunctionNode):
    """Fails in forward or in backward."""

    def __init__(self, where):
        self.where = where

    def forward(self, inputs):
        self.retain_inputs((0,))
        self.mask = inputs[0] > 0
        if self.where == "forward":
            raise ArithmeticError("forward")
        return (inputs[0] * self.mask,)

    def backward(self, indexes, gradients):
        raise ArithmeticError("backward")


def build(x=None, last=F.sin):
    h = F.copy(chainer.Variable(X) if x is None else x, -1)
    for _ in range(3):
        h = F.dropout(F.tanh(F.exp(-(F.sin(h) ** 2))))
    return F.sum(last(h))


def dropped_without_backward():
    build()


def backward_and_gone():
    build().backward()


def double_backward():
    x = chainer.Variable(X)
    (gx,) = chainer.grad([build(x)], [x], enable_double_backprop=True)
    F.sum(gx * gx).backward()


def exception_in_forward():
    with pytest.raises(ArithmeticError):
        build(last=lambda h: Broken("forward").apply((h,))[0])


def exception_in_backward():
    y = build(last=lambda h: Broken("backward").apply((h,))[0])
    with pytest.raises(ArithmeticError):
        y.backward()


def exception_in_a_hook():
    class Hook(chainer.FunctionHook):
        def forward_postprocess(self, function, in_data):
            if function.label == "exp":
                raise ArithmeticError

    with pytest.raises(ArithmeticError), Hook():
        build()


def a_reference_cycle():
    y = build()
    y.creator.cycle = [y]
    h = F.exp(X)
    h.node.itself = h


def unchained():
    y = build()
    y.unchain_backward()
    z = build()
    z.creator.unchain()
    build().unchain()


def kept_on_report():
    with chainer.using_config("keep_graph_on_report", True):
        reporter = chainer.Reporter()
        observation = {}
        with reporter.scope(observation):
            loss = build()
            chainer.report({"loss": loss})
            loss.backward()
        assert observation["loss"].creator_node is not None
        observation.clear()


def losses_of_several_devices():
    """As ParallelUpdater does: all losses are there before the first backward."""
    model = L.Linear(80, 3)
    np.random.seed(0)
    losses = [F.sum(F.square(model(F.tanh(model.xp.asarray(X[k::4]))))) for k in range(4)]
    model.cleargrads()
    for loss in losses:
        loss.backward()


def in_a_thread_that_ends():
    kept = []

    def run():
        kept.append(build())

    thread = threading.Thread(target=run)
    settings = state.current()
    chainer_ooc.enable(swap_all=settings.swap_all, min_bytes=settings.min_bytes)
    try:
        thread.start()
        thread.join()
    finally:
        chainer_ooc.disable()
    kept[0].backward()


def in_a_generator_that_is_closed():
    def steps():
        while True:
            y = build()
            yield y
            y.backward()

    generator = steps()
    next(generator)
    next(generator)
    generator.close()


def dies_in_another_thread():
    kept = [build()]
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()


def state_of_a_recurrent_network():
    model = L.LSTM(80, 8)
    for _ in range(3):
        y = model(X)
    F.sum(y).backward()


def forgotten():
    F.sum(F.forget(lambda h: F.tanh(F.exp(h)), F.sin(chainer.Variable(X)))).backward()


def arrays_taken_along():
    y = build()
    array = y.creator.inputs[0].creator_node.inputs[0].data
    del y
    gc.collect()
    array[...] = 0  # still memory of somebody's
    assert not array.any()


ENDS = [
    dropped_without_backward,
    backward_and_gone,
    double_backward,
    exception_in_forward,
    exception_in_backward,
    exception_in_a_hook,
    a_reference_cycle,
    unchained,
    kept_on_report,
    losses_of_several_devices,
    in_a_thread_that_ends,
    in_a_generator_that_is_closed,
    dies_in_another_thread,
    state_of_a_recurrent_network,
    forgotten,
    arrays_taken_along,
]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("single", [False, True], ids=["", "single_backward"])
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_every_byte_comes_back(end, single, bytes_in_use):
    if single and end in (double_backward, forgotten):
        pytest.skip("backward runs more than once")
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1):
        pass  # so that there is a manager
    before = bytes_in_use()
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1, single_backward=single):
        (manager,) = state.managers()
        out = manager.counters.bytes_out
        end()
        assert manager.counters.bytes_out > out
    assert bytes_in_use() == before


def test_storages_die_with_their_graph_and_not_later(everything_out):
    gc.disable()
    try:
        y = build()
        storages = [weakref.ref(s) for s in everything_out.storages()]
        assert storages
        func = weakref.ref(y.creator)
        y.backward()
        del y
        assert func() is None  # no cycle of ours
        assert not any(reference() for reference in storages)
    finally:
        gc.enable()


def test_out_of_core_keeps_nothing_alive_that_stock_chainer_lets_die(everything_out):
    x = chainer.Variable(X)
    h = F.exp(F.copy(x, -1))
    node = weakref.ref(h.node)
    y = F.sum(F.identity(h))  # nothing retains h; exp retains its output
    del h
    everything_out.save_pending()
    assert node() is not None
    y.unchain_backward()
    assert node() is None
    assert not [s for s in everything_out.storages() if s.label == "Exp"]


def test_dump_graph_with_a_trainer(tmp_path, bytes_in_use):
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1):
        before = bytes_in_use()
        model = L.Classifier(chainer.Sequential(L.Linear(80, 8), F.tanh, L.Linear(8, 3)))
        optimizer = chainer.optimizers.SGD(0.1).setup(model)
        data = chainer.datasets.TupleDataset(X, np.arange(64, dtype=np.int32) % 3)
        iterator = chainer.iterators.SerialIterator(data, 16)
        updater = chainer.training.updaters.StandardUpdater(iterator, optimizer)
        trainer = chainer.training.Trainer(updater, (4, "iteration"), out=tmp_path)
        trainer.extend(extensions.DumpGraph("main/loss"))
        trainer.run()
        assert (tmp_path / "cg.dot").read_text().startswith("digraph")
        model.loss = model.y = model.accuracy = None
        trainer.observation = {}
        del trainer, updater, optimizer, model
        assert bytes_in_use() == before


def test_many_rounds_leave_nothing(bytes_in_use):
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1):
        build().backward()
        before = bytes_in_use()
        size = state.managers()[0].device.file.size
        for _ in range(10):
            build().backward()
        assert bytes_in_use() == before
        assert state.managers()[0].device.file.size == size
