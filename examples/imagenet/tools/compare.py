#!/usr/bin/env python
"""Trains one network with SGD and momentum and with scheduled restart SGD, and compares them.

    python examples/imagenet/tools/compare.py
    python examples/imagenet/tools/compare.py --data cifar10_subset.npz --crop 4 --flip --epochs 20

Everything but the rule of the updates is the same: initialization, order, augmentation, learning
rates and weight decay, for each of several seeds. The table gives mean and standard deviation over
the seeds, and the mean difference of the pairs with its 95 % interval.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import launcher

if "numpy" not in sys.modules:
    launcher.limit_threads()

import chainer_ooc  # noqa: F401  first: it makes stock Chainer importable

# isort: split

import chainer
import models
import numpy as np
from arch_names import ARCH_NAMES
from files import write_text
from optimizers.srsgd import PERIODS, SRSGD

from tools.common import Parser, integer, print_table, progress, run
from tools.comparison_plot import plot
from tools.image_arrays import Images, load

METHODS = ("SGD + momentum", "SRSGD")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantiles of Student's t, by number of pairs."""


def prepare(images: Images, shrink: int) -> Images:
    """Returns three-channel images, averaged over ``shrink`` x ``shrink`` pixels, standardized."""

    def smaller(x: np.ndarray) -> np.ndarray:
        n, c, h, w = x.shape
        x = x[:, :, : h // shrink * shrink, : w // shrink * shrink]
        x = x.reshape(n, c, h // shrink, shrink, w // shrink, shrink).mean(axis=(3, 5))
        return np.repeat(x, 3, axis=1) if c == 1 else x

    x_train, x_test = smaller(images.x_train), smaller(images.x_test)
    mean = x_train.mean(axis=(0, 2, 3), keepdims=True)
    std = x_train.std(axis=(0, 2, 3), keepdims=True)
    return images._replace(
        x_train=((x_train - mean) / std).astype(np.float32),
        x_test=((x_test - mean) / std).astype(np.float32),
    )


def augment(x: np.ndarray, crop: int, flip: bool, rng: np.random.Generator) -> np.ndarray:
    """Crops each image at random from one padded by ``crop`` zeros, and flips every other one."""
    if crop:
        h, w = x.shape[2:]
        padded = np.pad(x, ((0, 0), (0, 0), (crop, crop), (crop, crop)))
        ys, xs = rng.integers(0, 2 * crop + 1, (2, len(x)))
        x = np.stack([
            image[:, i : i + h, j : j + w] for image, i, j in zip(padded, ys, xs, strict=True)
        ])  # fmt: skip
    if flip:
        mirrored = rng.random(len(x)) < 0.5
        x = np.where(mirrored[:, None, None, None], x[..., ::-1], x)
    return np.ascontiguousarray(x)


def train(
    method: str, seed: int, images: Images, args: Namespace, step: Callable[[], object]
) -> dict[str, list[float]]:
    """Trains once; returns training loss and test error (in percent) of each epoch."""
    np.random.seed(seed)  # Chainer's initializers draw from it
    model = models.create(args.arch, images.x_train.shape[2], images.n_classes)
    if method == "SRSGD":
        optimizer: Any = SRSGD(args.lr, args.restarts, args.period)
    else:
        optimizer = chainer.optimizers.MomentumSGD(args.lr, args.momentum)
    optimizer.setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(args.weight_decay))
    rng = np.random.default_rng(seed)
    losses, errors = [], []
    for epoch in range(args.epochs):
        optimizer.lr = args.lr * args.gamma ** sum(epoch >= drop for drop in args.drops)
        total = 0.0
        order = rng.permutation(len(images.x_train))
        batches = np.array_split(order, max(1, len(order) // args.batchsize))
        for batch in batches:
            x = augment(images.x_train[batch], args.crop, args.flip, rng)
            t = images.t_train[batch]
            loss = model(x, t)
            total += float(loss.array) * len(batch)
            model.cleargrads()
            loss.backward()
            del loss
            optimizer.update()
        losses.append(total / len(order))
        errors.append(test_error(model, images, args.batchsize))
        optimizer.new_epoch()
        step()
    return {"training_loss": losses, "test_error": errors}


def test_error(model: chainer.Chain, images: Images, batchsize: int) -> float:
    """Returns the error on the test images in percent."""
    right = 0
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        for i in range(0, len(images.x_test), batchsize):
            scores = model.predict(images.x_test[i : i + batchsize]).array
            right += int(np.sum(scores.argmax(axis=1) == images.t_test[i : i + batchsize]))
    return 100 * (1 - right / len(images.x_test))


def summarize(runs: dict[str, list[dict[str, list[float]]]]) -> dict[str, Any]:
    """Returns means, standard deviations and the difference of the last epochs."""
    summary: dict[str, Any] = {}
    for key in ("test_error", "training_loss"):
        last = {m: np.array([r[key][-1] for r in runs[m]]) for m in METHODS}
        difference = last["SRSGD"] - last["SGD + momentum"]
        n = len(difference)
        half = T_95.get(n, 2.2) * difference.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
        summary[key] = {
            **{m: {"mean": float(v.mean()), "deviation": float(v.std(ddof=1)) if n > 1 else 0.0}
               for m, v in last.items()},
            "difference": float(difference.mean()),
            "interval": None if math.isnan(half) else float(half),
        }  # fmt: skip
    return summary


def report(summary: dict[str, Any]) -> None:
    """Prints the table."""
    rows = []
    for key, title in (("test_error", "test error, %"), ("training_loss", "training loss")):
        entry = summary[key]
        half = "" if entry["interval"] is None else f" ± {entry['interval']:.3g} (95 %)"
        rows.append((
            title,
            *(f"{entry[m]['mean']:.3g} ± {entry[m]['deviation']:.2g}" for m in METHODS),
            f"{entry['difference']:+.3g}{half}",
        ))  # fmt: skip
    print_table(("after the last epoch", *METHODS, "difference"), rows)


def build_parser() -> Parser:
    """Returns the parser of the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--data", default="digits", metavar="SET",
        help="digits, a folder with MNIST's test files, or an .npz file (default %(default)s)")
    add("--arch", choices=ARCH_NAMES, default="preresnet11", metavar="NAME",
        help="network (default %(default)s)")
    add("--shrink", type=integer(1), default=1, metavar="N",
        help="average N x N pixels first (default %(default)s)")
    add("--crop", type=integer(0), default=0, metavar="PIXELS",
        help="train on random crops of images padded by so much (default %(default)s)")
    add("--flip", action="store_true", help="mirror half of the training images")
    add("--epochs", type=integer(1), default=30, metavar="N", help="epochs (default %(default)s)")
    add("--drops", type=integer(1), nargs="*", default=None, metavar="EPOCH",
        help="epochs after which the learning rate drops (default: a half and three quarters)")
    add("--gamma", type=float, default=0.1, help="factor of a drop (default %(default)s)")
    add("--lr", type=float, default=0.1, help="learning rate (default %(default)s)")
    add("--momentum", type=float, default=0.9, help="of SGD (default %(default)s)")
    add("--restarts", type=integer(1), nargs="+", default=[30, 60, 90], metavar="F",
        help="SRSGD's restart periods in iterations (default 30 60 90)")
    add("--period", choices=PERIODS, default="paper", help="SRSGD's form (default %(default)s)")
    add("--weight-decay", type=float, default=5e-4, help="(default %(default)s)")
    add("--batchsize", "-B", type=integer(2), default=128, metavar="N", help="(default %(default)s)")
    add("--seeds", type=integer(1), default=5, metavar="N", help="runs each (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all runs here")
    add("--plot", type=Path, metavar="FILE", help="write the curves here (PNG)")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    if args.drops is None:
        args.drops = sorted({max(1, args.epochs // 2), max(1, args.epochs * 3 // 4)})

    def tool() -> int:
        images = prepare(load(args.data), args.shrink)
        models.check_insize(args.arch, images.x_train.shape[2])
        runs: dict[str, list[dict[str, list[float]]]] = {m: [] for m in METHODS}
        start = time.perf_counter()
        with progress(None, total=args.seeds * 2 * args.epochs, unit="epoch") as bar:
            for seed in range(args.seeds):
                for method in METHODS:
                    runs[method].append(train(method, seed, images, args, bar.update))
        seconds = time.perf_counter() - start
        summary = summarize(runs)
        side = images.x_train.shape[2]
        print(f"{args.arch} on {images.title} of {side} x {side}, {len(images.x_test):,} test "
              f"images, {args.epochs} epochs, {args.seeds} seeds, {seconds:.0f} s")  # fmt: skip
        report(summary)
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "plot")}
        settings.update(data=images.title, side=side, test_images=len(images.x_test))
        results = {
            "settings": settings,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "seconds": seconds,
            "summary": summary,
            "runs": runs,
        }
        if args.json:
            write_text(args.json, json.dumps(results, indent=1) + "\n")
        if args.plot:
            plot(results, args.plot)
        return 0

    return run(tool)


if __name__ == "__main__":
    sys.exit(main())
