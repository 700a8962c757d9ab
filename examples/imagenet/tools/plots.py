#!/usr/bin/env python
"""Draws the paper's plots from folders of results (arXiv:2002.10583).

    python examples/imagenet/tools/plots.py depth results/* --published cifar10 -o depth.png
    python examples/imagenet/tools/plots.py loss results/srsgd results/sgd -o loss.png
    python examples/imagenet/tools/plots.py epochs results/* -o epochs.png
    python examples/imagenet/tools/plots.py restarts results/* -o restarts.png

depth: validation error against the depth of the network. loss: training loss and validation error
against the epoch. epochs: error against the number of epochs saved. restarts: error and training
loss against SRSGD's first restart period. Runs that differ only in the seed become one point with
their mean and standard deviation; other settings that differ make lines of their own, which the
legend tells apart. The points are printed as well.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from errors import InputError
from files import whole_file

from tools.common import Parser, print_table, run
from tools.result_folders import Result, read

PUBLISHED: dict[str, dict[str, dict[int, float]]] = {
    "cifar10": {
        "SGD": {110: 5.25, 290: 5.05, 470: 4.92, 650: 4.87, 1001: 4.84},
        "SRSGD": {110: 4.93, 290: 4.37, 470: 4.18, 650: 4.00, 1001: 3.87},
    },
    "cifar100": {
        "SGD": {110: 23.75, 290: 21.78, 470: 21.43, 650: 21.27, 1001: 20.87},
        "SRSGD": {110: 23.49, 290: 21.49, 470: 20.71, 650: 20.36, 1001: 19.75},
    },
    "imagenet": {
        "SGD": {50: 24.11, 101: 22.42, 152: 22.03, 200: 22.13},
        "SRSGD": {50: 23.85, 101: 22.06, 152: 21.46, 200: 20.93},
    },
}
"""Test errors in percent by depth, from tables 1 to 3 of the paper."""

Points = dict[str, dict[float, list[float]]]
"""Values of the runs by name of the line and by place on the x axis."""

NAMES = {"momentum_sgd": "SGD + momentum", "srsgd": "SRSGD"}

DISTINCTIVE = (
    "dataset", "arch", "insize", "epoch", "iteration", "restarts", "lr", "lr_drops", "lr_gamma", "lr_schedule",
    "regime", "momentum", "weight_decay", "restart_period", "restart_shrink", "batchsize", "augmentation",
    "normalization", "dtype", "nclasses", "label_smoothing", "lars",
)  # fmt: skip
"""Settings that make runs of one method different lines; those that tell most come first."""


def lines(results: list[Result], *along: str) -> dict[str, list[Result]]:
    """Returns the runs of each line by its name.

    Runs of one optimizer are on one line unless a setting of ``DISTINCTIVE`` differs. A setting is
    named where it tells lines apart that those before it do not.

    Args:
        results: The runs.
        along: Settings that may differ on a line.
    """
    methods: dict[str, list[Result]] = {}
    for result in results:
        methods.setdefault(NAMES.get(result.method, result.method), []).append(result)
    found: dict[str, list[Result]] = {}
    for method, runs in methods.items():
        groups = {method: runs}
        for key in DISTINCTIVE:
            values = {_words(result.settings.get(key)) for result in runs}
            if key in along or len(values) == 1:
                continue
            finer: dict[str, list[Result]] = {}
            for name, group in groups.items():
                for result in group:
                    finer.setdefault(f"{name}, {_setting(key, result)}", []).append(result)
            if len(finer) > len(groups):
                groups = finer
        found |= groups
    return found


def _setting(key: str, result: Result) -> str:
    value = _words(result.settings.get(key))
    return {"arch": value, "dataset": value, "epoch": f"{value} epochs"}.get(
        key, f"{key.replace('_', ' ')} {value}"
    )


def _words(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def collect(
    groups: dict[str, list[Result]], x: Callable[[Result], float], y: Callable[[Result], float]
) -> Points:
    """Returns y of the runs of each line by x."""
    points: Points = {}
    for name, runs in groups.items():
        for result in runs:
            points.setdefault(name, {}).setdefault(x(result), []).append(y(result))
    return points


def draw(axes: Any, points: Points, x_title: str, y_title: str) -> None:
    """Draws lines of means, with the standard deviations of several seeds as bars."""
    for name, line in points.items():
        xs = sorted(line)
        means = [float(np.mean(line[x])) for x in xs]
        spread = [float(np.std(line[x], ddof=1)) if len(line[x]) > 1 else 0.0 for x in xs]
        axes.errorbar(xs, means, spread, marker="o", ms=4, lw=1.3, capsize=3, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.grid(alpha=0.3)


def points_table(points: Points, x_title: str, y_title: str) -> None:
    """Prints what ``draw`` draws."""
    rows = [
        (name, f"{x:g}", len(values), f"{np.mean(values):.4g}",
         f"{np.std(values, ddof=1):.2g}" if len(values) > 1 else "-")
        for name, line in points.items() for x, values in sorted(line.items())
    ]  # fmt: skip
    print_table(("method", x_title, "runs", y_title, "deviation"), rows)


def depth(figure: Any, results: list[Result], args: Namespace) -> None:
    """Error against depth."""
    points = collect(lines(results, "arch"), lambda r: r.depth, lambda r: r.error)
    axes = figure.add_subplot()
    titles = ("depth", "validation error, %")
    draw(axes, points, *titles)
    shown = dict(points)
    if args.published:
        for colour, (name, line) in zip(
            ("0.5", "black"), PUBLISHED[args.published].items(), strict=True
        ):
            axes.plot(
                list(line), list(line.values()), "s--", ms=3, lw=1, color=colour,
                label=f"{name}, published ({args.published})",
            )  # fmt: skip
            shown[f"{name}, published"] = {depth: [error] for depth, error in line.items()}
    points_table(shown, *titles)


def loss(figure: Any, results: list[Result], args: Namespace) -> None:
    """Training loss and validation error against the epoch."""
    figure.set_size_inches(11, 4.2)
    left, right = figure.subplots(1, 2)
    groups = lines(results)
    for name, runs in groups.items():
        for axes, key in ((left, "main/loss"), (right, "validation/main/accuracy")):
            shortest = min(len(r.series(key)[1]) for r in runs)
            values = np.array([r.series(key)[1][:shortest] for r in runs])
            values = 100 * (1 - values) if axes is right else values
            epochs = runs[0].series(key)[0][:shortest]
            axes.plot(epochs, values.mean(axis=0), lw=1.3, label=name)
            if len(runs) > 1:
                axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), alpha=0.2)
    left.set_yscale("log")
    left.set_ylabel("training loss")
    right.set_ylabel("validation error, %")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3, which="both")
    points = collect(groups, lambda r: r.epochs, lambda r: r.training_loss)
    points_table(points, "epochs", "training loss")


def epochs(figure: Any, results: list[Result], args: Namespace) -> None:
    """Error against the number of epochs saved, compared with the longest run."""
    longest = max(result.epochs for result in results)
    groups = lines(results, "epoch", "lr_drops")
    points = collect(groups, lambda r: longest - r.epochs, lambda r: r.error)
    titles = ("epochs saved", "validation error, %")
    axes = figure.add_subplot()
    draw(axes, points, f"{titles[0]} (of {longest})", titles[1])
    points_table(points, *titles)


def restarts(figure: Any, results: list[Result], args: Namespace) -> None:
    """Error and training loss against the first restart period."""
    figure.set_size_inches(11, 4.2)
    for axes, title, value in zip(
        figure.subplots(1, 2),
        ("validation error, %", "training loss"),
        (lambda r: r.error, lambda r: r.training_loss),
        strict=True,
    ):
        points = collect(lines(results, "restarts"), lambda r: r.first_restart, value)
        draw(axes, points, "first restart period F1, iterations", title)
        points_table(points, "F1", title)


KINDS = {function.__name__: function for function in (depth, loss, epochs, restarts)}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("kind", choices=list(KINDS), help="which plot")
    add("results", type=Path, nargs="*", metavar="FOLDER", help="folders of results of train.py")
    add("--published", choices=list(PUBLISHED), help="with depth: draw the paper's errors, too")
    add("--out", "-o", type=Path, default=None, metavar="FILE",
        help="the picture, a PNG file (default: the kind's name)")
    # fmt: on
    args = parser.parse_args(argv)

    def tool() -> int:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        if args.published and args.kind != "depth":
            raise InputError(f"--published {args.published}: only with depth")
        if not args.results and not args.published:
            raise InputError("no FOLDER: give folders of results of train.py")
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        KINDS[args.kind](figure, [read(folder) for folder in args.results], args)
        for axes in figure.axes:
            axes.legend(fontsize=8)
        path = args.out or Path(f"{args.kind}.png")
        with whole_file(path) as partial:
            figure.savefig(partial, format="png", dpi=120)
        print(f"picture: {path}")
        return 0

    return run(tool)


if __name__ == "__main__":
    sys.exit(main())
