"""With single_backward arrays are dropped after their last use: nobody who may rightly read one comes later."""

from __future__ import annotations

import gc

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.errors import GraphReleasedError
from chainer_ooc.swap.storage import State
from chainer_ooc.testing import assert_same_bits

MODES = {
    "all out": {"swap_all": True},
    "recompute": {"swap_all": True, "discard_all": True},
    "memory plenty": {"limit": 1 << 40},
}


@pytest.fixture(params=MODES)
def settings(request):
    return {"min_bytes": 1, "single_backward": True, **MODES[request.param]}


def both(program, settings):
    """Run a program on stock Chainer, and twice in the mode; compare the bits of what it returns."""
    np.random.seed(1)
    expected = program()
    for _ in range(2):
        np.random.seed(1)
        with chainer_ooc.out_of_core_mode(**settings):
            assert_same_bits(program(), expected)
        gc.collect()


def leaf(*shape):
    data = np.linspace(-1, 1, int(np.prod(shape))).astype("f").reshape(shape)
    return chainer.Variable(data)


def save_what_there_is():
    """Have what has run be saved, as where memory gets short."""
    F.sin(np.ones(3, "f"))
    if chainer_ooc.is_enabled():
        state.managers()[0].save_pending()


def set_copy(v):
    v.array = v.array * 0.5


def set_data(v):
    v.data = v.data + 0.25


def set_twice(v):
    v.array = v.array * 2
    save_what_there_is()
    v.array = v.array - 0.125


def set_reversed(v):
    v.array = v.array[::-1]


def set_shifted(v):
    longer = np.concatenate([v.array, v.array[:1]])
    v.array = longer[1:]


def set_through_the_node(v):
    v.node.data = v._data[0] = v.array * 0.75


def set_none_between(v):
    array = v.array * 0.5
    v.array = None
    v.array = array


SETS = (
    *(set_copy, set_data, set_twice, set_reversed, set_shifted, set_through_the_node),
    set_none_between,
)
RETAINERS = {
    "output": F.tanh,
    "output, in an attribute": F.relu,
    "input": lambda x: F.sin(x) * 0 + F.exp(x),
}


@pytest.mark.parametrize("change", SETS)
@pytest.mark.parametrize("first", RETAINERS)
def test_arrays_that_are_set_anew(first, change, settings):
    def program():
        x = leaf(4, 10)
        v = RETAINERS[first](x)
        used = F.sin(v)  # retains its input
        save_what_there_is()
        change(v)
        w = F.absolute(v)  # retains its input: the same node, the new array
        save_what_there_is()
        z = F.exp(v)
        del v
        F.sum(w * z + used).backward()
        return [x.grad, w.array, z.array]

    both(program, settings)


def test_an_array_of_another_variable(settings):
    def program():
        x = leaf(4, 10)
        v, u = F.tanh(x), F.sigmoid(x)
        save_what_there_is()
        v.array = u.array
        w = F.absolute(v) * F.sin(u)
        del v, u
        F.sum(w).backward()
        return [x.grad, w.array]

    both(program, settings)


def network():
    net = chainer.ChainList(*[L.Linear(8, 8) for _ in range(3)])
    net.cleargrads()
    return net


def penalty(act=F.tanh):
    """The gradient penalty of GANs."""
    net, x = network(), leaf(5, 8)
    h = x
    for linear in net:
        h = act(linear(h))
    (g,) = chainer.grad([F.sum(h)], [x], enable_double_backprop=True)
    return net, x, h, g


def returned(net, x, *more):
    return [x.grad, *(p.grad for p in net.params()), *more]


def penalty_alone():
    net, x, _, g = penalty()
    F.sum(g * g).backward()
    return returned(net, x, g.array)


def penalty_and_loss():
    net, x, h, g = penalty(F.sigmoid)
    (F.sum(h) + F.sum((F.sqrt(F.sum(g * g, axis=1)) - 1) ** 2)).backward()
    return returned(net, x, g.array)


def penalty_before_the_loss():
    net, x, h, g = penalty()
    loss = F.sum(h * h)
    del h
    save_what_there_is()
    (loss + F.sum(g * g)).backward()
    return returned(net, x)


def grads_of_grads():
    net, x, _, g = penalty()
    (gg,) = chainer.grad([F.sum(g * g)], [x], enable_double_backprop=True)
    (ggg,) = chainer.grad([F.sum(F.sin(gg))], [x])
    return returned(net, x, g.array, gg.array, ggg.array)


def grads_of_grads_and_backward():
    net, x, _, g = penalty()
    (gg,) = chainer.grad([F.sum(g * g)], [x], enable_double_backprop=True)
    F.sum(gg * g).backward()
    return returned(net, x, gg.array)


def retained_grads():
    net, x, h, _ = penalty()
    y = F.sum(h * h)
    (g,) = chainer.grad([y], [x], enable_double_backprop=True, retain_grad=True)
    F.sum(h.grad_var * 2 + F.sum(g)).backward()
    return returned(net, x, g.array)


def backward_with_a_graph():
    net, x, h, _ = penalty()
    F.sum(h * h).backward(enable_double_backprop=True)
    g, x.grad_var = x.grad_var, None
    net.cleargrads()
    F.sum(g * g).backward()
    return returned(net, x, g.array)


def chainer_backward_with_a_graph():
    net, x, h, _ = penalty()
    y = F.sum(h * h)
    y.grad_var = chainer.Variable(np.array(1, "f"))
    chainer.backward([y], enable_double_backprop=True)
    g, x.grad_var = x.grad_var, None
    net.cleargrads()
    F.sum(g * g * g).backward()
    return returned(net, x, g.array)


def the_same_variable_twice():
    x = leaf(6, 6)
    y = F.tanh(x)
    (g,) = chainer.grad([F.sum(y * y * y)], [y], enable_double_backprop=True)
    F.sum(g * y).backward()
    return [x.grad, g.array]


def indexes_of_pooling():
    """What takes the gradient of max pooling's gradient reads the indexes of the pooling itself."""
    x = leaf(1, 2, 8, 8)
    h = F.tanh(x * x)
    for _ in range(2):
        h = F.sin(F.max_pooling_2d(h, 2))
    loss = F.sum(h * h)
    (g,) = chainer.grad([loss], [x], enable_double_backprop=True)
    (loss + F.sum(g * g)).backward()
    return [x.grad, g.array]


def batch_normalization():
    norm, x = L.BatchNormalization(4), leaf(6, 4)
    norm.cleargrads()
    h = F.sigmoid(norm(F.tanh(x)))
    loss = F.sum(F.sin(h))
    (g,) = chainer.grad([loss], [x], enable_double_backprop=True)
    (loss + F.sum(g * g)).backward()
    return [x.grad, g.array, norm.gamma.grad, norm.beta.grad]


def convolution_and_dropout():
    conv, x = L.Convolution2D(2, 3, 3, pad=1), leaf(2, 2, 6, 6)
    conv.W.array[...] = np.linspace(-1, 1, conv.W.size).reshape(conv.W.shape)
    conv.cleargrads()
    loss = F.sum(F.average_pooling_2d(F.dropout(F.elu(conv(F.tanh(x))), 0.3), 2) ** 2)
    (g,) = chainer.grad([loss], [x], enable_double_backprop=True)
    (loss + F.sum(g * g)).backward()
    return [x.grad, g.array, conv.W.grad, conv.b.grad]


DOUBLE = {
    f.__name__: f
    for f in (
        *(penalty_alone, penalty_and_loss, penalty_before_the_loss, grads_of_grads),
        *(grads_of_grads_and_backward, retained_grads, backward_with_a_graph),
        *(chainer_backward_with_a_graph, the_same_variable_twice, indexes_of_pooling),
        *(batch_normalization, convolution_and_dropout),
    )
}


@pytest.mark.parametrize("name", DOUBLE)
def test_double_backward(name, settings):
    both(lambda: [DOUBLE[name]() for _ in range(2)], settings)


def test_a_double_backward_where_memory_gets_short_in_its_midst():
    """What has run backward before anything was saved is kept, too."""

    def program():
        net, x, _, g = penalty()
        save_what_there_is()
        F.sum(g * g).backward()
        return returned(net, x, g.array)

    both(program, {"min_bytes": 1, "single_backward": True, "limit": 1 << 40})


class Reads(chainer.FunctionHook):
    """Looks at all that stock Chainer gives to hooks, and at what functions retain."""

    name = "reads"

    def __init__(self):
        self.seen = []

    def _look(self, function, in_data, out_grad):
        self.seen += [np.array(x) for x in in_data if x is not None]
        self.seen += [np.array(x) for x in out_grad if x is not None]
        self.seen += [np.array(x.data) for x in function.inputs if x.data is not None]

    backward_preprocess = backward_postprocess = _look


def branches(x):
    """Backward runs the sine, which has retained ``h``, then the cosine, then what has ``h`` but does not retain it."""
    h, k = F.exp(x) + 1, F.exp(x) - 1
    return F.sum(F.sin(h) + (F.cos(k) + (h * 3 + (F.sin(k) + -h))))


def test_hooks_read_what_others_saved(settings):
    def program():
        x, hook = leaf(4, 10), Reads()
        loss = branches(x)
        with hook:
            loss.backward()
        return [x.grad, *hook.seen]

    both(program, settings)


@pytest.mark.parametrize("hook", [chainer.function_hooks.TimerHook, Reads])
def test_hooks_from_the_beginning(hook, settings):
    def program():
        x = leaf(4, 10)
        with hook() as watching:
            branches(x).backward()
        return [x.grad, *getattr(watching, "seen", [])]

    both(program, settings)


@pytest.mark.parametrize("when", ["before", "after", "saved"])
def test_hooks_of_single_functions_read_what_others_saved(when, settings):
    class Mine(chainer.FunctionNode):
        """Retains nothing."""

        def forward(self, inputs):
            return (inputs[0] * 2,)

        def backward(self, indexes, gradients):
            return (gradients[0] * 2,)

    def program():
        x, hook, function = leaf(4, 10), Reads(), Mine()
        h, k = F.exp(x) + 1, F.exp(x) - 1
        if when == "before":
            function.add_hook(hook)
        (y,) = function.apply((h,))
        loss = F.sum(F.sin(h) + (F.cos(k) + y))
        if when == "after":
            function.add_hook(hook)
        del h, k, y
        save_what_there_is()
        if when == "saved":
            function.add_hook(hook)
        loss.backward()
        return [x.grad, *hook.seen]

    both(program, settings)


def test_what_is_not_needed_any_more_is_still_dropped():
    """After one backward nothing is left, and a second one is an error."""
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1, single_backward=True):
        x = leaf(4, 10)
        loss = F.sum(F.sin(F.tanh(F.exp(x))))
        before = {id(s) for s in state.managers()[0].storages()}
        assert before
        loss.backward()
        left = [s for s in state.managers()[0].storages() if s.state is not State.DROPPED]
        assert not left
        with pytest.raises(GraphReleasedError, match="single_backward"):
            loss.backward()


def test_what_a_double_backward_has_used_is_known_as_used():
    """It is kept, and makes room before anything that is still needed."""
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1, single_backward=True):
        x = leaf(4, 10)
        y = F.sum(F.tanh(F.exp(x)))
        (g,) = chainer.grad([y], [x], enable_double_backprop=True)
        storages = [s for s in state.managers()[0].storages() if s.kept]
        assert storages and not any(s.used for s in storages)
        (F.sum(g * g) + y).backward()
        assert all(s.used and s.state is not State.DROPPED for s in storages)
