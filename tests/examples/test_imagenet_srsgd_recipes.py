"""Recipes: the published settings, under names, each with a form that runs in seconds."""

import json
import math

import models
import pytest
from config import parse_args, recipes, resolve
from errors import InputError

NAMES = recipes.names()
DEPTHS = (110, 290, 470, 650, 1001)


def settings(name, smoke=False):
    return resolve({}, None, name, smoke)[0]


def test_there_are_all():
    expected = {
        f"{kind}-{data}-preresnet{depth}{end}"
        for data in ("cifar10", "cifar100")
        for depth in DEPTHS
        for kind, end in (
            ("sgd", ""), ("srsgd", "-linear"), ("srsgd", "-exponential"), ("srsgd", "-short")
        )
    }  # fmt: skip
    expected |= {
        f"{kind}-imagenet-resnet{depth}{end}"
        for depth in (50, 101, 152, 200)
        for kind, end in (("sgd", ""), ("srsgd", ""), ("srsgd", "-short"))
    }
    assert expected <= set(NAMES)


RESTARTS = {
    ("cifar10", "linear"): (30, 60, 90, 120),
    ("cifar10", "exponential"): (40, 50, 63, 78),
    ("cifar10", "short"): (30, 60, 90, 120),
    ("cifar100", "linear"): (50, 100, 150, 200),
    ("cifar100", "exponential"): (45, 68, 101, 152),
    ("cifar100", "short"): (50, 100, 150, 200),
}


@pytest.mark.parametrize(("data", "schedule"), RESTARTS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_srsgd_on_cifar(data, schedule, depth):
    config = settings(f"srsgd-{data}-preresnet{depth}-{schedule}")
    assert (config.dataset, config.arch, config.optimizer) == (data, f"preresnet{depth}", "srsgd")
    assert config.restarts == RESTARTS[data, schedule]
    length = (100, (80, 90, 95)) if schedule == "short" else (200, (80, 120, 160))
    assert (config.epoch, config.lr_drops) == length
    assert (config.lr, config.lr_gamma, config.weight_decay) == (0.1, 0.1, 5e-4)
    assert (config.batchsize, config.n_classes) == (128, 10 if data == "cifar10" else 100)
    assert not config.restart_shrink


@pytest.mark.parametrize(
    ("name", "epoch", "drops"),
    [(f"srsgd-imagenet-resnet{d}", 90, (31, 61)) for d in (50, 101, 152, 200)]
    + [
        ("srsgd-imagenet-resnet50-short", 80, (31, 51)),
        ("srsgd-imagenet-resnet101-short", 80, (31, 56)),
        ("srsgd-imagenet-resnet152-short", 75, (31, 51)),
        ("srsgd-imagenet-resnet200-short", 60, (31, 46)),
    ],
)
def test_srsgd_on_imagenet(name, epoch, drops):
    config = settings(name)
    assert (config.epoch, config.lr_drops, config.restarts) == (epoch, drops, (40, 80, 80))
    assert (config.lr, config.weight_decay, config.batchsize) == (0.1, 1e-4, 32)
    assert config.restart_shrink
    assert (config.augmentation_name, config.n_classes) == ("resnet", 1000)


def test_torch7_regime():
    config = settings("torch7-imagenet-alexnet")
    assert config.regime == (
        (1, 1e-2, 5e-4), (19, 5e-3, 5e-4), (30, 1e-3, 0), (44, 5e-4, 0), (53, 1e-4, 0)
    )  # fmt: skip
    assert (config.epoch, config.batchsize, config.momentum, config.seed) == (55, 128, 0.9, 2)
    assert (config.snapshot, config.loaderjob, config.augmentation) == (5, 4, "torch7")


def test_every_recipe_and_its_small_form():
    for name in NAMES:
        check_small_form(name)


def check_small_form(name):
    full, small = settings(name), settings(name, smoke=True)
    for config in (full, small):
        models.check_insize(config.arch, config.insize)
    assert (small.arch, small.optimizer) == (full.arch, full.optimizer)
    assert small.restarts == full.restarts
    assert (small.dataset, small.n_classes) == ("digits", 10)
    assert small.iteration <= 6
    assert len(small.lr_drops) == len(full.lr_drops)
    assert small.insize * small.batchsize < 300
    smaller = small.batchsize / full.batchsize
    if full.lr is not None:
        assert small.lr == pytest.approx(full.lr * smaller)
    if full.regime:
        epochs, rates, decays = zip(*full.regime, strict=True)
        assert small.regime == tuple(zip(epochs, [r * smaller for r in rates], decays, strict=True))


def test_the_command_line_counts_more():
    config, _ = resolve({"epoch": "3"}, None, "sgd-cifar10-preresnet110")
    assert (config.epoch, config.lr) == (3, 0.1)


def test_the_command_line_takes_another_schedule():
    torch7 = ["--recipe", "torch7-imagenet-alexnet"]
    config = parse_args([*torch7, "--lr", "0.02", "--weight-decay", "5e-4"])
    assert (config.lr, config.regime, config.weight_decay) == (0.02, (), 5e-4)
    assert parse_args([*torch7, "--lr-schedule", "cosine"]).regime == ()
    assert parse_args([*torch7, "--lr-schedule", "regime"]).regime[1][0] == 19
    srsgd = ["--recipe", "srsgd-cifar10-preresnet110-linear"]
    config = parse_args([*srsgd, "--lr-schedule", "cosine"])
    assert (config.lr_drops, config.restarts) == ((), (30, 60, 90, 120))
    config = parse_args([*srsgd, "--restarts", "none", "--lr-drops", "none", "--optimizer", "adam"])
    assert (config.lr_drops, config.restarts, config.optimizer) == ((), (), "adam")


def test_unknown_recipe():
    with pytest.raises(InputError, match=r"--recipe srsgd-cifar10: no such recipe.*`ls "):
        resolve({}, None, "srsgd-cifar10")
    with pytest.raises(InputError, match="--smoke: only with --recipe NAME"):
        resolve({}, None, None, True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_every_small_form_runs(train, tmp_path, name):
    """Every second one out of core; all losses are numbers."""
    ooc = ("--ooc",) if NAMES.index(name) % 2 else ()
    done = train("--recipe", name, "--smoke", *ooc, "-o", tmp_path / "out")
    assert f"model: {settings(name).arch}, " in done.stdout
    assert ("out of core" in done.stdout) == bool(ooc)
    entry = json.loads((tmp_path / "out" / "log").read_text())[-1]
    assert math.isfinite(entry["main/loss"])
    # With the running statistics of five iterations those of 150 layers and more would overflow.
    assert entry["validation/main/loss"] < 100


@pytest.mark.slow
def test_small_form_runs(train, tmp_path):
    done = train("--recipe", "srsgd-imagenet-resnet50", "--smoke", "-o", tmp_path / "out")
    assert "model: resnet50v15, insize 32" in done.stdout
    assert "val accuracy" in done.stdout
