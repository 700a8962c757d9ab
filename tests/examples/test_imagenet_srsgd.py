"""SRSGD, RAdam and AdamW against plain NumPy, stepwise; saved and resumed; on several ranks."""

import math
import subprocess
import sys
from pathlib import Path

import chainer
import chainer.functions as F
import numpy
import optimizers
import pytest
from config import Config
from imagenet_cli import environment, find_mpiexec
from optimizers.adamw import AdamW
from optimizers.radam import RAdam, rectification
from optimizers.srsgd import (
    SRSGD,
    SRSGDRule,
    exponential_restarts,
    linear_restarts,
    shrunk_period,
)


class Points(chainer.Chain):
    """Two parameters whose loss is 0.5 * sum(scale * (w - target)**2) + cos."""

    def __init__(self, dtype=numpy.float64):
        super().__init__()
        rng = numpy.random.default_rng(3)
        with self.init_scope():
            self.a = chainer.Parameter(rng.standard_normal((3, 4)).astype(dtype))
            self.b = chainer.Parameter(rng.standard_normal(5).astype(dtype))

    def forward(self):
        return F.sum(0.5 * self.a * self.a) + F.sum(F.cos(2 * self.b))


def gradients(w):
    return {"a": w["a"], "b": -2 * numpy.sin(2 * w["b"])}


def values(model):
    return {name: getattr(model, name).array.copy() for name in ("a", "b")}


def assert_equal(model, w, rtol=1e-12):
    for name in w:
        numpy.testing.assert_allclose(getattr(model, name).array, w[name], rtol=rtol, atol=1e-12)


def run(optimizer, model, steps, on_step=lambda i: None):
    for i in range(steps):
        on_step(i)
        optimizer.update(model)


def test_published_restart_lists():
    assert linear_restarts(30, 2, 4) == (30, 60, 90, 120)
    assert linear_restarts(50, 2, 4) == (50, 100, 150, 200)
    assert exponential_restarts(40, 1.25, 4) == (40, 50, 63, 78)
    assert exponential_restarts(45, 1.5, 4) == (45, 68, 101, 152)


def test_last_stage_shrinks_linearly_to_one():
    periods = [shrunk_period(80, e, start=61, total=90) for e in range(61, 90)]
    assert periods[0] == 80
    assert periods[-1] == 1
    numpy.testing.assert_allclose(numpy.diff(periods), -79 / 28)
    assert shrunk_period(80, 5, start=5, total=6) == 1


def test_follows_the_papers_formula():
    model = Points()
    optimizer = SRSGD(lr=0.05, restarts=(4, 7)).setup(model)
    w = values(model)
    v = dict(w)
    for k in range(20):
        if k == 9:
            optimizer.lr = 0.01
        lr, period = (0.05, 4) if k < 9 else (0.01, 7)
        mu = (k % period) / (k % period + 3)
        g = gradients(w)
        following = {n: w[n] - lr * g[n] for n in w}
        w = {n: following[n] + mu * (following[n] - v[n]) for n in w}
        v = following
        optimizer.update(model)
        assert optimizer.last_momentum == mu
        assert_equal(model, w)
    assert optimizer.stage == 1


def test_follows_the_authors_program():
    model = Points()
    optimizer = SRSGD(lr=0.05, restarts=(4, 6), period="authors", shrink_until=5).setup(model)
    w = values(model)
    v = None
    c = 1
    for epoch in range(5):
        lr = 0.05 if epoch < 2 else 0.005
        period = 4.0
        if epoch >= 2:  # the last stage: a new optimizer and a shorter period at each epoch
            period = (6 - 1) * (5 - epoch - 1) / (5 - 2 - 1) + 1
            v = None
        optimizer.lr = lr
        for _ in range(6):
            g = gradients(w)
            v = w if v is None else v
            mu = (c - 1.0) / (c + 2.0)
            following = {n: w[n] - lr * g[n] for n in w}
            w = {n: following[n] + mu * (following[n] - v[n]) for n in w}
            v = following
            c += 1
            if c >= period:
                c = 1
            optimizer.update(model)
            assert optimizer.last_momentum == mu
            assert_equal(model, w)
        optimizer.new_epoch()


def test_a_rising_learning_rate_is_no_new_stage():
    model = Points()
    optimizer = SRSGD(lr=0.01, restarts=(2, 3)).setup(model)
    run(optimizer, model, 3, lambda i: setattr(optimizer, "lr", 0.01 * (i + 1)))
    assert optimizer.stage == 0
    optimizer.lr = 0.02
    optimizer.update(model)
    assert optimizer.stage == 1


def test_weight_decay_is_added_to_the_gradient():
    model = Points()
    optimizer = SRSGD(lr=0.05, restarts=(5,)).setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.1))
    w = values(model)
    v = dict(w)
    for k in range(8):
        g = {n: x + 0.1 * w[n] for n, x in gradients(w).items()}
        following = {n: w[n] - 0.05 * g[n] for n in w}
        mu = (k % 5) / (k % 5 + 3)
        w = {n: following[n] + mu * (following[n] - v[n]) for n in w}
        v = following
    run(optimizer, model, 8)
    assert_equal(model, w)


def make_srsgd(period="authors"):
    return SRSGD(lr=0.05, restarts=(3, 5), period=period, shrink_until=6)


MAKERS = {
    "srsgd": lambda: make_srsgd("paper"),
    "srsgd-authors": make_srsgd,
    "radam": lambda: RAdam(alpha=0.05, weight_decay=0.1),
    "adamw": lambda: AdamW(alpha=0.05, weight_decay=0.1, warmup=7),
}


def schedule(optimizer):
    def on_step(i):
        if i and i % 4 == 0:
            optimizer.new_epoch()
        if i == 8:
            setattr(optimizer, "alpha" if hasattr(optimizer, "alpha") else "lr", 0.005)

    return on_step


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float16])
@pytest.mark.parametrize("stop", [6, 8, 13])
def test_resumes_bit_for_bit(name, dtype, stop, tmp_path):
    def build():
        model = Points(dtype)
        optimizer = MAKERS[name]()
        if dtype == numpy.float16:
            optimizer.use_fp32_update()
        return model, optimizer.setup(model)

    model, optimizer = build()
    on_step = schedule(optimizer)
    run(optimizer, model, stop, on_step)
    chainer.serializers.save_npz(str(tmp_path / "model"), model)
    chainer.serializers.save_npz(str(tmp_path / "optimizer"), optimizer)
    resumed_model, resumed = build()
    chainer.serializers.load_npz(str(tmp_path / "model"), resumed_model)
    chainer.serializers.load_npz(str(tmp_path / "optimizer"), resumed)
    # Learning rates are not part of Chainer's snapshots: the schedule sets them again.
    (resumed.hyperparam.__dict__).update(
        {k: v for k, v in optimizer.hyperparam.__dict__.items() if k in ("lr", "alpha")}
    )
    for m, o in ((model, optimizer), (resumed_model, resumed)):
        step = schedule(o)
        run(o, m, 20 - stop, lambda i, step=step: step(i + stop))
    for name_ in ("a", "b"):
        a, b = getattr(model, name_).array, getattr(resumed_model, name_).array
        numpy.testing.assert_array_equal(a, b)
        assert a.dtype == dtype


def test_float16_updates_in_float32():
    # Steps far below the spacing of float16 at 1 (0.001) must add up.
    model = chainer.Link()
    with model.init_scope():
        model.w = chainer.Parameter(numpy.ones(1, numpy.float16))
    optimizer = SRSGD(lr=1e-5, restarts=(1,))
    optimizer.use_fp32_update()
    optimizer.setup(model)
    for _ in range(500):
        model.w.grad = numpy.ones(1, numpy.float16)
        optimizer.update()
    assert model.w.array[0] == pytest.approx(0.995, abs=5e-4)


def test_dynamic_loss_scaling_skips_what_overflows():
    model = Points(numpy.float32)
    optimizer = SRSGD(lr=0.05).setup(model)
    optimizer.loss_scaling(scale=None)
    before = values(model)
    model.cleargrads()
    model.a.grad = numpy.full((3, 4), numpy.inf, numpy.float32)
    optimizer.update()
    assert_equal(model, before)


def test_state_follows_the_parameter_object():
    rule = SRSGDRule(SRSGD().hyperparam)
    param = chainer.Parameter(numpy.ones(3, numpy.float32))
    param.update_rule = rule
    array = param.array
    param.grad = numpy.ones(3, numpy.float32)
    param.update()
    assert param.array is array  # updated in place: others may hold it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restarts": ()}, "one or more periods"),
        ({"restarts": (3, 0)}, "at least 1 iteration"),
        ({"period": "theirs"}, "'theirs': choose one of paper, authors"),
    ],
)
def test_bad_options_of_srsgd(options, message):
    with pytest.raises(ValueError, match=message):
        SRSGD(**options)


def test_radam_follows_the_formula():
    model = Points()
    alpha, beta1, beta2, eps, decay = 0.02, 0.9, 0.999, 1e-8, 0.1
    optimizer = RAdam(alpha, beta1, beta2, eps, decay).setup(model)
    w = values(model)
    m = {n: numpy.zeros_like(x) for n, x in w.items()}
    v = {n: numpy.zeros_like(x) for n, x in w.items()}
    rectified = 0
    rho_inf = 2 / (1 - beta2) - 1
    for t in range(1, 21):
        g = gradients(w)
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        for n in w:
            m[n] = beta1 * m[n] + (1 - beta1) * g[n]
            v[n] = beta2 * v[n] + (1 - beta2) * g[n] ** 2
            w[n] = w[n] * (1 - alpha * decay)
            mhat = m[n] / (1 - beta1**t)
            if rho >= 5:
                r = math.sqrt(
                    (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
                )
                # eps belongs to the root before the correction of its bias
                c = math.sqrt(1 - beta2**t)
                w[n] = w[n] - alpha * r * c * mhat / (numpy.sqrt(v[n]) + eps)
            else:
                w[n] = w[n] - alpha * mhat
        rectified += rho >= 5
        optimizer.update(model)
        assert_equal(model, w, rtol=1e-10)
    assert rectified == 15  # the first five of beta2 = .999 are not
    assert rectification(5, beta2) is None
    assert rectification(10**6, beta2) == pytest.approx(1)


def test_adamw_follows_the_formula():
    model = Points()
    alpha, beta1, beta2, eps, decay = 0.02, 0.9, 0.999, 1e-8, 0.1
    optimizer = AdamW(alpha, beta1, beta2, eps, decay, warmup=4).setup(model)
    w = values(model)
    m = {n: numpy.zeros_like(x) for n, x in w.items()}
    v = {n: numpy.zeros_like(x) for n, x in w.items()}
    for t in range(1, 13):
        if t == 8:
            alpha = optimizer.alpha = 0.002
        rate = alpha * min(1, t / 4)
        g = gradients(w)
        for n in w:
            m[n] = beta1 * m[n] + (1 - beta1) * g[n]
            v[n] = beta2 * v[n] + (1 - beta2) * g[n] ** 2
            step = math.sqrt(1 - beta2**t) / (1 - beta1**t) * m[n] / (numpy.sqrt(v[n]) + eps)
            w[n] = w[n] - rate * step - rate * decay * w[n]
        optimizer.update(model)
        assert_equal(model, w, rtol=1e-10)


MULTI_NODE = """
import sys
sys.path.insert(0, sys.argv[1])
import chainer_ooc, chainer, chainermn, numpy
from optimizers.srsgd import SRSGD
comm = chainermn.create_communicator("naive")
link = chainer.Link()
with link.init_scope():
    link.w = chainer.Parameter(numpy.arange(4, dtype=numpy.float64))
optimizer = chainermn.create_multi_node_optimizer(SRSGD(lr=0.1, restarts=(3, 4)), comm)
optimizer.setup(link)
optimizer.is_changed(link)
for k in range(9):
    if k == 5:
        optimizer.lr = 0.05
    link.w.grad = link.w.array + (comm.rank - 0.5)
    optimizer.update()
w = numpy.arange(4, dtype=numpy.float64)
v = w
for k in range(9):
    lr, period = (0.1, 3) if k < 5 else (0.05, 4)
    mu = k % period / (k % period + 3)
    following = w - lr * w  # the mean gradient of both ranks
    w, v = following + mu * (following - v), following
numpy.testing.assert_allclose(link.w.array, w, rtol=1e-12)
assert optimizer.stage == 1 and comm.size == 2
print("equal", flush=True)
"""


@pytest.mark.mpi
def test_two_ranks_take_the_mean_gradient(tmp_path):
    pytest.importorskip("mpi4py")
    mpiexec = find_mpiexec()
    if mpiexec is None:
        pytest.skip("no mpiexec")
    script = tmp_path / "two_ranks.py"
    script.write_text(MULTI_NODE)
    imagenet = Path(__file__).parents[2] / "examples" / "imagenet"
    done = subprocess.run(
        [mpiexec, "-n", "2", sys.executable, str(script), str(imagenet)],
        env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 2


def test_settings_reach_the_rules():
    model = Points(numpy.float32)
    config = Config(
        optimizer="srsgd", restarts=(30, 60), restart_period="authors", restart_shrink=True, epoch=9
    )
    optimizer, _ = optimizers.create(config, 1, model)
    assert (optimizer.lr, optimizer.restarts) == (0.1, (30, 60))
    assert (optimizer.period, optimizer.shrink_until) == ("authors", 9)
    assert optimizers.create(Config(optimizer="srsgd"), 1, model)[0].restarts == (40,)
    for name in ("radam", "adamw"):
        optimizer, _ = optimizers.create(Config(optimizer=name, weight_decay=0.1), 1, model)
        assert (optimizer.alpha, optimizer.weight_decay) == (0.001, 0.1)


def test_schedule_moves_the_restarts():
    model = Points(numpy.float32)
    config = Config(optimizer="srsgd", restarts=(2, 3), lr_drops=(1, 2), epoch=3)
    optimizer, control = optimizers.create(config, 1, model)
    stages = []
    for i in range(12):
        control(i / 4, i / 12)
        optimizer.update(model)
        stages.append((optimizer.stage, optimizer.restart_period(), round(optimizer.lr, 6)))
    assert stages == [(0, 2, 0.1)] * 4 + [(1, 3, 0.01)] * 4 + [(2, 3, 0.001)] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"restarts": (3,)}, "--restarts .*: only with --optimizer srsgd"),
        ({"optimizer": "srsgd", "restarts": (0,)}, "greater than or equal to 1"),
        ({"optimizer": "srsgd", "momentum": 0.5}, "--momentum 0.5: srsgd has none"),
        ({"optimizer": "srsgd", "restart_shrink": True, "iteration": 5}, "leave out --iteration 5"),
        ({"optimizer": "radam", "weight_decay_on": "weights"}, "not with --optimizer radam"),
        ({"optimizer": "adamw", "regime": ((1, 0.1, 0.0),)}, "not those of --optimizer adamw"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)
