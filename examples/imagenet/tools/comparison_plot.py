"""The picture of compare.py: mean and spread over the seeds, by epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from files import whole_file


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws training loss and test error; bars are one standard deviation over the seeds.

    Args:
        results: What compare.py writes as JSON.
        path: The PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    settings = results["settings"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (key, title) in enumerate(
        (("training_loss", "training loss"), ("test_error", "test error, %"))
    ):
        axes = figure.add_subplot(1, 2, i + 1)
        for j, (method, runs) in enumerate(results["runs"].items()):
            values = np.array([run[key] for run in runs])
            epochs = np.arange(1, values.shape[1] + 1) + 0.12 * (j - 0.5)
            spread = values.std(axis=0, ddof=1) if len(values) > 1 else None
            axes.errorbar(
                epochs, values.mean(axis=0), spread, label=method, lw=1.3, elinewidth=0.7, capsize=2
            )
        for drop in settings["drops"]:
            axes.axvline(drop + 0.5, color="0.7", lw=0.8, ls=":")
        axes.set_yscale("log")
        if max(axes.get_ylim()) < 3 * min(axes.get_ylim()):
            # less than a decade: numbers rather than powers of ten
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch (dotted: the learning rate drops)")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    seeds = settings["seeds"]
    side = settings["side"]
    size = f" of {side} x {side}" if settings.get("shrink", 1) > 1 else ""
    figure.suptitle(
        f"{settings['arch']}, {settings['data']}{size}; mean and deviation of {seeds} seeds",
        fontsize=10,
    )
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
