#!/usr/bin/env python
"""Reproduces the table on the quadratic function of the paper on scheduled restarts.

    python examples/imagenet/tools/quadratic.py
    python examples/imagenet/tools/quadratic.py --noise exact --json quadratic.json

Five methods minimize f(x) = x.P.x / 2 - x_1, P tridiagonal (-1, 2, -1) with 1,000 rows, from 0 with
step 1/4, with exact and with noisy gradients; the number is f(x) - f(x*) after 50,000 iterations
(arXiv:2002.10583, figure 2). A row with noise is shown as mean and standard deviation over seeds,
with the exact ones over all noises below it (the problem is linear, but for the adaptive restart),
and the probability of a run as far out as the published one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from files import whole_file, write_text

from tools.common import Parser, integer, print_table, progress, run
from tools.momentum_rules import METHODS
from tools.quadratic_problem import (
    NOISES,
    PUBLISHED,
    Distribution,
    Result,
    distributions,
    gap,
    objective,
    simulate,
)

PAPER = (1000, 50000)
"""Unknowns and iterations of the published table."""
FLOOR = 1e-30
"""Smallest gap that is drawn: below it are rounding errors of the solution itself."""


def figures(values: Any, digits: int = 3) -> str:
    """Formats a number to a few significant digits."""
    return f"{float(values):.{digits}g}"


def row(
    name: str, result: Result, exact: dict[str, Distribution], published: tuple[float, ...] | None
) -> dict[str, Any]:
    """Returns what JSON holds of one row of the table."""
    methods = {}
    for i, method in enumerate(METHODS):
        runs = result.final[i]
        entry: dict[str, Any] = {
            "runs": runs.tolist(),
            "mean": float(runs.mean()),
            "deviation": float(runs.std(ddof=1)) if len(runs) > 1 else 0.0,
        }
        if method in exact:
            entry["exact_mean"] = exact[method].mean
            entry["exact_deviation"] = exact[method].deviation
        if published is not None:
            entry["published"] = published[i]
            if method in exact and len(runs) > 1:
                entry["probability_of_published"] = exact[method].tail(published[i])
        methods[method] = entry
    return {"title": NOISES[name].title, "methods": methods}


def table(rows: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Returns the lines of the printed table."""
    lines = []
    for entry in rows.values():
        methods = entry["methods"].values()
        noisy = len(next(iter(methods))["runs"]) > 1
        lines.append((
            entry["title"],
            *(figures(m["mean"]) + (f" ± {figures(m['deviation'], 2)}" if noisy else "")
              for m in methods),
        ))  # fmt: skip
        if noisy:
            lines.append((
                "  over all noises",
                *(f"{figures(m['exact_mean'])} ± {figures(m['exact_deviation'], 2)}"
                  if "exact_mean" in m else "-" for m in methods),
            ))  # fmt: skip
        if all("published" in m for m in methods):
            lines.append(("  published", *(figures(m["published"]) for m in methods)))
            if noisy:
                lines.append((
                    "    its probability",
                    *(figures(m["probability_of_published"], 2)
                      if "probability_of_published" in m else "-" for m in methods),
                ))  # fmt: skip
    return lines


def plot(results: dict[str, Result], path: Path) -> None:
    """Draws the gap over the iterations: the mean over the seeds and their range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(results), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (name, result) in enumerate(results.items()):
        axes = figure.add_subplot(1, len(results), i + 1)
        for m, method in enumerate(METHODS):
            curve = np.maximum(result.curves[:, m], FLOOR)
            axes.semilogy(result.iterations, curve.mean(axis=1), lw=1.2, label=method)
            if curve.shape[1] > 1:
                axes.fill_between(
                    result.iterations, curve.min(axis=1), curve.max(axis=1), alpha=0.2
                )
        runs = result.curves.shape[2]
        axes.set_title(NOISES[name].title + (f" (mean and range of {runs})" if runs > 1 else ""))
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        if i == 0:
            axes.set_ylabel("f(x) - f(x*)")
    axes.legend(fontsize=8, loc="upper right")
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--size", type=integer(2), default=PAPER[0], metavar="N",
        help="unknowns (default %(default)s)")
    add("--iterations", type=integer(2), default=PAPER[1], metavar="T",
        help="iterations (default %(default)s); the restart schedules stay those of the paper")
    add("--noise", choices=list(NOISES), nargs="+", default=list(NOISES),
        help="rows of the table (default: all)")
    add("--seeds", type=integer(2), default=10, metavar="N",
        help="runs of each row with noise (default %(default)s)")
    add("--restart-by", choices=("objective", "gap"), default="objective",
        help="what the adaptive restart compares: f(x) as it is computed, which rounding makes "
        "useless below 1e-13 (the published 2.1e-13), or the exact gap")
    add("--json", type=Path, metavar="FILE", help="write all runs and the curves' ends here")
    add("--plot", type=Path, metavar="FILE", help="write the curves here (PNG)")
    # fmt: on
    args = parser.parse_args(argv)

    def tool() -> int:
        published = PUBLISHED if (args.size, args.iterations) == PAPER else {}
        results, rows = {}, {}
        start = time.perf_counter()
        for name in args.noise:
            noise = NOISES[name]
            with progress(None, total=args.iterations - 1, desc=name, unit="it") as bar:
                results[name] = simulate(
                    args.size, args.iterations, noise, args.seeds, lambda t, bar=bar: bar.update(),
                    gap if args.restart_by == "gap" else objective,
                )  # fmt: skip
            exact = distributions(args.size, args.iterations, noise)
            rows[name] = row(name, results[name], exact, published.get(name))
        print_table(("f(x) - f(x*)", *METHODS), table(rows))
        print(f"{args.size} unknowns, {args.iterations} iterations, {args.seeds} seeds, "
              f"{time.perf_counter() - start:.0f} s")  # fmt: skip
        if args.json:
            settings = {
                "size": args.size,
                "iterations": args.iterations,
                "seeds": args.seeds,
                "restart_by": args.restart_by,
            }
            write_text(args.json, json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
        if args.plot:
            plot(results, args.plot)
        return 0

    return run(tool)


if __name__ == "__main__":
    sys.exit(main())
