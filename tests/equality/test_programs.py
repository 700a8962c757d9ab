"""What programs do with graphs: each ends with the bits of stock Chainer when everything is read from copies."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import function_hooks, link_hooks, optimizers, serializers

import chainer_ooc
from chainer_ooc.testing import assert_same_bits, force_copies
from tests.equality.test_links import Net, digits, state


@pytest.fixture(params=["force_copies", "swap_all", "single_backward", "parameters"])
def equal(request, moved_bytes):
    """Return a function that runs a program on stock Chainer and out of core, and compares the results."""

    def check(program, once=True, moves=True):
        expected = program()
        if request.param == "force_copies":
            with force_copies() as moved:
                actual = program()
            moved_bytes(moved)
            assert moved.bytes_in or not moves
        else:
            single = request.param == "single_backward"
            if single and not once:
                pytest.skip("backward runs more than once")
            settings = {"single_backward": single}
            if request.param == "parameters":
                settings |= {"swap_parameters": True, "parameters": "auto"}
            with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1, **settings):
                actual = program()
        assert_same_bits(actual, expected)

    return check


def classifier():
    np.random.seed(4)
    return L.Classifier(Net())


def array(*shape):
    return np.random.RandomState(len(shape)).standard_normal(shape).astype(np.float32)


def no_leaf(x):
    """Return ``x`` behind the function that force_copies() would put there."""
    return F.identity(x)


def test_forget_around_a_network(equal):
    def program():
        model = classifier()
        x, t = digits()
        h = F.forget(lambda h: F.relu(model.predictor.conv(h)), F.sin(x))
        loss = F.softmax_cross_entropy(model.predictor.out(F.tanh(model.predictor.hidden(h))), t)
        model.cleargrads()
        loss.backward()
        return state(model)

    equal(program, once=False)


def test_forget_of_forget(equal):
    def program():
        x = chainer.Variable(array(3, 4))

        def inner(h):
            return F.forget(lambda g: F.tanh(g) * F.sigmoid(g), F.exp(h))

        y = F.sum(F.forget(inner, F.sin(no_leaf(x))))
        y.backward()
        return x.grad

    equal(program, once=False)


def test_retain_grad(equal):
    def program():
        x = chainer.Variable(array(3, 4))
        h1 = F.tanh(no_leaf(x))
        h2 = F.sigmoid(h1)
        F.sum(h2 * h1).backward(retain_grad=True)
        return x.grad, h1.grad, h2.grad

    equal(program)


def test_gradient_penalty(equal):
    def program():
        model = classifier()
        x, t = digits()
        x = chainer.Variable(x)
        loss = F.softmax_cross_entropy(model.predictor(no_leaf(x)), t, enable_double_backprop=True)
        (gx,) = chainer.grad([loss], [x], enable_double_backprop=True)
        model.cleargrads()
        (loss + F.sum(gx * gx)).backward()
        return state(model), gx.array

    equal(program, once=False)


def test_third_derivative(equal):
    def program():
        x = chainer.Variable(array(3, 4))
        y = F.sum(F.sin(no_leaf(x)) * F.exp(no_leaf(x)))
        results = []
        for _ in range(3):
            (y,) = chainer.grad([y], [x], enable_double_backprop=True)
            results.append(np.array(y.array))
            y = F.sum(y * y)
        return results

    equal(program, once=False)


def test_backward_twice(equal):
    def program():
        x = chainer.Variable(array(3, 4))
        y = F.sum(F.tanh(F.exp(F.sin(no_leaf(x)))))
        y.backward()
        first = x.grad.copy()
        y.backward()
        return first, x.grad

    equal(program, once=False)


def test_several_losses_of_one_graph(equal):
    def program():
        x = chainer.Variable(array(3, 4))
        h = F.tanh(F.exp(no_leaf(x)))
        losses = [F.sum(F.sigmoid(h)), F.sum(h * h), F.sum(F.exp(h))]
        del h
        for loss in losses:
            loss.backward(loss_scale=2.0)
        return x.grad

    equal(program, once=False)


def test_truncated_backprop_through_time(equal):
    def program():
        np.random.seed(6)
        model = chainer.Sequential(L.EmbedID(5, 4), L.LSTM(4, 4), L.Linear(4, 5))
        optimizer = optimizers.Adam().setup(model)
        words = np.random.RandomState(7).randint(0, 5, (12, 2)).astype(np.int32)
        loss = 0
        for step, (x, t) in enumerate(itertools.pairwise(words)):
            loss += F.softmax_cross_entropy(model(x), t)
            if step % 4 == 3:
                model.cleargrads()
                loss.backward()
                loss.unchain_backward()
                optimizer.update()
                loss = 0
        return state(model)

    equal(program)


class Watch(chainer.FunctionHook):
    """Keeps what functions are given, forward and backward."""

    name = "Watch"

    def __init__(self):
        self.seen = []

    def forward_postprocess(self, function, in_data):
        self.seen.append((function.label, [np.array(x) for x in in_data]))

    def backward_preprocess(self, function, in_data, out_grad):
        # What is not retained is None where the variable has died, on stock Chainer as well.
        arrays = [None if x is None else np.array(x) for x in (*in_data, *out_grad)]
        self.seen.append((function.label, arrays))


def test_function_hooks_see_all_data(equal):
    def program():
        x = chainer.Variable(array(3, 4))
        with Watch() as hook:
            F.sum(F.tanh(no_leaf(x)) * F.sigmoid(F.exp(no_leaf(x)))).backward()
        # The one that force_copies() puts before the first function is seen in backward.
        return [seen for seen in hook.seen if seen[0] != "_Identity"]

    equal(program)


def test_local_function_hook(equal):
    def program():
        x = chainer.Variable(array(3, 4))
        h = no_leaf(x)
        y = F.tanh(h)
        del h
        hook = Watch()
        y.creator.add_hook(hook)
        F.sum(F.exp(y)).backward()
        return hook.seen

    equal(program)


@pytest.mark.parametrize(
    "hook", [function_hooks.TimerHook, link_hooks.TimerHook, link_hooks.SpectralNormalization]
)
def test_hooks_of_chainer(hook, equal):
    def program():
        model = classifier()
        if hook is link_hooks.SpectralNormalization:
            np.random.seed(8)
            model.predictor.out.add_hook(hook())
        optimizer = optimizers.MomentumSGD(0.01).setup(model)
        if hook is link_hooks.SpectralNormalization:
            for _ in range(2):
                optimizer.update(model, *digits())
        else:
            with hook():
                for _ in range(2):
                    optimizer.update(model, *digits())
        return state(model)

    equal(program)


def test_link_hook_that_standardizes_weights(equal):
    def program():
        model = classifier()
        model.predictor.conv.add_hook(link_hooks.WeightStandardization())
        optimizer = optimizers.SGD(0.1).setup(model)
        for _ in range(2):
            optimizer.update(model, *digits())
        return state(model)

    equal(program)


def test_serializers_after_training(equal):
    def program():
        model = classifier()
        optimizer = optimizers.Adam().setup(model)
        optimizer.update(model, *digits())
        file = io.BytesIO()
        serializers.save_npz(file, optimizer)
        saved = io.BytesIO()
        serializers.save_npz(saved, model)
        other = classifier()
        serializers.load_npz(io.BytesIO(saved.getvalue()), other)
        resumed = optimizers.Adam().setup(other)
        serializers.load_npz(io.BytesIO(file.getvalue()), resumed)
        resumed.update(other, *digits())
        return state(model), state(other)

    equal(program)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_models_in_training(duplicate, equal):
    def program():
        model = classifier()
        x, t = digits()
        loss = model(F.sin(x), t)  # the model holds y, loss and the graph
        model.loss = model.y = model.accuracy = None
        other = duplicate(model)
        model.cleargrads()
        other.cleargrads()
        loss.backward()
        other(F.sin(x), t).backward()
        return state(model), [p.grad for p in other.params()]

    equal(program)


def test_deepcopy_of_a_model_with_its_graph(equal):
    def program():
        model = classifier()
        model(F.sin(digits()[0]), digits()[1])
        other = copy.deepcopy(model)
        other.cleargrads()
        other.loss.backward()
        return other.loss.array, [p.grad for p in other.params()]

    equal(program, moves=False)


def test_deepcopy_of_a_graph(equal):
    def program():
        x = chainer.Variable(array(3, 4))
        y = F.sum(F.tanh(F.exp(no_leaf(x))))
        other = copy.deepcopy(y)
        y.backward()
        other.backward()
        return x.grad, other.array

    equal(program)


def test_old_style_functions(equal):
    class Scale(chainer.Function):
        def forward(self, inputs):
            self.sines = [np.sin(x) for x in inputs]
            self.mask = inputs[0] > 0
            self.pair = (inputs[0] * 2, "text")
            self.retain_inputs((0,))
            self.retain_outputs((0,))
            return (self.sines[0] * self.mask * self.pair[0],)

        def backward(self, inputs, gradients):
            (y,) = self.output_data
            return (gradients[0] * self.mask * self.sines[0] * inputs[0] * y * self.pair[0],)

    def program():
        x = chainer.Variable(array(3, 4))
        function = Scale()
        y = F.sum(F.exp(function(no_leaf(x))))
        y.backward()
        return x.grad, function.mask, function.sines, function.pair[0]

    equal(program, once=False)


def test_public_wrappers_read_masks_and_indexes(equal):
    def program():
        x = chainer.Variable(array(2, 2, 4, 4))
        y, mask = F.dropout(no_leaf(x), return_mask=True)
        y, indexes = F.max_pooling_2d(F.tanh(y), 2, return_indices=True)
        y.grad = y.array.copy()
        y.backward()
        return y, mask, indexes, x.grad

    np.random.seed(0)

    def seeded():
        np.random.seed(1)
        return program()

    equal(seeded)


def test_edits_between_forward_and_backward_are_seen(request, equal):
    if "force_copies" in request.node.callspec.id:
        pytest.skip("force_copies() reads the copy")

    def program():
        x = chainer.Variable(array(3, 4))
        h = F.exp(x)
        g = F.tanh(h)
        F.sigmoid(array(3, 4))  # whatever is not held is out now
        h.array[1] = 7
        g.array[0] *= 2
        F.sum(F.sin(g)).backward()
        return x.grad

    equal(program, moves=False)


def test_lists_and_persistents_stay_what_they_are(equal):
    def program():
        np.random.seed(9)
        model = L.BatchNormalization(4)
        kept = model.avg_mean
        x = chainer.Variable(array(5, 4))
        F.sum(F.square(model(F.tanh(no_leaf(x))))).backward()
        assert model.avg_mean is kept
        return kept, x.grad, model.gamma.grad

    equal(program)


def test_exceptions_in_hooks_leave_a_graph_that_works(equal):
    class Failing(chainer.FunctionHook):
        name = "Failing"

        def backward_postprocess(self, function, in_data, out_grad):
            raise KeyError("once")

    def program():
        x = chainer.Variable(array(3, 4))
        y = F.sum(F.tanh(F.exp(no_leaf(x))))
        with pytest.raises(KeyError), Failing():
            y.backward()
        x.cleargrad()
        y.backward()
        return x.grad

    equal(program, once=False)
