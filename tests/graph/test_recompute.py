"""What is run again instead of moved: the bits of stock Chainer, whatever is written to in between."""

from __future__ import annotations

import copy
import gc

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.errors import CorruptCopyError
from chainer_ooc.swap.storage import State
from chainer_ooc.testing import assert_same_bits

ON = {"swap_all": True, "min_bytes": 1, "discard_all": True}


@pytest.fixture(autouse=True)
def short_of_memory():
    """Recipes are given once memory has been short."""
    with chainer_ooc.out_of_core_mode(swap_all=True):
        F.tanh(np.zeros(3, "f"))


@pytest.fixture
def remade():
    """Return a function that returns how many storages have been made again since it was last called."""
    before = [chainer_ooc.stats().storages_remade]

    def count():
        before.append(chainer_ooc.stats().storages_remade)
        return before[-1] - before[-2]

    return count


def both(program, **settings):
    """Run a program on stock Chainer and with recompute; compare the bits of what it returns."""
    results = []
    for on in (False, True):
        np.random.seed(1)
        context = chainer_ooc.out_of_core_mode(on, **{**ON, **settings} if on else {})
        with context:
            results.append(program())
        gc.collect()
    assert_same_bits(results[1], results[0])


SHAPE = (4, 6, 9, 9)
NORM = L.BatchNormalization(6)


def predict(link, h):
    with chainer.using_config("train", False):
        return link(h)


FUNCTIONS = {
    "relu": F.relu,
    "clipped_relu": lambda h: F.clipped_relu(h, 0.5),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
    "square": F.square,
    "add": lambda h: h + F.relu(h),
    "add constant": lambda h: h + 3,
    "sub": lambda h: h - F.relu(h),
    "mul": lambda h: h * F.relu(h),
    "mul constant": lambda h: h * 0.3,
    "neg": lambda h: -h,
    "sum of three": lambda h: F.add(h, F.relu(h), F.tanh(h)),
    "cast": lambda h: F.cast(h, np.float64),
    "concat": lambda h: F.concat([h, F.relu(h)], axis=1),
    "transpose": lambda h: F.relu(F.transpose(h, (0, 2, 3, 1))),
    "expand and squeeze": lambda h: F.relu(F.squeeze(F.expand_dims(h, 1), 1)),
    "softmax": F.softmax,
    "log_softmax": F.log_softmax,
    "lstm": lambda h: F.lstm(h[:, 0], F.reshape(h, (4, -1, 9))[:, :36])[1],
    "lrn": F.local_response_normalization,
    "dropout": lambda h: F.dropout(h, 0.3),
    "max_pooling": lambda h: F.max_pooling_2d(h, 3, 2),
    "average_pooling": lambda h: F.average_pooling_2d(h, 3, 2),
    "unpooling": lambda h: F.unpooling_2d(h, 2, cover_all=False),
    "unpooling to an odd size": lambda h: F.unpooling_2d(h, 3, 2, outsize=(18, 19)),
    "unpooling nd": lambda h: F.unpooling_nd(h, 2, cover_all=False),
    "batch_normalization": L.BatchNormalization(6),
    "fixed_batch_normalization": lambda h: predict(NORM, h),
    "a chain": lambda h: F.relu(-F.sigmoid(h * 2) + 1),
}


@pytest.mark.parametrize("dtype", ["f", "e"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, dtype, remade):
    function = FUNCTIONS[name]
    data = np.random.rand(*SHAPE).astype(dtype) - 0.5

    def program():
        x = chainer.Variable(data)
        h = F.tanh(x)
        with chainer.using_config("dtype", np.dtype(dtype)):
            y = function(h)
        loss = F.sum(y * y) + F.sum(F.cast(h * h, y.dtype))
        del h, y
        F.tanh(x)  # all goes
        loss.backward()
        return [loss.array, x.grad]

    both(program)
    assert remade() > 0


@pytest.mark.parametrize(
    ("function", "nbytes"),
    [
        (lambda h: F.max_pooling_2d(h, 3, 2), 8),
        (lambda h: F.max_pooling_nd(h, 3, 2), 8),
        (F.local_response_normalization, 2 * 4),
    ],
    ids=["max_pooling_2d", "max_pooling_nd", "lrn"],
)
def test_attributes_are_made_again_as_well(function, nbytes):
    """The indexes of max pooling take twice as much as its result."""
    data = np.random.rand(4, 6, 17, 17).astype("f")
    before = chainer_ooc.stats().bytes_discarded

    def program():
        x = chainer.Variable(data)
        h = F.tanh(x)
        y = function(h)
        loss = F.sum(y * 2)
        del h
        if chainer_ooc.is_enabled():
            for storage in state.managers()[0].storages():
                state.managers()[0]._evictor.give_up(storage)
        loss.backward()
        return [loss.array, x.grad, y.array]

    both(program, swap_all=False, limit=1 << 40)
    with chainer.no_backprop_mode():
        size = function(data).size
    assert chainer_ooc.stats().bytes_discarded - before == nbytes * size


def weights(*shape):
    return (np.random.RandomState(7).rand(*shape) - 0.5).astype("f")


#: Products and their weights, which are larger than what is copied for each recipe.
COSTLY = {
    "convolution": (F.convolution_2d, weights(40, 48, 3, 3), {"pad": 1}),
    "strided, dilated": (F.convolution_2d, weights(48, 48, 3, 3), {"dilate": 2, "stride": (1, 2)}),
    "grouped": (F.convolution_2d, weights(96, 24, 3, 3), {"groups": 2}),
    "nd": (F.convolution_nd, weights(40, 48, 3, 3), {"pad": 1}),
    "deconvolution, cropped": (F.deconvolution_2d, weights(48, 40, 4, 4), {"pad": 1, "stride": 2}),
    "deconvolution": (F.deconvolution_2d, weights(48, 40, 3, 3), {"pad": 1}),
    "deconvolution nd": (F.deconvolution_nd, weights(48, 40, 3, 3), {}),
    "linear": (F.linear, weights(600, 36), {"n_batch_axes": 3}),
}


@pytest.mark.parametrize("when", ["never", "before", "since"])
@pytest.mark.parametrize("name", COSTLY)
def test_products_for_plans_whenever_weights_are_modified(name, when, remade):
    function, W, options = COSTLY[name]
    data = np.random.rand(8, 48, 36, 36).astype("f") - 0.5

    def program():
        x, weight = chainer.Variable(data), chainer.Parameter(W.copy())
        h = F.tanh(x)
        y = F.relu(function(h, weight, **options))
        loss = F.sum(y * y)
        del h, y
        if when == "before":
            weight.array[:] *= 2
        if chainer_ooc.is_enabled():
            for storage in state.managers()[0].storages():
                state.managers()[0]._evictor.give_up(storage)
        if when == "since":
            weight.array[:] *= 2
        loss.backward()
        return [loss.array, x.grad, weight.grad]

    both(program, swap_all=False, limit=1 << 40)
    assert remade() == (0 if when == "before" else 1)


class Block(chainer.Chain):
    """A residual network with batch normalization and dropout."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.first = L.Convolution2D(3, 8, 3, pad=1)
            for number in range(4):
                setattr(self, f"conv{number}", L.Convolution2D(8, 8, 3, pad=1, nobias=True))
                setattr(self, f"norm{number}", L.BatchNormalization(8))
            self.last = L.Linear(None, 4)

    def forward(self, x):
        h = self.first(x)
        for number in range(4):
            r = self[f"norm{number}"](self[f"conv{number}"](h))
            h = F.relu(h + F.dropout(F.relu(r), 0.2))
        return self.last(F.max_pooling_2d(h, 2))


def train(iterations=2, twice=False):
    np.random.seed(3)
    net = Block()
    model = L.Classifier(net)
    optimizer = chainer.optimizers.Adam().setup(model)
    x, t = np.random.rand(5, 3, 12, 12).astype("f"), np.arange(5, dtype="i") % 4
    losses = []
    for _ in range(iterations):
        loss = model(x, t)
        model.cleargrads()
        loss.backward()
        if twice:
            loss.backward()
        optimizer.update()
        losses.append(loss.array)
    kept = [net[f"norm{n}"].avg_var for n in range(4)]
    return [*losses, *kept, *(p.array for p in model.params())]


@pytest.mark.parametrize("how", ["once", "twice", "single_backward"])
def test_a_network_and_its_statistics(how, remade):
    settings = {"single_backward": True} if how == "single_backward" else {}
    before = chainer_ooc.stats()
    both(lambda: train(twice=how == "twice"), **settings)
    after = chainer_ooc.stats()
    assert remade() >= 8
    discarded = after.bytes_discarded - before.bytes_discarded
    assert discarded > 0.2 * (after.bytes_out - before.bytes_out)


def test_under_a_limit_as_well(remade):
    manager = state.managers()[0]
    used = manager.device.used_bytes
    # All but so much is somebody else's.
    room = 250_000

    def pretended():
        return (1 << 30) - room + sum(s.nbytes for s in manager.storages() if s.owner is not None)

    manager.device.used_bytes = pretended
    try:
        both(train, swap_all=False, limit=(1 << 30) + (1 << 24))
    finally:
        manager.device.used_bytes = used
    assert remade() > 0


def test_what_was_modified_before_it_went_is_moved():
    def program():
        x = chainer.Variable(np.random.rand(50, 50).astype("f"))
        h = F.tanh(x)
        y = F.relu(h)
        loss = F.sum(y * y) + F.sum(h * h)
        y.array[:] *= 2
        del y, h
        F.tanh(x)
        loss.backward()
        return [x.grad]

    both(program)


@pytest.mark.parametrize("when", ["before it is used", "after it was used"])
def test_inputs_that_are_modified_make_nothing_again(when):
    def program():
        x = chainer.Variable(np.random.rand(50, 50).astype("f"))
        h = F.tanh(x)
        if when == "before it is used":
            h.array[:] += 0.5
        y = F.relu(h)
        if when == "after it was used":
            h.array[:] += 0.5
        loss = F.sum(y * y) + F.sum(h * h)
        del y, h
        F.tanh(x)
        loss.backward()
        return [x.grad]

    both(program)


def test_what_is_made_from_an_array_comes_before_somebody_gets_that(remade):
    def program():
        x = chainer.Variable(np.random.rand(50, 50).astype("f"))
        h = F.tanh(x)
        y = F.relu(h)
        loss = F.sum(y * y) + F.sum(h * h)
        node = h.node
        del y, h
        F.tanh(x)  # all goes
        node.data[:] = -1  # the user gets h again, and writes to it
        loss.backward()
        return [x.grad]

    both(program)
    assert remade() > 0


def test_graphs_that_die_give_everything_back(bytes_in_use):
    with chainer_ooc.out_of_core_mode(**ON):
        for _ in range(3):
            x = chainer.Variable(np.random.rand(50, 50).astype("f"))
            h = F.tanh(x)
            y = F.relu(h)
            loss = F.sum(y * y) + F.sum(h * h)
            del y, h
            F.tanh(x)
            assert any(s.state is State.DISCARDED for s in state.managers()[0].storages())
            del loss
    del x
    assert bytes_in_use() == (0, 0)


class Noisy(chainer.FunctionNode):
    """Not what it is said to be."""

    def forward(self, inputs):
        return (inputs[0] + np.random.rand(*inputs[0].shape).astype("f"),)

    def backward(self, indexes, gradients):
        return gradients


def test_users_register_functions_and_other_bits_are_an_error():
    def program():
        x = chainer.Variable(np.random.rand(50, 50).astype("f"))
        h = F.tanh(x)
        (y,) = Noisy().apply((h,))
        loss = F.sum(y * y) + F.sum(h * h)
        del y, h
        F.tanh(x)
        loss.backward()
        return [x.grad]

    both(program)  # not registered
    chainer_ooc.recomputable(Noisy)
    with (
        pytest.raises(CorruptCopyError, match=r'was run again: .*recompute="never"'),
        chainer_ooc.out_of_core_mode(**ON),
    ):
        program()
    chainer_ooc.recomputable(
        Noisy, rerun=lambda func, inputs: func.forward(inputs), when=lambda f: False
    )
    both(program)


@pytest.mark.parametrize("cls", [Noisy(), int, "Noisy"])
def test_what_is_no_function_is_refused(cls):
    with pytest.raises(TypeError, match="is not a subclass of"):
        chainer_ooc.recomputable(cls)


class Writer(chainer.FunctionNode):
    """Writes to its input, as no function should."""

    def forward(self, inputs):
        inputs[0][...] *= 1.25
        return (inputs[0] * 2,)


class Writes(chainer.FunctionHook):
    """Writes to what a function has used."""

    name = "writes"

    def forward_postprocess(self, function, in_data):
        for array in in_data:
            array[...] *= 0.5


def edited(v, how):
    """Write to the array of a variable, or give it another one, between two functions."""
    if how == "in place":
        v.array[...] *= 0.9
    elif how == "a part of a view":
        v.array.ravel()[::3] += 0.125
    elif how == "anew":
        v.array = v.array * 0.9
    elif how == "reversed":
        v.array = v.array[::-1]
    elif how == "another layout":
        v.array = np.asfortranarray(v.array)
    elif how == "of a node":
        v.node.data = v._data[0] = v.array - 0.25
    elif how == "a reshaped variable":
        F.reshape(v, (-1,)).array[::2] += 0.25
    elif how == "a slice":
        v[2:9].array[...] -= 0.25
    elif how == "a transposed variable's data":
        F.transpose(v).data[3] *= 2
    elif how == "a copied variable":
        copy.copy(v).raw_array[1] = 0.5
    elif how == "what Identity returned":
        F.identity(v).array[...] *= 0.75
    elif how == "not Chainer's function":
        Writer().apply((v,))
    elif how == "a view for not Chainer's function":
        Writer().apply((F.reshape(v, (-1, 10)),))
    elif how == "what a function keeps":
        for reference in v.creator_node.outputs:
            if reference().data is not None:
                reference().data[::3] -= 0.125
    elif how == "a hook":
        with Writes():
            F.absolute(v)
    elif how == "and undone":
        v.array[...] *= 2
        F.sum(F.tanh(v))
        v.array[...] /= 2
    elif how == "the mask":
        v.creator_node.mask[::2] *= 0.5
    elif how == "a number":
        v.creator_node.slope = 0.75
    elif how == "the input":
        array = v.creator_node.inputs[0].get_variable().array
        if array is not None:
            array[...] += 0.25


#: Of these some retain their inputs, some their outputs, some neither.
CHAINS = {
    "dropout": (lambda x: F.dropout(x, 0.4), F.tanh, F.exp, F.sin),
    "leaky": (lambda x: F.leaky_relu(x, 0.25), F.square, F.sin),
    "nothing retained": (lambda x: x * 0.5, lambda x: x + 1, lambda x: -x, F.tanh, F.sin),
    "outputs": (F.tanh, F.sigmoid, F.relu, F.exp),
    "mixed": (F.sigmoid, lambda x: x * x, lambda x: x + 2, F.sin, F.relu, F.sin),
    "views": (F.tanh, lambda x: F.reshape(x, (-1, 5)), F.transpose, lambda x: x * 2, F.sin),
    "sums": (F.tanh, lambda x: F.add(x, x, F.sigmoid(x)), lambda x: x - F.relu(x), F.absolute),
}
EDITS = (
    "a reshaped variable",
    "a slice",
    "a transposed variable's data",
    "a copied variable",
    "what Identity returned",
    "not Chainer's function",
    "a view for not Chainer's function",
    "what a function keeps",
    "a hook",
    "and undone",
    "in place",
    "a part of a view",
    "anew",
    "reversed",
    "another layout",
    "of a node",
    "the input",
)
SHORT = {
    "all out": {"swap_all": True, "min_bytes": 64},
    "little memory": {"limit": "1MiB", "min_bytes": 64},
    "little memory, large arrays": {"limit": "1MiB", "min_bytes": 15_000},
    "single_backward": {"swap_all": True, "min_bytes": 64, "single_backward": True},
}


def chain_with_an_edit(functions, where, how):
    def program():
        x = chainer.Variable(np.linspace(-1, 1, 4000).astype("f").reshape(20, 200))
        v = x * 1
        for number, function in enumerate(functions):
            v = function(v)
            if number == where:
                edited(v, how)
        loss = F.sum(F.sin(v))
        del v
        F.tanh(x)  # all goes
        loss.backward()
        return [x.grad, loss.array]

    return program


@pytest.mark.parametrize("mode_of", SHORT)
@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("name", CHAINS)
def test_edits_between_functions(name, how, mode_of):
    for where in range(len(CHAINS[name])):
        program = chain_with_an_edit(CHAINS[name], where, how)
        both(program, **{"swap_all": False, **SHORT[mode_of]})


@pytest.mark.parametrize(("name", "how"), [("dropout", "the mask"), ("leaky", "a number")])
def test_edits_of_attributes_between_functions(name, how):
    both(chain_with_an_edit(CHAINS[name], 0, how), min_bytes=64)
    both(chain_with_an_edit(CHAINS[name], 0, how), min_bytes=64_000)  # a mask that is not saved


@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("size", [40, 4000])
def test_edits_of_leaves(when, size):
    """Small ones are copied when a recipe is made: what matters is when the function ran."""

    def program():
        x = chainer.Variable(np.linspace(-1, 1, 40 * size).astype("f").reshape(40, size))
        bias = chainer.Variable(np.linspace(0, 1, size).astype("f"))
        h = F.tanh(x)
        y = h + F.broadcast_to(bias, h.shape)
        w = F.leaky_relu(bias * 2)
        if when == "before":
            bias.array[...] -= 0.5
        z = F.sin(y) * F.broadcast_to(F.sin(w), y.shape)
        if when == "between":
            bias.array = bias.array + 1
        loss = F.sum(F.sin(z))
        del h, y, w, z
        F.tanh(x)
        if when == "after":
            bias.array[...] *= 2
        loss.backward()
        return [x.grad, bias.grad]

    both(program, min_bytes=64)
    both(program, min_bytes=100_000)


@pytest.mark.parametrize("what", ["gamma in place", "gamma anew", "mean", "the function's mean"])
def test_edits_of_small_arrays_that_are_not_saved(what):
    """They are copied for a recipe when that is made, which is later than the function ran."""

    def program():
        x = chainer.Variable(np.linspace(-1, 1, 80_000).astype("f").reshape(200, 400))
        gamma, beta, mean = (chainer.Variable(np.full(400, k, "f")) for k in (1.5, 0.5, 0.25))
        h = F.tanh(x)
        if what == "the function's mean":
            y = F.batch_normalization(h, gamma, beta)
            y.creator_node.mean[...] += 0.125
        else:
            y = F.fixed_batch_normalization(h, gamma, beta, mean, mean * 4)
        if what == "gamma in place":
            gamma.array[...] *= 2
        elif what == "gamma anew":
            gamma.array = gamma.array * 2
        elif what == "mean":
            mean.array[...] -= 0.5
        z = F.sin(y)
        del h, y
        F.tanh(x)
        loss = F.sum(F.sin(z))
        del z
        loss.backward()
        return [x.grad, gamma.grad, beta.grad, loss.array]

    both(program, min_bytes=100_000)


@pytest.mark.parametrize("of_one", [False, True])
def test_hooks_that_write_to_inputs(of_one, remade):
    def program():
        x = chainer.Variable(np.random.rand(50, 50).astype("f"))
        h = F.tanh(x)
        if of_one:
            function = F.activation.leaky_relu.LeakyReLU(0.25)
            function.add_hook(Writes())
            (y,) = function.apply((h,))
        else:
            with Writes():
                y = F.leaky_relu(h)
        z = F.sin(y)
        del h, y
        F.tanh(x)
        loss = F.sum(z)
        loss.backward()
        return [x.grad, loss.array]

    both(program)


def test_with_chainers_own_hooks_functions_are_run_again(remade):
    def program():
        x = chainer.Variable(np.random.rand(50, 50).astype("f"))
        with chainer.function_hooks.TimerHook():
            loss = F.sum(F.sin(F.sigmoid(F.tanh(x)) * 2))
            F.tanh(x)
            loss.backward()
        return [x.grad]

    both(program)
    assert remade() > 0


def test_functions_inside_another_are_edited_before_that_ends():
    class Outer(chainer.FunctionNode):
        """Computes with Chainer's functions, and edits what they gave, in its own backward."""

        def forward(self, inputs):
            self.retain_inputs((0,))
            return (np.tanh(inputs[0]),)

        def backward(self, indexes, gradients):
            (x,) = self.get_retained_inputs()
            y = chainer.Variable(x.array.copy())
            with chainer.force_backprop_mode():
                h = F.dropout(y, 0.4)
                h.array[...] *= 0.9
                inner = F.sum(F.sin(F.exp(F.tanh(h))))
                del h
                inner.backward()
            return (chainer.Variable(y.grad) * gradients[0],)

    def program():
        x = chainer.Variable(np.linspace(-1, 1, 4000).astype("f").reshape(20, 200))
        (y,) = Outer().apply((F.sin(x),))
        F.sum(y).backward()
        return [x.grad]

    both(program)


@pytest.mark.parametrize("limit", [None, "1MiB"])
def test_edits_while_memory_is_plenty_and_short_later(limit):
    """Functions that ran before memory was short are saved later."""
    manager = state.managers()[0]

    def program():
        manager.has_been_short = False
        x = chainer.Variable(np.linspace(-1, 1, 4000).astype("f").reshape(20, 200))
        v = F.dropout(x, 0.4)
        w = F.leaky_relu(v)
        v.array[...] *= 0.9
        if chainer_ooc.is_enabled():
            manager.has_been_short = True
        y = F.exp(F.tanh(w))
        w.array[...] *= 0.5
        z = F.sin(y) * F.sin(F.tanh(v))
        del v, w, y
        if chainer_ooc.is_enabled():
            manager.move_all_out()
        loss = F.sum(z)
        loss.backward()
        return [x.grad, loss.array]

    both(program, swap_all=False, min_bytes=64, limit=limit or 1 << 40)


def test_a_copy_of_a_function_has_not_run():
    import pickle

    with chainer_ooc.out_of_core_mode(**ON):
        x = chainer.Variable(np.random.rand(50, 50).astype("f"))
        h = F.tanh(x)
        y = F.leaky_relu(h)
        function = y.creator_node
        assert function.__dict__["_ooc_run"] is not None
        assert copy.deepcopy(function.__dict__["_ooc_run"]) is None
        assert pickle.loads(pickle.dumps(function.__dict__["_ooc_run"])) is None
