#!/usr/bin/env python
"""Training curves of logistic regression with the methods of the paper on scheduled restarts.

    python examples/imagenet/tools/logistic.py
    python examples/imagenet/tools/logistic.py --data mnist/ --iterations 20000 --plot curves.png

The five methods of tools/quadratic.py minimize the cross entropy of a linear classifier on real
images with gradients of mini-batches, from zero weights and with one step size (arXiv:2002.10583,
figure 3, on MNIST): plain NAG gathers the noise, restarts keep its speed. The number is the loss on
all training images; mean and standard deviation over seeds of the order of the images.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from files import whole_file, write_text

from tools.common import Parser, integer, print_table, progress, run
from tools.image_arrays import Images, load
from tools.momentum_rules import METHODS, Momentum

PUBLISHED = (0.3033, 0.4004, 60.4394, 0.2601, 0.2537)
"""Last training losses of the authors' files, on the 60,000 training images of MNIST."""

RECORDS = 100


def losses(x: np.ndarray, t: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the mean cross entropy of each weight matrix.

    Args:
        x: Inputs (images, features).
        t: Labels (images,).
        weights: (runs, features, classes).
    """
    scores = np.einsum("nf,rfc->rnc", x, weights, optimize=True)
    scores -= scores.max(axis=2, keepdims=True)
    right = scores[:, np.arange(len(t)), t]
    return np.mean(np.log(np.exp(scores).sum(axis=2)) - right, axis=1)


def gradients(x: np.ndarray, t: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the gradients of ``losses``, shaped as the weights."""
    p = np.einsum("nf,rfc->rnc", x, weights, optimize=True)
    p = np.exp(p - p.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    p[:, np.arange(len(t)), t] -= 1
    return np.einsum("nf,rnc->rfc", x, p, optimize=True) / len(t)


def simulate(
    images: Images,
    step: float,
    batchsize: int,
    iterations: int,
    period: int,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Runs the five methods on the same batches.

    The adaptive restart compares the loss of the batch before and after the step.

    Args:
        images: The images.
        step: Step size.
        batchsize: Images of a gradient.
        iterations: Number of steps.
        period: Restart period of the scheduled restart, in iterations.
        seed: Seed of the order.
        progress: Called after each iteration.

    Returns:
        Iterations (records,) and training losses (records, methods).
    """
    x = images.x_train.reshape(len(images.x_train), -1).astype(np.float64)
    x = np.hstack([x, np.ones((len(x), 1))])
    t = images.t_train
    rng = np.random.default_rng(seed)
    rules = [Momentum(m, 1, ((float("inf"), period),)) for m in METHODS]
    adaptive = METHODS.index("NAG adaptive restart")
    y = np.zeros((len(METHODS), x.shape[1], images.n_classes))
    v = y.copy()
    keep = set(np.linspace(0, iterations, RECORDS + 1).astype(int).tolist())
    points = [0]
    curve = [losses(x, t, y)]
    order = np.empty(0, dtype=np.int64)
    for i in range(1, iterations + 1):
        if len(order) < batchsize:
            order = np.concatenate([order, rng.permutation(len(x))])
        batch, order = order[:batchsize], order[batchsize:]
        following = y - step * gradients(x[batch], t[batch], y)
        mu = np.stack([rule.mu() for rule in rules])[..., None]
        y = following + mu * (following - v)
        both = np.stack([v[adaptive], following[adaptive]])
        before, after = losses(x[batch], t[batch], both)
        for rule in rules:
            rule.advance(i, lambda: np.array([after > before]))  # noqa: B023
        v = following
        if i in keep:
            points.append(i)
            curve.append(losses(x, t, y))
        progress()
    return np.array(points), np.array(curve)


def plot(points: np.ndarray, curves: np.ndarray, title: str, path: Path) -> None:
    """Draws the losses (seeds, records, methods): mean and range over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for m, method in enumerate(METHODS):
        values = curves[:, :, m]
        axes.semilogy(points, values.mean(axis=0), lw=1.2, label=method)
        axes.fill_between(points, values.min(axis=0), values.max(axis=0), alpha=0.2)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss on all training images")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--data", default="digits", metavar="SET",
        help="digits, a folder with MNIST's test files, or an .npz file (default %(default)s)")
    add("--step", type=float, default=2.0, help="step size (default %(default)s)")
    add("--batchsize", "-B", type=integer(1), default=16, metavar="N", help="(default %(default)s)")
    add("--iterations", type=integer(100), default=6000, metavar="T", help="(default %(default)s)")
    add("--restart", type=integer(1), default=20, metavar="F",
        help="period of the scheduled restart in iterations (default %(default)s)")
    add("--seeds", type=integer(2), default=5, metavar="N", help="(default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the curves here")
    add("--plot", type=Path, metavar="FILE", help="write the curves here (PNG)")
    # fmt: on
    args = parser.parse_args(argv)

    def tool() -> int:
        images = load(args.data)
        start = time.perf_counter()
        with progress(None, total=args.seeds * args.iterations, unit="it") as bar:
            results = [
                simulate(images, args.step, args.batchsize, args.iterations, args.restart, seed,
                         bar.update)
                for seed in range(args.seeds)
            ]  # fmt: skip
        points = results[0][0]
        curves = np.array([curve for _, curve in results])
        last = curves[:, -1]
        print_table(
            ("training loss", *METHODS),
            [
                (images.title.split(":")[0],
                 *(f"{m:.3g} ± {d:.2g}" for m, d in
                   zip(last.mean(axis=0), last.std(axis=0, ddof=1), strict=True))),
                ("published, MNIST", *(f"{x:.3g}" for x in PUBLISHED)),
            ],
        )  # fmt: skip
        print(f"{args.iterations} iterations of {args.batchsize} images, step {args.step}, "
              f"{args.seeds} seeds, {time.perf_counter() - start:.0f} s")  # fmt: skip
        if args.json:
            settings = {**vars(args), "json": None, "plot": None, "data": images.title}
            entry = {
                "settings": settings,
                "iterations": points.tolist(),
                "methods": dict(zip(METHODS, curves.transpose(2, 0, 1).round(6).tolist(),
                                    strict=True)),
            }  # fmt: skip
            write_text(args.json, json.dumps(entry) + "\n")
        if args.plot:
            title = f"logistic regression, {images.title.split(':')[0]}, {args.seeds} seeds"
            plot(points, curves, title, args.plot)
        return 0

    return run(tool)


if __name__ == "__main__":
    sys.exit(main())
