"""Plots of a run: loss, accuracy, learning rate, memory and time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.units import GIB, write_atomically

if TYPE_CHECKING:
    from reports.history import History

MIB = 1 << 20
HISTORY = "extensions/History/"
"""Where the history is in a snapshot."""


def write_plots(
    history: History,
    out: Path,
    limit_bytes: int | None = None,
    in_core_peak_bytes: int | None = None,
) -> list[Path]:
    """Draws what a run's history holds.

    Args:
        history: The history; with no iteration in it nothing is drawn.
        out: Folder of the pictures.
        limit_bytes: Memory limit of a rank, for memory.png.
        in_core_peak_bytes: Peak of an in-core step, for memory.png.

    Returns:
        The files written, of loss.png, accuracy.png, lr.png, memory.png and time.png those for
        which there are figures.
    """
    plots: dict[str, Callable[[Any], None]] = {
        "loss": lambda figure: _course(figure, history, 1, "loss"),
        "accuracy": lambda figure: _course(figure, history, 2, "accuracy"),
        "lr": lambda figure: _learning_rate(figure, history),
        "memory": lambda figure: _memory(figure, history, limit_bytes, in_core_peak_bytes),
        "time": lambda figure: _time(figure, history),
    }
    return [_draw(out / f"{name}.png", plots[name]) for name in plot_names(history)]


def plot_names(history: History) -> list[str]:
    """Returns the names of the plots for which there are figures."""
    if not history.train:
        return []
    costs = ["memory", "time"] if any(history.column("seconds")) else []
    return ["loss", "accuracy", "lr", *costs]


def _draw(path: Path, plot: Callable[[Any], None]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    plot(figure)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.axes[-1].set_xlabel("iteration")
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=120))
    return path


def _course(figure: Any, history: History, column: int, name: str) -> None:
    axes = figure.add_subplot()
    mean = "mean over ranks"
    if history.iterations_per_point > 1:
        mean += f" and {history.iterations_per_point} iterations"
    for rows, label, style in (
        (history.train, f"training ({mean})", "-"),
        (history.validation, "validation", "o-"),
    ):
        if rows:
            # A line through one point is not seen.
            style = "o-" if len(rows) == 1 else style
            axes.plot([r[0] for r in rows], [r[column] for r in rows], style, label=label, ms=4)
    axes.set_ylabel(name)
    if name == "accuracy":
        axes.set_ylim(0, 1)
    else:
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])


def _learning_rate(figure: Any, history: History) -> None:
    axes = figure.add_subplot()
    axes.plot(history.column("iteration"), history.column("lr"), drawstyle="steps-post")
    axes.set_ylabel("learning rate")
    axes.set_ylim(0, 1.05 * max(history.column("lr")) or 1)


def _memory(figure: Any, history: History, limit: int | None, in_core_peak: int | None) -> None:
    iterations = history.column("iteration")
    held, moved = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for name, label in (
        ("peak_bytes", "highest so far"),
        ("resident_bytes", "after the iteration"),
    ):
        held.plot(iterations, [n / MIB for n in history.column(name)], label=label)
    for value, label, style in (
        (limit, "limit", "r--"),
        (in_core_peak, "in core", "k:"),
    ):
        if value is not None:
            x = (iterations[0], iterations[-1])
            held.plot(x, [value / MIB] * 2, style, label=f"{label} ({value / MIB:,.0f} MiB)")
    held.set_ylabel("MiB of a rank")
    held.set_ylim(bottom=0)
    swapped = history.column("swapped_bytes")
    unit, name = (GIB, "GiB") if max(swapped) >= GIB else (MIB, "MiB")
    moved.plot(iterations, [n / unit for n in swapped])
    moved.set_ylabel(f"{name} moved")
    moved.set_ylim(0, 1.1 * max(swapped) / unit or 1)


def _time(figure: Any, history: History) -> None:
    axes = figure.add_subplot()
    iterations, seconds = history.column("iteration"), history.column("seconds")
    data = history.column("data_seconds")
    axes.stackplot(
        iterations,
        data,
        [a - b for a, b in zip(seconds, data, strict=True)],
        labels=("waiting for data", "training"),
        alpha=0.7,
    )
    axes.set_ylabel("seconds per iteration (slowest rank)")
    axes.set_ylim(bottom=0)


def load_history(out: Path) -> History:
    """Returns the history in the latest snapshot of a result.

    Raises:
        InputError: There is no snapshot, or it is damaged.
    """
    from errors import InputError
    from snapshot_files import find_snapshots, load_npz

    from reports.history import History

    snapshots = find_snapshots(out)
    if not snapshots:
        raise InputError(f"{out}: no snapshot_iter_N in this folder; give a result of train.py")
    history = History()
    load_npz(snapshots[0] / "trainer.npz", history, "result", HISTORY)
    return history
