"""The trainer's optimizers, hooks, loss and schedules against plain NumPy, step by step."""

import io
import math

import chainer
import chainer.functions as F
import numpy
import optimizers
import pytest
from config import Config
from losses import softmax_cross_entropy
from optimizers import schedules
from optimizers.rmsprop_warmup import sgd_weight

SCALE = numpy.array([[1.0, -2.0, 0.5], [3.0, 1.5, -0.3]])


class Points(chainer.Chain):
    """A weight of two axes and a bias, with a loss that is not quadratic."""

    def __init__(self, dtype=numpy.float64):
        super().__init__()
        rng = numpy.random.default_rng(3)
        with self.init_scope():
            self.w = chainer.Parameter(rng.standard_normal((2, 3)).astype(dtype))
            self.b = chainer.Parameter(rng.standard_normal(4).astype(dtype))

    def forward(self):
        scale = self.device.send(SCALE.astype(self.w.dtype))
        return F.sum(F.sin(scale * self.w)) + F.sum(0.5 * self.b * self.b)


def gradients(p):
    return {"w": SCALE * numpy.cos(SCALE * p["w"]), "b": p["b"]}


def values(model):
    return {name: getattr(model, name).array.copy() for name in ("w", "b")}


def settings(name, **changes):
    return Config(optimizer=name, batchsize=64, **changes)


class Momentum:
    def __init__(self, momentum=0.9):
        self.momentum = momentum
        self.v = {}

    def __call__(self, name, p, g, lr, epoch):
        self.v[name] = self.momentum * self.v.get(name, 0) - lr * g
        return p + self.v[name]


class Adam:
    def __init__(self, first=0.9, second=0.999):
        self.m, self.v, self.t = {}, {}, {}
        self.betas = first, second

    def __call__(self, name, p, g, lr, epoch):
        t = self.t[name] = self.t.get(name, 0) + 1
        first, second = self.betas
        self.m[name] = first * self.m.get(name, 0) + (1 - first) * g
        self.v[name] = second * self.v.get(name, 0) + (1 - second) * g * g
        step = lr * math.sqrt(1 - second**t) / (1 - first**t)
        return p - step * self.m[name] / (numpy.sqrt(self.v[name]) + 1e-8)


class RMSprop:
    def __init__(self):
        self.m = {}

    def __call__(self, name, p, g, lr, epoch):
        self.m[name] = 0.99 * self.m.get(name, 0) + 0.01 * g * g
        return p - lr * g / (numpy.sqrt(self.m[name]) + 1e-8)


class Warmup:
    """arXiv:1711.04325, section 3.1, with the slope of the line as an argument."""

    def __init__(self, slope=1.0, center=10.0, period=5.0):
        self.slope, self.center, self.period = slope, center, period
        self.m, self.delta = {}, {}

    def weight(self, epoch):
        if epoch < self.center:
            return 0.5 * math.exp(2 * (epoch - self.center) / self.period)
        if epoch < self.center + 0.5 * self.period:
            return 0.5 + self.slope * (epoch - self.center) / self.period
        return 1.0

    def __call__(self, name, p, g, lr, epoch):
        sgd = self.weight(epoch)
        rms = (1 - sgd) * 3e-4 / lr
        self.m[name] = 0.99 * self.m.get(name, 0) + 0.01 * g * g
        self.delta[name] = (
            0.9 * self.delta.get(name, 0) - (sgd + rms / (numpy.sqrt(self.m[name]) + 1e-8)) * g
        )
        return p + lr * self.delta[name]


RULES = {"momentum_sgd": Momentum, "adam": Adam, "rmsprop": RMSprop, "rmsprop_warmup": Warmup}


def follow(config, rule, lr, change=lambda p, g: g, steps=30, rtol=1e-12, device="@numpy"):
    """Updates a model and its reference side by side; ``change`` is what hooks do to a gradient."""
    model = Points()
    model.to_device(device)
    optimizer, control = optimizers.create(config, 2, model)
    p = values(model)
    for i in range(steps):
        epoch = i / 2  # passes RMSprop warm-up's change at epochs 10 to 12.5
        rate, g = lr(epoch), gradients(p)
        p = {n: rule(n, p[n], change(p[n], g[n]), rate, epoch) for n in p}
        control(epoch, i / steps)
        optimizer.update(model)
        for name, value in p.items():
            actual = chainer.get_device("@numpy").send(getattr(model, name).array)
            numpy.testing.assert_allclose(actual, value, rtol=rtol, atol=1e-12)
    return model


@pytest.mark.parametrize("name", RULES)
def test_rule_follows_its_formula(name):
    follow(settings(name, lr=0.02, lr_schedule="constant", lr_scaling="none"), RULES[name](),
           lambda epoch: 0.02)  # fmt: skip


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_other_betas(name):
    config = settings(name, lr=0.02, lr_scaling="none", beta1=0.5, beta2=0.7)
    follow(config, Adam(0.5, 0.7), lambda epoch: 0.02)


def test_radam_has_the_betas():
    config = settings("radam", lr=0.02, beta1=0.5, beta2=0.7)
    optimizer, _ = optimizers.create(config, 1, Points())
    assert (optimizer.hyperparam.beta1, optimizer.hyperparam.beta2) == (0.5, 0.7)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
def test_rule_follows_its_formula_on_a_gpu(name):
    config = settings(name, lr=0.02, lr_schedule="constant", lr_scaling="none", weight_decay=0.1)
    follow(config, RULES[name](), lambda epoch: 0.02, lambda p, g: g + 0.1 * p,
           rtol=1e-9, device="@cupy:0")  # fmt: skip


def test_warmup_by_default_has_the_papers_schedule_and_scaling():
    # 2 ranks of 64 images: half of 0.1 for 256; of that the paper takes half for 40 epochs.
    follow(settings("rmsprop_warmup"), Warmup(), lambda epoch: 0.5 * 0.1 * 2 * 64 / 256)


def test_warmup_with_the_printed_slope_and_other_epochs():
    config = settings("rmsprop_warmup", lr=0.1, rmsprop_slope="printed", warmup_center=4,
                      warmup_period=6)  # fmt: skip
    follow(config, Warmup(2.0, 4, 6), lambda epoch: 0.025)


def test_continuous_slope_has_no_step_and_the_printed_one_has():
    epochs = numpy.linspace(0, 20, 20001)
    weights = numpy.array([sgd_weight(e) for e in epochs])
    assert (numpy.diff(weights) >= 0).all()
    assert numpy.diff(weights).max() < 1e-3
    assert weights[-1] == 1
    assert sgd_weight(10) == 0.5
    assert sgd_weight(12.4999, slope="printed") == pytest.approx(1.5, abs=1e-3)
    assert sgd_weight(12.5, slope="printed") == 1


def test_weight_decay_on_all_or_on_weights():
    follow(settings("momentum_sgd", lr=0.02, weight_decay=0.1), Momentum(), lambda epoch: 0.02,
           lambda p, g: g + 0.1 * p)  # fmt: skip
    follow(settings("momentum_sgd", lr=0.02, weight_decay=0.1, weight_decay_on="weights"),
           Momentum(), lambda epoch: 0.02,
           lambda p, g: g + 0.1 * p if p.ndim == 2 else g)  # fmt: skip


def test_lars():
    def change(p, g):
        if p.ndim == 1:
            return g + 0.1 * p
        norm_p, norm_g = math.sqrt((p**2).sum()), math.sqrt((g**2).sum())
        return 0.01 * norm_p / (norm_g + 0.1 * norm_p) * (g + 0.1 * p)

    config = settings("momentum_sgd", lr=0.5, weight_decay=0.1, lars=True, lars_coefficient=0.01)
    follow(config, Momentum(), lambda epoch: 0.5, change)
    model = Points()
    model.w.array[...] = 0  # no norm, no ratio
    optimizer, _ = optimizers.create(config, 1, model)
    optimizer.update(model)
    numpy.testing.assert_allclose(model.w.array, -0.5 * SCALE)


def test_regime_is_s2s_table():
    rows = ((1, 1e-2, 5e-4), (19, 5e-3, 5e-4), (30, 1e-3, 0), (44, 5e-4, 0), (53, 1e-4, 0))
    regime = schedules.Regime(rows)
    for epoch, expected in ((0, rows[0]), (17.99, rows[0]), (18, rows[1]), (28.5, rows[1]),
                            (29, rows[2]), (43, rows[3]), (51.9, rows[3]), (54, rows[4])):  # fmt: skip
        assert regime(epoch) == expected[1:]
    decay = {"now": 0.0}

    def lr(epoch):
        decay["now"] = 0.1 if epoch < 3 else 0.0
        return 0.02 if epoch < 3 else 0.01

    follow(settings("momentum_sgd", regime=((1, 0.02, 0.1), (4, 0.01, 0.0))), Momentum(), lr,
           lambda p, g: g + (decay["now"] * p))  # fmt: skip


def lrs(points, **changes):
    """Returns the learning rates at (epoch, part done) of an optimizer of 16 ranks of 64."""
    optimizer, control = optimizers.create(settings(**changes), 16, Points())
    found = []
    for epoch, done in points:
        control(epoch, done)
        found.append(optimizer.alpha if changes["name"] == "adam" else optimizer.lr)
    return found


def test_schedules():
    at = [(0, 0), (29.9, 0.3), (30, 0.3), (60, 0.6), (85, 0.9), (90, 1)]
    base = {"name": "momentum_sgd", "lr": 0.1}
    assert lrs(at, **base) == [0.1] * 6
    assert lrs(at, **base, lr_drops=(30, 60)) == pytest.approx([0.1, 0.1, 0.01, 1e-3, 1e-3, 1e-3])
    # 16 * 64 = 4 * 256 images: four times the rate, and the paper's factors.
    assert lrs(at, **base, lr_scaling="linear", lr_schedule="slow_start") == pytest.approx(
        [0.2, 0.2, 0.2, 0.03, 4e-4, 4e-4]
    )
    assert lrs(at, **base, lr_schedule="polynomial", lr_power=2) == pytest.approx(
        [0.1, 0.049, 0.049, 0.016, 0.001, 0]
    )
    assert lrs(at, **base, lr_schedule="cosine") == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * done)) for _, done in at]
    )
    assert lrs(at[:2], name="adam") == [0.001] * 2
    assert lrs(at[:2], name="rmsprop") == [0.01] * 2


def test_warmup_of_the_learning_rate():
    at = [(0, 0), (2.5, 0), (5, 0), (6, 0)]
    base = {"name": "momentum_sgd", "lr": 0.1, "lr_warmup": 5}
    # Goyal et al. 2017: from eta to k * eta
    assert lrs(at, **base, lr_scaling="linear") == pytest.approx([0.1, 0.25, 0.4, 0.4])
    assert lrs(at, **base) == pytest.approx([0.01, 0.055, 0.1, 0.1])


def test_label_smoothing_in_training_only():
    rng = numpy.random.default_rng(0)
    h = rng.standard_normal((5, 7)).astype(numpy.float32)
    t = numpy.array([0, 3, 6, 2, 2], dtype=numpy.int32)
    log_p = h - numpy.log(numpy.exp(h).sum(axis=1, keepdims=True))
    target = 0.9 * numpy.eye(7)[t] + 0.1 / 7
    smooth, plain = -(target * log_p).sum(axis=1).mean(), -log_p[range(5), t].mean()
    assert float(softmax_cross_entropy(h, t).array) == pytest.approx(plain, rel=1e-6)
    with chainer.using_config("label_smoothing", 0.1):
        assert float(softmax_cross_entropy(h, t).array) == pytest.approx(smooth, rel=1e-6)
        with chainer.using_config("train", False):
            assert float(softmax_cross_entropy(h, t).array) == pytest.approx(plain, rel=1e-6)
    half = softmax_cross_entropy(h.astype(numpy.float16), t)
    assert half.dtype == numpy.float32
    assert float(half.array) == pytest.approx(plain, rel=1e-3)


class Averages:
    """Stands in for a communicator of two ranks; the other one's gradient is three times ours."""

    def bcast_data(self, model):
        raise AssertionError("the first update must not be a broadcast")

    def multi_node_mean_grad(self, model, zero_fill=False):
        for param in model.params():
            param.grad *= 2


@pytest.mark.parametrize("name", RULES)
def test_hooks_act_on_the_mean_gradient_of_all_ranks(name):
    import chainermn

    config = settings(name, lr=0.02, lr_schedule="constant", lr_scaling="none", weight_decay=0.1)
    model = Points()
    optimizer, control = optimizers.create(config, 2, model)
    multi = chainermn.create_multi_node_optimizer(optimizer, Averages())
    multi.is_changed(model)
    p = values(model)
    rule = RULES[name]()
    for i in range(5):
        g = gradients(p)
        p = {n: rule(n, p[n], 2 * g[n] + 0.1 * p[n], 0.02, i) for n in p}
        control(i, 0)
        multi.update(model)
        for n in p:
            numpy.testing.assert_allclose(getattr(model, n).array, p[n], rtol=1e-12)


@pytest.mark.filterwarnings("ignore:Non finite number", "ignore:overflow encountered")
@pytest.mark.parametrize("dtype", ["float32", "mixed16"])
@pytest.mark.parametrize("name", RULES)
def test_saved_and_loaded_it_goes_on_bit_for_bit(name, dtype):
    config = settings(name, lr=0.02, weight_decay=0.01, dtype=dtype)
    array_dtype = numpy.float16 if dtype == "mixed16" else numpy.float32

    def start():
        model = Points(array_dtype)
        optimizer, control = optimizers.create(config, 1, model)
        if dtype == "mixed16":
            optimizer._loss_scale = 64.0
        return model, optimizer, control

    def train(model, optimizer, control, first, last):
        for i in range(first, last):
            control(i, i / 10)
            optimizer.update(model)

    whole = start()
    train(*whole, 0, 10)
    part = start()
    train(*part, 0, 5)
    files = []
    for target in part[:2]:
        files.append(io.BytesIO())
        chainer.serializers.save_npz(files[-1], target)
        files[-1].seek(0)
    again = start()
    for f, target in zip(files, again[:2], strict=True):
        chainer.serializers.load_npz(f, target)
    if dtype == "mixed16":  # the updater saves it
        again[1]._loss_scale = part[1]._loss_scale
    train(*again, 5, 10)
    for n in ("w", "b"):
        a, b = (getattr(m, n).array for m in (whole[0], again[0]))
        assert a.dtype == array_dtype
        numpy.testing.assert_array_equal(a.view(numpy.uint8), b.view(numpy.uint8))
        rules = [getattr(m, n).update_rule for m in (whole[0], again[0])]
        if dtype == "mixed16":  # the float32 copy, which has more digits than the parameter
            masters = [rule._fp32_param.array for rule in rules]
            numpy.testing.assert_array_equal(*masters)
            assert (masters[0] != a.astype(numpy.float32)).any()


def test_mixed_precision_follows_the_formula_of_the_unscaled_gradient():
    config = settings("momentum_sgd", lr=0.02, weight_decay=0.1, dtype="mixed16")
    model = Points(numpy.float16)
    optimizer, control = optimizers.create(config, 1, model)
    optimizer._loss_scaling_is_dynamic = False
    optimizer.set_loss_scale(128.0)
    p = {n: v.astype(numpy.float64) for n, v in values(model).items()}
    rule = Momentum()
    for _ in range(10):
        g = {n: v + 0.1 * p[n] for n, v in gradients(p).items()}
        p = {n: rule(n, p[n], g[n], 0.02, 0) for n in p}
        control(0, 0)
        optimizer.update(model)
    for n in p:
        # Half precision has 3 digits; with the loss scale in the decay it would be far off.
        numpy.testing.assert_allclose(getattr(model, n).array, p[n], rtol=5e-3, atol=5e-3)
