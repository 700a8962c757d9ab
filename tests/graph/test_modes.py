"""The mode decides when arrays are saved, never when they are read; threads, forks, other kinds of arrays."""

from __future__ import annotations

import collections
import importlib
import os
import pickle
import threading

import chainer
import chainer.functions as F
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.errors import GraphReleasedError
from chainer_ooc.graph import hooks
from chainer_ooc.swap.devices.copy_threads import CopyThreads
from chainer_ooc.swap.storage import PackedArray
from chainer_ooc.testing import assert_same_bits, force_copies

force_copies_module = importlib.import_module("chainer_ooc.testing.force_copies")

X = np.random.RandomState(0).standard_normal((3, 4)).astype(np.float32)
SETTINGS = {"swap_all": True, "min_bytes": 1}


def graph():
    x = chainer.Variable(X)
    return x, F.sum(F.sin(F.exp(F.copy(x, -1))) * 2)


def flush():
    F.identity(np.ones(1, np.float32))


def saved_of(y):
    """Return what stands in for the input of the sine."""
    return y.creator.inputs[0].creator_node.inputs[0].creator_node.inputs[0].__dict__["_data"]


EXPECTED = np.cos(np.exp(X)) * np.exp(X) * 2


@pytest.fixture
def gradient():
    x, y = graph()
    y.backward()
    return x.grad


def test_backward_after_disable(gradient):
    chainer_ooc.enable(**SETTINGS)
    try:
        x, y = graph()
        flush()
    finally:
        chainer_ooc.disable()
    assert not chainer_ooc.is_enabled()
    assert type(saved_of(y)) is PackedArray and saved_of(y).storage.owner is None
    y.backward()
    assert_same_bits(x.grad, gradient)


def test_backward_after_the_with(gradient):
    with chainer_ooc.out_of_core_mode(**SETTINGS):
        x, y = graph()
        flush()
    assert saved_of(y).storage.owner is None
    y.backward()
    y.backward()
    assert_same_bits(x.grad, gradient + gradient)


def test_backward_in_another_thread(gradient):
    with chainer_ooc.out_of_core_mode(**SETTINGS):
        x, y = graph()
        flush()
        thread = threading.Thread(target=y.backward)
        thread.start()
        thread.join()
    assert_same_bits(x.grad, gradient)


def test_a_graph_begun_outside_goes_on_inside_and_the_other_way_round(gradient):
    x = chainer.Variable(X)
    h = F.exp(F.copy(x, -1))
    with chainer_ooc.out_of_core_mode(**SETTINGS):
        h = F.sin(h)
        flush()
        with chainer_ooc.out_of_core_mode(False):
            y = F.sum(h * 2)
            del h
            flush()
        flush()
        y.backward()
    assert_same_bits(x.grad, gradient)


def test_the_mode_of_a_thread_is_its_own():
    seen = {}

    def child():
        seen["child"] = chainer_ooc.is_enabled()

    with chainer_ooc.out_of_core_mode(**SETTINGS):
        thread = threading.Thread(target=child)
        thread.start()
        thread.join()
        seen["here"] = chainer_ooc.is_enabled()
    assert seen == {"child": False, "here": True}
    chainer_ooc.enable(**SETTINGS)
    try:
        thread = threading.Thread(target=child)
        thread.start()
        thread.join()
        with chainer_ooc.out_of_core_mode(False):
            seen["here"] = chainer_ooc.is_enabled()
    finally:
        chainer_ooc.disable()
    assert seen == {"child": True, "here": False}


def test_off_nothing_is_saved():
    _, y = graph()
    flush()
    assert type(saved_of(y)) is np.ndarray


def test_generators_that_take_turns_leave_the_mode_as_it_was():
    def steps(**settings):
        with chainer_ooc.out_of_core_mode(**settings):
            while True:
                yield state.current()

    first, second = steps(min_bytes=1), steps(min_bytes=2)
    assert next(first).min_bytes == 1
    assert next(second).min_bytes == 2
    first.close()
    assert state.current() is not None and state.current().min_bytes == 2
    second.close()
    assert state.current() is None


def test_what_is_smaller_than_min_bytes_stays_in_memory():
    def gradients():
        x, z = chainer.Variable(np.ones((3, 4), "f")), chainer.Variable(np.ones((300, 4), "f"))
        y = F.sum(F.exp(F.exp(x)) * x) + F.sum(F.exp(F.exp(z)))
        F.tanh(z)  # all goes that is large enough
        y.backward()
        return [x.grad, z.grad]

    expected = gradients()
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1000):
        before = chainer_ooc.stats().bytes_in
        assert_same_bits(gradients(), expected)
        assert (chainer_ooc.stats().bytes_in - before) % (300 * 4 * 4) == 0
        assert chainer_ooc.stats().bytes_in > before


def test_many_threads_train_at_once():
    def train(results, index):
        x = chainer.Variable(X * (index + 1))
        for _ in range(20):
            h = F.copy(x, -1)
            for _ in range(4):
                h = F.tanh(F.exp(-(F.sin(h) ** 2)))
            x.cleargrad()
            F.sum(h).backward()
        results[index] = x.grad

    expected, actual = {}, {}
    for index in range(4):
        train(expected, index)
    chainer_ooc.enable(**SETTINGS)
    try:
        threads = [threading.Thread(target=train, args=(actual, index)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        chainer_ooc.disable()
    assert_same_bits([actual.get(k) for k in range(4)], [expected[k] for k in range(4)])


def test_one_graph_read_by_many_threads(gradient):
    with chainer_ooc.out_of_core_mode(**SETTINGS):
        _, y = graph()
        flush()
    node = y.creator.inputs[0].creator_node.inputs[0].creator_node.inputs[0]
    wrong = []

    def read():
        for _ in range(50):
            if not np.array_equal(node.data, np.exp(X)):
                wrong.append(node.data)
            state.managers()[0].move_all_out()

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Once, or as often as one likes.


def test_single_backward_drops_and_says_so(gradient):
    with chainer_ooc.out_of_core_mode(single_backward=True, **SETTINGS):
        x, y = graph()
        flush()
        y.backward()
        assert_same_bits(x.grad, gradient)
        for again in (y.backward, lambda: saved_of(y).get()):
            with pytest.raises(
                GraphReleasedError, match=r"Exp saved was dropped.*single_backward=False"
            ):
                again()


def test_single_backward_waits_for_the_last_user():
    def run():
        x = chainer.Variable(X)
        h = F.exp(F.copy(x, -1))
        losses = [F.sum(F.sin(h)), F.sum(F.cos(h))]
        del h
        flush()
        total = losses[0] * 2 + losses[1]
        total.backward()
        return x.grad

    expected = run()
    with chainer_ooc.out_of_core_mode(single_backward=True, **SETTINGS):
        assert_same_bits(run(), expected)


# Forks.


def in_child(function):
    """Return what ``function`` returns in a forked child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(write, "wb") as pipe:
                try:
                    pickle.dump(function(), pipe)
                except BaseException as error:
                    pickle.dump(repr(error), pipe)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        result = pickle.load(pipe)
    os.waitpid(child, 0)
    return result


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_begins_with_the_mode_off_and_leaves_its_parents_blocks(gradient):
    chainer_ooc.enable(**SETTINGS)
    try:
        x, y = graph()
        flush()
        (manager,) = state.managers()
        before = manager.device.file.allocated, manager.device.file.size

        def child():
            seen = chainer_ooc.is_enabled(), threading.active_count(), state.managers()
            y.backward()  # what the parent saved can be read
            mine = x.grad
            chainer_ooc.enable(**SETTINGS)
            z, w = graph()
            flush()
            w.backward()
            return seen, mine, z.grad, chainer_ooc.stats().bytes_in

        seen, mine, own, bytes_in = in_child(child)
        assert seen == (False, 1, [])
        assert_same_bits([mine, own], [gradient, gradient])
        assert bytes_in
        manager.settle()
        assert (manager.device.file.allocated, manager.device.file.size) == before
        y.backward()
        assert_same_bits(x.grad, gradient)
    finally:
        chainer_ooc.disable()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_inside_of_the_with_may_leave_it():
    def child():
        try:
            with chainer_ooc.out_of_core_mode(**SETTINGS):
                if os.fork() == 0:
                    return "child", chainer_ooc.is_enabled()
                os.wait()
            return None
        except BaseException as error:
            return repr(error)

    def both():
        read, write = os.pipe()
        result = child()
        if result:
            os.write(write, pickle.dumps(result))
            os._exit(0)
        return pickle.loads(os.read(read, 1000))

    assert in_child(both) == ("child", False)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_multiprocess_iterator_after_enable():
    chainer_ooc.enable(**SETTINGS)
    try:
        x, y = graph()
        flush()
        iterator = chainer.iterators.MultiprocessIterator(
            [(X, 1)] * 8, 4, repeat=False, shuffle=False, n_processes=2
        )
        with iterator:
            batches = list(iterator)
        assert len(batches) == 2 and np.array_equal(batches[1][3][0], X)
        y.backward()
    finally:
        chainer_ooc.disable()
    assert x.grad is not None


# What passes through.


def test_static_graph_passes_through():
    from chainer import static_graph

    class Static(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                np.random.seed(0)
                self.l1 = chainer.links.Linear(4, 5)
                self.l2 = chainer.links.Linear(5, 2)

        @static_graph
        def forward(self, x):
            return self.l2(F.relu(self.l1(x)))

    def train():
        model = Static()
        optimizer = chainer.optimizers.SGD(0.1).setup(model)
        for step in range(3):
            optimizer.update(lambda step=step: F.sum(F.square(model(X + step))))
        return [p.array for p in model.params()]

    with chainer.using_config("use_static_graph", True):
        expected = train()
        with chainer_ooc.out_of_core_mode(**SETTINGS):
            assert_same_bits(train(), expected)
            loss = F.sum(F.square(Static()(X)))
            flush()
            labels = {storage.label for storage in state.managers()[0].storages()}
            assert not labels & {"LinearFunction", "ReLU"}
            loss.backward()


def test_arrays_of_other_kinds_are_left_alone():
    with chainer_ooc.out_of_core_mode(**SETTINGS):

        class Other(np.ndarray):
            pass

        x = chainer.Variable(X)
        h = F.exp(F.copy(x, -1))
        h.node._data = X.view(Other)
        y = F.sum(F.sin(h))
        assert type(h.node._data) is np.ndarray or isinstance(h.node._data, Other)
        y.backward()
    assert state.manager_for(object()) is None
    assert state.manager_for(X.view(Other)) is None


@pytest.mark.parametrize("given", [((X, X), 2), ("text", 2), (3, 2), ([[1.0]], 2)])
def test_what_is_no_array_gets_the_error_of_chainer(given):
    errors = []
    for on in (False, True):
        with (
            chainer_ooc.out_of_core_mode(on, **(SETTINGS if on else {})),
            pytest.raises(TypeError) as error,
        ):
            F.tile(*given)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


# force_copies() itself.


def test_force_copies_ends_as_it_began(gradient):
    apply, managers = chainer.FunctionNode.apply, dict(state.process.managers)
    with pytest.raises(KeyError), force_copies():
        x, y = graph()
        assert chainer_ooc.is_enabled()
        raise KeyError
    assert not chainer_ooc.is_enabled()
    assert state.process.managers == managers
    assert chainer.FunctionNode.apply is apply or managers == {}
    y.backward()  # what was saved inside is read outside
    assert_same_bits(x.grad, gradient)


def test_force_copies_reads_the_copy_and_not_what_is_held():
    x = chainer.Variable(X.copy())
    with force_copies() as moved:
        y = F.sum(F.sin(x))
        x.array[...] = 0
        y.backward()
        assert_same_bits(x.grad, np.cos(X))
        assert moved.bytes_in == X.nbytes
        assert "bytes out" in repr(moved)
        with pytest.raises(AttributeError):
            moved.nothing  # noqa: B018


def test_force_copies_poisons_what_is_released(monkeypatch):
    seen = []

    def spy(storage):
        poison(storage)
        seen.append(bytes(storage.owner))

    with force_copies():
        x = chainer.Variable(X.copy())
        y = F.sum(F.sin(x))
        node = y.creator.inputs[0].creator_node.inputs[0]
        array = node.data
        poison = force_copies_module._poison
        monkeypatch.setattr(force_copies_module, "_poison", spy)
        flush()
        assert seen == []
        assert_same_bits(array, X)
        del array
        flush()
        assert len(seen) == 1 and set(seen[0]) == {force_copies_module.POISON}
        assert_same_bits(node.data, X)


def test_another_thread_saves_the_last_function_first(monkeypatch):
    class Emptied(collections.deque):
        def __len__(self):
            return super().__len__() + 1

    monkeypatch.setattr(hooks, "_pending", Emptied())
    hooks.save_pending()
    hooks._forget_dead()


def test_what_is_computed_in_a_thread_that_copies_stays_in_memory():
    """The collector of garbage may run finalizers there, and the engine may be waiting for that thread."""
    seen = []

    def compute():
        before = chainer_ooc.stats().storages_out
        x = chainer.Variable(np.ones((64, 64), "f"))
        F.sum(F.exp(F.exp(x))).backward()
        seen.append((chainer_ooc.is_enabled(), chainer_ooc.stats().storages_out - before))

    chainer_ooc.enable(swap_all=True, min_bytes=1)
    threads = CopyThreads(1, "chainer_ooc-copy")
    threads.submit(compute)
    threads.close()
    chainer_ooc.disable()
    assert seen == [(False, 0)]
