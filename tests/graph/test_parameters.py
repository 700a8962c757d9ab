"""Parameters, gradients and the state of optimizers move: whatever reads them gets the bits of stock Chainer."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, optimizer_hooks, optimizers, serializers

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.graph.parameters import MovableData, MovableState
from chainer_ooc.swap.storage import PackedArray, State
from chainer_ooc.testing import assert_same_bits

OUT = {"parameters": "auto", "swap_all": True, "swap_parameters": True, "min_bytes": 1}


class Net(chainer.Chain):
    """A convolution, normalization, a lazy layer, one that is used twice."""

    def __init__(self, dtype=np.float32):
        super().__init__()
        with self.init_scope(), chainer.using_config("dtype", dtype):
            self.conv = L.Convolution2D(2, 4, 3, pad=1)
            self.norm = L.BatchNormalization(4)
            self.lazy = L.Linear(None, 8)
            self.twice = L.Linear(8, 8)
            self.out = L.Linear(8, 3)

    def forward(self, x):
        h = F.relu(self.norm(self.conv(x)))
        h = F.tanh(self.lazy(h))
        return self.out(self.twice(F.sigmoid(self.twice(h))))


def rand(*shape, seed=0, dtype=np.float32):
    return np.random.RandomState(seed + len(shape)).standard_normal(shape).astype(dtype)


def model(seed=3, dtype=np.float32):
    np.random.seed(seed)
    return Net(dtype)


def loss_of(net, number=0, dtype=np.float32, double=False):
    x = rand(5, 2, 6, 6, seed=number, dtype=dtype)
    t = np.array([0, 1, 2, 1, 0], np.int32)
    return F.softmax_cross_entropy(net(x), t, enable_double_backprop=double)


def all_of(net):
    """Return the arrays, gradients and state of a model's parameters."""
    found = {}
    for name, p in sorted(net.namedparams()):
        if p.array is None:
            found[name] = None
            continue
        values = {} if p.update_rule is None else p.update_rule.state or {}
        found[name] = [p.array, p.grad, {k: values[k] for k in values}]
    return [
        (name, None if v is None else [np.array(v[0]), v[1], sorted(v[2].items())])
        for name, v in found.items()
    ]


def train(optimizer, steps=3, net=None, dtype=np.float32):
    net = model(dtype=dtype) if net is None else net
    optimizer.setup(net)
    for number in range(steps):
        optimizer.update(loss_of, net, number, dtype)
    return net


@pytest.fixture
def equal():
    """Return a function that runs a program on stock Chainer and with everything out, and compares the results."""
    gc.collect()
    with chainer_ooc.out_of_core_mode(**OUT):
        state.manager_of_ram().move_lasting_out()  # parameters that other tests keep
        others = set(state.manager_of_ram()._transfers.lasting.storages)

    def check(program, moves=True, **settings):
        expected = program()
        with chainer_ooc.out_of_core_mode(**{**OUT, **settings}):
            manager = state.manager_of_ram()
            before = manager.counters.bytes_in_lasting
            actual = program()
            assert (manager.counters.bytes_in_lasting > before) is moves
        assert_same_bits(actual, expected)

    yield check
    gc.collect()
    manager = state.manager_of_ram()
    manager.settle()
    assert set(manager._transfers.lasting.storages) <= others
    assert not manager.device.file.allocated


OPTIMIZERS = {
    "SGD": lambda: optimizers.SGD(0.1),
    "MomentumSGD": lambda: optimizers.MomentumSGD(0.1),
    "CorrectedMomentumSGD": lambda: optimizers.CorrectedMomentumSGD(0.1),
    "NesterovAG": lambda: optimizers.NesterovAG(0.1),
    "AdaGrad": lambda: optimizers.AdaGrad(0.1),
    "AdaDelta": lambda: optimizers.AdaDelta(),
    "Adam": lambda: optimizers.Adam(),
    "AMSGrad": lambda: optimizers.AMSGrad(),
    "AdaBound": lambda: optimizers.AdaBound(),
    "AMSBound": lambda: optimizers.AMSBound(),
    "AdamW": lambda: optimizers.AdamW(weight_decay_rate=0.1),
    "RMSprop": lambda: optimizers.RMSprop(),
    "RMSpropGraves": lambda: optimizers.RMSpropGraves(),
    "SMORMS3": lambda: optimizers.SMORMS3(),
    "MSVAG": lambda: optimizers.MSVAG(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(equal, name):
    def program():
        net = train(OPTIMIZERS[name]())
        return all_of(net)

    equal(program)


HOOKS = {
    "WeightDecay": lambda: optimizer_hooks.WeightDecay(0.01),
    "Lasso": lambda: optimizer_hooks.Lasso(0.01),
    "GradientClipping": lambda: optimizer_hooks.GradientClipping(0.1),
    "GradientHardClipping": lambda: optimizer_hooks.GradientHardClipping(-0.01, 0.01),
    "GradientNoise": lambda: optimizer_hooks.GradientNoise(0.1),
    "GradientLARS": lambda: optimizer_hooks.GradientLARS(),
}


@pytest.mark.parametrize("rule", ["SGD", "Adam"])
@pytest.mark.parametrize("name", HOOKS)
def test_every_hook(equal, name, rule):
    def program():
        optimizer = OPTIMIZERS[rule]()
        optimizer.setup(net := model())
        optimizer.add_hook(HOOKS[name]())
        loss_of(net)
        for number in range(3):
            optimizer.update(loss_of, net, number)
        return all_of(net)

    equal(program)


def test_a_hook_of_one_parameter_and_one_after_the_update(equal):
    def program():
        net = model()
        optimizer = optimizers.Adam().setup(net)
        net.out.W.update_rule.add_hook(optimizer_hooks.WeightDecay(0.1))
        seen = []

        def after(optimizer):
            seen.extend(np.array(p.grad) for p in optimizer.target.params(False))

        optimizer.add_hook(after, "after", timing="post")
        for number in range(2):
            optimizer.update(loss_of, net, number)
        return all_of(net), seen

    equal(program)


@pytest.mark.parametrize("scale", [None, 128.0])
def test_half_precision_with_a_master_copy(equal, scale):
    def program():
        net = model(dtype=np.float16)
        optimizer = optimizers.MomentumSGD(0.1)
        optimizer.use_fp32_update()
        optimizer.setup(net)
        if scale is not None:
            optimizer.set_loss_scale(scale)
        else:
            optimizer.loss_scaling(interval=2)
        for number in range(3):
            optimizer.update(loss_of, net, number, np.float16)
        masters = [
            np.array(m.array) for p in net.params() if (m := p.update_rule._fp32_param) is not None
        ]
        return all_of(net), masters

    equal(program)


def test_gradients_accumulate_over_backwards(equal):
    def program():
        net = model()
        optimizer = optimizers.Adam().setup(net)
        for step in range(2):
            net.cleargrads()
            for number in range(3):
                loss_of(net, number + 3 * step).backward()
            optimizer.update()
        return all_of(net)

    equal(program)


def test_zerograds(equal):
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def program():
        net = model()
        loss_of(net).backward()
        with pytest.warns(DeprecationWarning):
            net.zerograds()
        loss_of(net, 1).backward()
        return all_of(net)

    equal(program)


def test_addgrads_and_copyparams(equal):
    def program():
        a, b = model(3), model(4)
        for number, net in enumerate((a, b)):
            net.cleargrads()
            loss_of(net, number).backward()
        a.addgrads(b)
        added = all_of(a)
        b.copyparams(a)
        net = Net()  # its lazy layer gets its array now
        net.copyparams(a)
        return added, all_of(a), all_of(b), all_of(net)

    equal(program)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickles_and_deep_copies_are_those_of_stock(equal, protocol):
    def program():
        net = train(optimizers.Adam())
        blob = pickle.dumps(net, protocol)
        again = pickle.loads(blob)
        deep = copy.deepcopy(net)
        for number, other in enumerate((again, deep)):
            other.cleargrads()
            loss_of(other, number).backward()
            for p in other.params():
                p.update()
        return all_of(net), all_of(again), all_of(deep)

    equal(program)


def test_a_pickle_is_read_without_this_package(equal):
    def program():
        net = train(optimizers.Adam())
        return b"chainer_ooc" in pickle.dumps(net)

    equal(program)


@pytest.mark.parametrize("mode", ["share", "copy", "init"])
def test_copies_of_links(equal, mode):
    def program():
        np.random.seed(0)
        net = train(optimizers.MomentumSGD(0.1))
        other = net.copy(mode)
        np.random.seed(1)
        other.cleargrads()
        loss_of(other, 7).backward()
        for p in other.params():
            if p.update_rule is not None:
                p.update()
        if mode == "share":
            net.out.W.array[...] += 1
        return (
            all_of(net),
            all_of(other),
            [p.array is q.array for p, q in zip(net.params(), other.params(), strict=True)],
        )

    equal(program)


def test_repeat(equal):
    def program():
        np.random.seed(0)
        net = chainer.Sequential(L.Linear(6, 6), F.tanh).repeat(3)
        optimizer = optimizers.Adam().setup(net)
        for number in range(2):
            optimizer.update(lambda x: F.sum(net(x) ** 2), rand(4, 6, seed=number))
        return all_of(net)

    equal(program)


def test_npz(equal):
    def program():
        net = model()
        optimizer = optimizers.Adam()
        train(optimizer, net=net)
        file, of_optimizer = io.BytesIO(), io.BytesIO()
        serializers.save_npz(file, net)
        serializers.save_npz(of_optimizer, optimizer)
        file.seek(0)
        of_optimizer.seek(0)
        other = model(9)
        again = optimizers.Adam().setup(other)
        serializers.load_npz(file, other)
        serializers.load_npz(of_optimizer, again)
        again.update(loss_of, other, 5)
        return all_of(net), all_of(other), again.t

    equal(program)


def test_edits_between_steps_are_seen(equal):
    def program():
        net = model()
        optimizer = optimizers.Adam().setup(net)
        seen = []
        for number in range(3):
            optimizer.update(loss_of, net, number)
            net.out.W.array[0] += 1  # in place
            net.twice.W.array = net.twice.W.array * 2  # another array
            net.conv.W.update_rule.state["m"][...] = 0.5
            net.conv.W.update_rule.state["v"] = net.conv.W.update_rule.state["v"] + 1
            net.lazy.W.grad *= 2
            net.lazy.b.grad = np.ones_like(net.lazy.b.grad)
            seen.append(np.array(F.sum(net(rand(5, 2, 6, 6))).array))
        return all_of(net), seen

    equal(program)


def test_edits_between_backward_and_update(equal):
    def program():
        net = model()
        optimizer = optimizers.MomentumSGD(0.1).setup(net)
        for number in range(3):
            net.cleargrads()
            loss_of(net, number).backward()
            for p in net.params():
                p.grad[...] = np.clip(p.grad, -0.1, 0.1)
                p.grad_var = p.grad_var * 2
            net.out.b.cleargrad()
            optimizer.update()
        return all_of(net)

    equal(program)


def test_held_arrays_are_the_ones_that_are_updated(equal):
    def program():
        net = model()
        optimizer = optimizers.MomentumSGD(0.1).setup(net)
        optimizer.update(loss_of, net)
        held, part, view = net.out.W.array, net.twice.W.array[2:], net.conv.W.array.reshape(-1)
        momentum = net.out.W.update_rule.state["v"]
        optimizer.update(loss_of, net, 1)
        held[0] = 3
        part[1] = 4
        view[5] = 5
        momentum[0] = 6
        optimizer.update(loss_of, net, 2)
        same = held is net.out.W.array, np.shares_memory(part, net.twice.W.array)
        return all_of(net), same, np.array(held), np.array(view), np.array(momentum)

    equal(program)


def test_what_functions_return_may_be_a_view_of_a_parameter(equal):
    def program():
        net = model()
        loss_of(net)
        y = F.reshape(net.out.W, (-1,))
        z = F.transpose(net.twice.W)
        F.sum(F.exp(rand(3, 3)))
        y.array[0] = 7
        z.array[1] = 8
        del y, z
        F.sum(F.exp(rand(3, 3)))
        return all_of(net)

    equal(program)


def test_a_dictionary_of_state_that_code_holds_stays_the_one_in_use(equal):
    def program():
        net = model()
        optimizer = optimizers.Adam().setup(net)
        optimizer.update(loss_of, net)
        held = net.out.W.update_rule.state
        optimizer.update(loss_of, net, 1)
        same = held is net.out.W.update_rule.state
        held["m"] = held["m"] * 0
        optimizer.update(loss_of, net, 2)
        return all_of(net), same, sorted(held), {**held}, dict(held), list(held.values())

    equal(program)


def test_every_way_to_read_state(equal):
    def program():
        net = train(optimizers.Adam())
        values = net.out.W.update_rule.state
        seen = [
            sorted(values),
            list(values.items()),
            list(values.values()),
            list(values.keys()),
            values.get("m"),
            values.get("none", 3),
            values.copy(),
            copy.copy(values),
            copy.deepcopy(values),
            dict(values),
            {**values},
            values | {},
            {} | values,
            "m" in values,
            len(values),
            repr(values),
            values.setdefault("m", 5),
            values.setdefault("w", 5),
            values.pop("w"),
            values.pop("none", 4),
            isinstance(values, dict),
            [np.array(v) for v in values.values()],
            values.popitem(),
            sorted(values),
        ]
        values.update(v=seen[2][1], m=seen[2][0])
        with pytest.raises(KeyError):
            values["none"]
        with pytest.raises(KeyError):
            values.pop("none")
        values.clear()
        with pytest.raises(KeyError):
            values.popitem()
        return seen

    equal(program)


def test_double_backprop_through_parameters(equal):
    def program():
        net = model()
        optimizer = optimizers.Adam().setup(net)
        for number in range(2):
            x = chainer.Variable(rand(5, 2, 6, 6, seed=number))
            y = F.sum(net(x))
            (gx,) = chainer.grad([y], [x], enable_double_backprop=True)
            net.cleargrads()
            F.sum(gx**2).backward()
            optimizer.update()
        return all_of(net)

    equal(program)


def test_gradients_of_parameters_by_grad(equal):
    def program():
        net = model()
        loss = loss_of(net, double=True)
        wanted = [net.out.W, net.twice.W, net.conv.W]
        first = chainer.grad([loss], wanted, enable_double_backprop=True)
        second = chainer.grad([sum(F.sum(g**2) for g in first)], wanted)
        return [g.array for g in (*first, *second)]

    equal(program)


def test_backward_with_double_backprop_enabled(equal):
    def program():
        net = model()
        net.cleargrads()
        loss_of(net, double=True).backward(enable_double_backprop=True, retain_grad=True)
        penalty = sum(F.sum(p.grad_var**2) for p in net.params())
        net.cleargrads()
        penalty.backward()
        return all_of(net)

    equal(program)


def test_two_models_in_turn(equal):
    def program():
        np.random.seed(1)
        generator = L.Linear(3, 72)
        critic = model()
        first, second = optimizers.Adam().setup(generator), optimizers.SGD(0.1).setup(critic)
        for number in range(3):
            fake = F.reshape(generator(rand(5, 3, seed=number)), (5, 2, 6, 6))
            loss = F.sum(critic(fake))
            generator.cleargrads()
            loss.backward()
            first.update()
            critic.cleargrads()
            loss_of(critic, number).backward()
            second.update()
        return all_of(generator), all_of(critic)

    equal(program)


def test_recurrent_networks_and_embeddings(equal):
    def program():
        np.random.seed(2)
        net = chainer.Sequential(L.EmbedID(7, 5), L.LSTM(5, 6), L.Linear(None, 7))
        deep = L.NStepLSTM(2, 5, 4, 0.0)
        every = chainer.ChainList(net, deep)
        optimizer = optimizers.Adam().setup(every)
        for _ in range(3):
            net[1].reset_state()
            ids = np.arange(12, dtype=np.int32).reshape(4, 3) % 7
            loss = sum(F.softmax_cross_entropy(net(row), row) for row in ids)
            _, _, ys = deep(None, None, [net[0](row) for row in ids])
            loss += sum(F.sum(y**2) for y in ys)
            every.cleargrads()
            loss.backward()
            optimizer.update()
        return all_of(every)

    equal(program)


@pytest.mark.parametrize(
    "hook", [link_hooks.SpectralNormalization, link_hooks.WeightStandardization]
)
def test_hooks_of_links(equal, hook):
    def program():
        np.random.seed(5)
        net = chainer.Sequential(L.Linear(4, 6), F.tanh, L.Linear(6, 3))
        net[0].add_hook(hook())
        optimizer = optimizers.Adam().setup(net)
        for number in range(3):
            optimizer.update(lambda x: F.sum(net(x) ** 2), rand(4, 4, seed=number))
        return all_of(net)

    equal(program)


def test_prediction(equal):
    def program():
        net = model()
        loss_of(net)
        results = []
        for number in range(3):
            with chainer.using_config("train", False), chainer.no_backprop_mode():
                results.append(net(rand(5, 2, 6, 6, seed=number)).array)
            with chainer.using_config("train", False):
                results.append(net(rand(5, 2, 6, 6, seed=number)).array)
        return results

    equal(program)


def test_links_of_one_array_share_it(equal):
    def program():
        np.random.seed(6)
        a, b = L.Linear(4, 4), L.Linear(4, 4)
        b.W = a.W
        net = chainer.Sequential(a, F.tanh, b)
        optimizer = optimizers.Adam().setup(net)
        for number in range(3):
            optimizer.update(lambda x: F.sum(net(x) ** 2), rand(4, 4, seed=number))
        return all_of(net)

    equal(program)


def test_parameters_in_one_allocation(equal):
    def program():
        memory = rand(40)
        a = chainer.Parameter(memory[:16].reshape(4, 4))
        b = chainer.Parameter(memory[16:32].reshape(4, 4).T)
        del memory
        for number in range(3):
            for p in (a, b):
                p.cleargrad()
            F.sum(F.tanh(F.matmul(F.matmul(rand(3, 4, seed=number), a), b))).backward()
            a.array[...] -= a.grad
            b.array[...] -= b.grad
        return np.array(a.array), np.array(b.array), a.grad, b.grad

    equal(program)


def test_functions_that_are_not_chainers_may_write_to_parameters(equal):
    class Writes(chainer.FunctionNode):
        def forward(self, inputs):
            x, w = inputs
            w[0] += 1
            self.retain_inputs((1,))
            return (x * w.sum(),)

        def backward(self, indexes, gradients):
            (w,) = self.get_retained_inputs()
            w.array[1] += 1
            return gradients[0] * F.broadcast_to(F.sum(w), gradients[0].shape), None

    def program():
        w = chainer.Parameter(rand(5))
        for number in range(3):
            (y,) = Writes().apply((chainer.Variable(rand(4, seed=number)), w))
            F.sum(F.tanh(y)).backward()
            F.sum(F.exp(rand(3, 3)))
        return np.array(w.array)

    equal(program)


def test_what_asks_for_shape_or_presence_fetches_nothing():
    net = train(optimizers.Adam())
    with chainer_ooc.out_of_core_mode(**OUT):
        manager = state.manager_of_ram()
        F.exp(rand(3))
        before = manager.counters.bytes_in_lasting
        for p in net.params():
            assert p.shape and p.size and p.ndim and p.dtype == np.float32 and p.is_initialized
            assert p.xp is np and p.label and p.node.shape == p.shape
            assert p._has_array() and p._has_raw_array() and p._has_grad()
        assert net.count_params() > 0
        assert len(list(net.namedparams(False))) == len(list(net.params(False)))
        optimizers.Adam().reallocate_cleared_grads.__func__  # noqa: B018
        optimizer = optimizers.SGD()
        optimizer.target = net
        optimizer.reallocate_cleared_grads()
        net.cleargrads()
        assert not any(p._has_grad() for p in net.params())
        assert manager.counters.bytes_in_lasting == before
        assert manager._transfers.lasting.nbytes[State.OUT]


def test_stand_ins_are_made_and_the_arrays_are_out():
    net = train(optimizers.Adam())
    with chainer_ooc.out_of_core_mode(**OUT):
        optimizers.SGD(0).setup(chainer.Sequential())
        F.exp(rand(3))
        p = net.twice.W
        assert type(p._data) is MovableData
        assert type(p.update_rule.__dict__["_state"]) is MovableState
        for packed in (p._data.peek(), p.__dict__["_grad"], dict.get(p.update_rule.state, "m")):
            assert type(packed) is PackedArray
            assert packed.storage.state in (State.OUT, State.COMING_IN)
            assert packed.storage.key is not None
    expected = all_of(net)  # when it is off they are read as before
    assert_same_bits(all_of(net), expected)


def test_with_stay_nothing_of_it_moves(equal):
    equal(lambda: all_of(train(optimizers.Adam())), moves=False, parameters="stay")


def test_lazy_parameters_stay_lazy(equal):
    def program():
        net = model()
        F.exp(rand(3))
        lazy = [p.is_initialized for p in net.params()]
        with pytest.warns(UserWarning, match="not been initialized"):
            count = net.count_params()
        kept = type(net.lazy.W._data) is list
        loss_of(net)
        return lazy, count, kept, all_of(net)

    equal(program)


def test_reading_in_forward_and_backward_keeps_the_copy():
    net = model()
    loss_of(net)
    with chainer_ooc.out_of_core_mode(**OUT):
        manager = state.manager_of_ram()
        loss_of(net)
        out, back = manager.counters.bytes_out_lasting, manager.counters.bytes_in_lasting
        loss = loss_of(net, 1)
        assert manager.counters.bytes_in_lasting > back
        assert manager.counters.bytes_out_lasting == out
        net.cleargrads()
        loss.backward()
        twice = sum(p.grad.nbytes for p in net.twice.params())  # two gradients, and their sum later
        gradients = sum(p.grad.nbytes for p in net.params())
        assert manager.counters.bytes_out_lasting - out <= gradients + 2 * twice


def test_a_gradient_that_an_update_has_read_is_not_written_again():
    net = model()
    optimizer = optimizers.SGD(0.1).setup(net)
    with chainer_ooc.out_of_core_mode(**OUT):
        loss_of(net)
        net.cleargrads()
        loss_of(net).backward()
        F.exp(rand(3))
        manager = state.manager_of_ram()
        before = manager.counters.bytes_out_lasting
        optimizer.update()
        written = manager.counters.bytes_out_lasting - before
        assert written <= sum(p.array.nbytes for p in net.params())


def test_an_uninterested_process_has_lists_and_dictionaries(run_python):
    done = run_python(
        "-c",
        "import chainer_ooc, chainer, numpy as np\n"
        "import chainer.links as L, chainer.functions as F\n"
        "chainer_ooc.enable(limit='8GiB')\n"
        "net = L.Linear(4, 4)\n"
        "opt = chainer.optimizers.Adam().setup(net)\n"
        "opt.update(lambda x: F.sum(net(x)), np.ones((2, 4), 'f'))\n"
        "assert type(net.W._data) is list and type(net.W.update_rule.state) is dict\n"
        "assert type(chainer.Variable.__dict__['_grad']) is type(None)\n"
        "assert chainer.FunctionNode.apply.__module__ == 'chainer_ooc.graph.hooks'\n",
    )
    assert done.returncode == 0, done.stderr
