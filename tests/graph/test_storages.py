"""Storages, not arrays: views share one; whatever lies in memory comes back as it lay; what is held stays."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.graph import hooks
from chainer_ooc.swap.storage import PackedArray, State
from chainer_ooc.testing import assert_same_bits


class Keep(chainer.FunctionNode):
    """Keeps the arrays that it is given."""

    def __init__(self, **arrays):
        self.names = tuple(arrays)
        for name, array in arrays.items():
            setattr(self, name, array)

    def forward(self, inputs):
        return (inputs[0] * 1,)

    def saved(self):
        return [self.__dict__[name] for name in self.names]


def keep(**arrays):
    func = Keep(**arrays)
    arrays.clear()
    func.apply((np.ones(1, np.float32),))
    return func


def flush():
    """Run a function: whatever nobody holds is out after it."""
    F.identity(np.ones(1, np.float32))


def base(dtype=np.float32):
    return np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(dtype)


LAYOUTS = {
    "C order": base,
    "Fortran order": lambda: np.asfortranarray(base()),
    "permuted axes": lambda: np.ascontiguousarray(base().transpose(1, 0, 2)).transpose(1, 0, 2),
    "strided": lambda: base()[:, ::2, 1::2],
    "reversed": lambda: base()[::-1, :, ::-1],
    "broadcast": lambda: np.broadcast_to(base()[0, 0], (5, 4)),
    "transposed": lambda: base().transpose(2, 0, 1),
    "a new axis": lambda: base()[:, None],
    "0-d": lambda: np.array(3.5, np.float32),
    "0-d view": lambda: base()[1, 2, 3, ...],
    "viewed as bytes": lambda: base().view(np.uint8),
    "one element": lambda: base()[1:, 1:2, 3:],
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("writeable", [True, False])
def test_memory_layouts(name, writeable, everything_out):
    expected = LAYOUTS[name]()
    array = LAYOUTS[name]()
    if array.flags.writeable:
        array.flags.writeable = writeable
    flags = array.flags.writeable, array.flags.c_contiguous, array.flags.f_contiguous
    func = keep(array=array)
    del array
    flush()
    (saved,) = func.saved()
    assert saved.storage.state is State.OUT
    array = func.array
    assert_same_bits(array, expected)
    assert array.strides == expected.strides
    assert (array.flags.writeable, array.flags.c_contiguous, array.flags.f_contiguous) == flags
    assert func.array is array


DTYPES = [*"?bBhHiIlLqQefdgFDG", "S5", "U3", "M8[s]", "m8[ms]", ">f4", "<i2", "V6"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, everything_out):
    def make():
        count = 12 * np.dtype(dtype).itemsize
        return (np.arange(count) % 2).astype(np.uint8).view(dtype).reshape(3, 4)

    func = keep(array=make())
    flush()
    (saved,) = func.saved()
    assert saved.storage.state is State.OUT
    assert func.array.dtype == np.dtype(dtype)
    assert func.array.tobytes() == make().tobytes()


def test_structured_dtype(everything_out):
    array = np.zeros(3, [("a", "f4"), ("b", "i8", 2)])
    array["a"], array["b"] = 1.5, 7
    expected = array.copy()
    func = keep(array=array)
    del array
    flush()
    assert func.saved()[0].storage.state is State.OUT
    assert_same_bits(func.array, expected)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_what_cannot_move_stays(everything_out, tmp_path):
    file = tmp_path / "map"
    file.write_bytes(bytes(range(48)))
    arrays = {
        "objects": np.array([1, "two", None], object),
        "empty": np.empty((0, 3), np.float32),
        "mapped": np.memmap(file, np.uint8, "r"),
        "foreign": np.frombuffer(bytes(range(48)), np.uint8),
        "masked": np.ma.masked_array([1.0, 2.0], [True, False]),
        "matrix": np.asmatrix(np.eye(2)),
    }
    names = list(arrays)
    kept = dict(arrays)
    func = keep(**arrays)
    del arrays
    flush()
    for name in names:
        assert getattr(func, name) is kept[name]


def test_views_share_one_storage_and_one_copy(everything_out):
    array = base()
    func = keep(whole=array, part=array[:, 1], other=array.T, pair=(array[0], array[1]))
    del array
    flush()
    pair = func.__dict__["pair"]
    saved = [func.__dict__[name] for name in ("whole", "part", "other")] + list(pair)
    assert len({s.storage for s in saved}) == 1
    assert saved[0].storage.state is State.OUT
    before = everything_out.counters.bytes_in
    whole, part, other, pair = func.whole, func.part, func.other, func.pair
    assert everything_out.counters.bytes_in - before == whole.nbytes
    part[...] = -1
    assert (whole[:, 1] == -1).all() and (other[:, 1] == -1).all() and (pair[1][1] == -1).all()


def test_what_was_fetched_and_is_saved_again_is_the_same_storage(everything_out):
    x = chainer.Variable(base())
    h = F.exp(F.copy(x, -1))
    y = F.sum(F.sin(h))
    storage = h.node.__dict__["_data"].storage
    del h
    flush()
    assert storage.state is State.OUT
    copies = everything_out.counters.bytes_out
    (gx,) = chainer.grad([y], [x], enable_double_backprop=True)
    del y
    flush()
    # The second graph holds it as well: all that it saves of exp's output is the storage that there was.
    assert storage in everything_out.storages()
    assert (
        everything_out.counters.bytes_out - copies == storage.nbytes + 4
    )  # Mul's input, SinGrad's
    del gx


def test_a_dead_nodes_retained_output_is_saved_once(everything_out):
    x = chainer.Variable(base())
    y = F.sum(F.tanh(F.exp(x)))  # tanh retains its output, whose variable dies
    func = y.creator.inputs[0].creator_node
    storage = func.__dict__["_retained_output_data"][0].storage
    flush()
    assert storage.state is State.OUT
    (again,) = func.get_retained_outputs()
    z = F.square(again)
    assert z.creator.inputs[0].__dict__["_data"].storage is storage


# Arrays that somebody holds.


def test_what_is_held_is_neither_copied_nor_moved(everything_out):
    held = base()
    before = everything_out.counters.bytes_out
    func = keep(array=held)
    flush()
    flush()
    assert func.array is held
    assert everything_out.counters.bytes_out == before
    (saved,) = func.saved()
    assert saved.storage.state is State.RESIDENT
    view = held[0]
    del held
    flush()
    assert saved.storage.state is State.RESIDENT
    del view
    flush()
    assert saved.storage.state is State.OUT


def test_edits_before_during_and_after_release(everything_out):
    expected = base()
    held = base()
    func = keep(array=held)
    held[0, 0, 0] = expected[0, 0, 0] = 100  # held: never copied
    flush()
    del held
    flush()
    (saved,) = func.saved()
    assert saved.storage.state is State.OUT
    array = func.array  # comes back to life
    array[0, 0, 1] = expected[0, 0, 1] = 101
    flush()
    assert saved.storage.state is State.RESIDENT
    array[0, 0, 2] = expected[0, 0, 2] = 102
    del array
    flush()
    assert saved.storage.state is State.OUT
    func.array[0, 0, 3] = expected[0, 0, 3] = 103  # held by nobody after the statement
    flush()
    assert saved.storage.state is State.OUT
    assert_same_bits(func.array, expected)


def test_an_edit_of_a_view_that_outlives_the_array(everything_out):
    func = keep(array=base())
    flush()
    view = func.array[1, 1:]
    flush()
    view[...] = -5
    del view
    flush()
    assert func.saved()[0].storage.state is State.OUT
    assert (func.array[1, 1:] == -5).all()


def test_an_edit_through_a_buffer(everything_out):
    func = keep(array=base())
    flush()
    buffer = memoryview(func.array)
    flush()
    assert func.saved()[0].storage.state is State.RESIDENT
    buffer[0, 0, 0] = 77.0
    del buffer
    flush()
    assert func.saved()[0].storage.state is State.OUT
    assert func.array[0, 0, 0] == 77


def test_what_a_function_uses_is_not_released_under_it(everything_out):
    func = keep(array=base())
    flush()
    (saved,) = func.saved()
    (array,) = everything_out.fetch([saved], read_only=True)
    everything_out._evictor.release_clean(1 << 60)
    assert saved.storage.state is State.BOTH
    assert everything_out.read(saved, read_only=True) is array
    del array
    everything_out._evictor.release_clean(1 << 60)
    assert saved.storage.state is State.OUT


def test_a_function_of_a_user_that_edits_what_it_retained(everything_out):
    class Eater(chainer.FunctionNode):
        def forward(self, inputs):
            self.retain_inputs((0,))
            return (inputs[0] * 1,)

        def backward(self, indexes, gradients):
            (x,) = self.get_retained_inputs()
            x.array[...] += 1
            return (gradients[0] * x.array.copy(),)

    x = chainer.Variable(base())
    (y,) = Eater().apply((F.copy(x, -1),))
    y = F.sum(y)
    for expected in (base() + 1, 2 * base() + 3):
        y.backward()
        assert_same_bits(x.grad, expected)
        flush()


def test_a_function_of_a_user_inside_forget_that_edits_its_input(everything_out):
    class Doubler(chainer.FunctionNode):
        def forward(self, inputs):
            inputs[0][...] *= 2
            return (inputs[0] + 0,)

        def backward(self, indexes, gradients):
            return gradients

    def run():
        x = chainer.Variable(base())
        h = F.copy(x, -1) + 0
        y = F.sum(F.forget(lambda h: F.sin(Doubler().apply((h,))[0]), h))
        node = h.node
        del h
        y.backward()
        everything_out._evictor.release_clean(1 << 60)
        return x.grad, np.array(node.data)

    inside = run()
    with chainer_ooc.out_of_core_mode(False):
        assert_same_bits(inside, run())


def test_leaves_stay(everything_out):
    x = chainer.Variable(base())
    link = L.Linear(4, 3)
    y = F.sum(link(F.sum(x * x, axis=1)))
    flush()
    for node in [x.node, link.W.node, link.b.node]:
        assert type(node.__dict__.get("_data")) is not PackedArray
    y.backward()
    hooks.save_pending()
    assert link.W.array is link.W.data and x.grad is not None


# No needless fetch.


def test_a_chain_fetches_each_array_once(everything_out):
    x = chainer.Variable(np.random.rand(50, 40).astype(np.float32))
    h = F.sigmoid(x)
    for _ in range(9):
        h = F.sigmoid(h)
    y = F.sum(h)
    del h
    flush()
    out, fetched = everything_out.counters.bytes_out, everything_out.counters.bytes_in
    y.backward()
    came_back = everything_out.counters.bytes_in - fetched
    assert came_back == 10 * x.array.nbytes
    assert came_back <= out + everything_out.counters.bytes_out
    assert everything_out.counters.bytes_out == out


def test_looking_at_nodes_fetches_nothing(everything_out):
    x = chainer.Variable(base())
    h = F.exp(x)
    y = F.sum(F.add(F.sin(h), F.cos(h)))
    node = h.node
    del h
    flush()
    fetched = everything_out.counters.bytes_in
    assert node.shape == (2, 3, 4) and node.dtype == np.float32 and node.label
    node.grad  # noqa: B018
    chainer.variable._check_grad_type(None, node, True, np.zeros((2, 3, 4), np.float32))
    chainer.computational_graph.build_computational_graph([y]).dump()
    y.unchain_backward()
    assert everything_out.counters.bytes_in == fetched


def test_backward_that_uses_nothing_fetches_nothing(everything_out):
    x = chainer.Variable(base())
    y = F.sum(F.reshape(F.exp(F.copy(x, -1)) + 1, (6, 4)))
    exp = y.creator.inputs[0].creator_node.inputs[0].creator_node.inputs[0].creator_node
    flush()
    fetched = everything_out.counters.bytes_in
    y.backward()
    assert exp.label == "exp"
    assert everything_out.counters.bytes_in - fetched == x.array.nbytes  # exp's output alone


# While memory is plenty, functions are not looked at.


def test_what_backward_used_before_it_was_saved_counts_as_used():
    with chainer_ooc.out_of_core_mode(min_bytes=1, limit=1 << 40):
        x = chainer.Variable(base())
        y = F.sum(F.exp(F.copy(x, -1)))
        z = F.sum(F.sin(F.tanh(F.copy(x, -1))))
        y.backward()
        hooks.save_pending()
        (manager,) = state.managers()
        used = {s.label: s.used for s in manager.storages()}
        assert used["Exp"] and not used["Tanh"]
        z.backward()
        assert all(s.used for s in manager.storages())


def test_functions_that_died_are_forgotten():
    with chainer_ooc.out_of_core_mode(min_bytes=1, limit=1 << 40):
        for _ in range(6000):
            F.identity(np.ones(1, np.float32))
        assert len(hooks._pending) <= 4097


def test_backward_fetches_ahead(everything_out):
    x = chainer.Variable(base())
    h = F.copy(x, -1)
    for _ in range(4):
        h = F.exp(F.sin(h))
    y = F.sum(h)
    del h
    flush()
    before = everything_out.counters.prefetched
    y.backward()
    assert everything_out.counters.prefetched > before
