"""What a run shows and leaves behind: progress, table, history, plots and summary."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chainer
import devices
import out_of_core
from chainer import training
from chainer.training import extensions
from tqdm import tqdm
from training import Stop
from world import World

GIB = 1 << 30
COLUMNS = [
    "epoch",
    "iteration",
    "main/loss",
    "validation/main/loss",
    "main/accuracy",
    "validation/main/accuracy",
    "lr",
    "swapped GiB",
    "peak GiB",
]


def megabytes(n: float) -> str:
    """Formats a number of bytes in MiB."""
    return f"{n / (1 << 20):,.0f} MiB"


class Synchronize(training.Extension):
    """After each iteration, makes of every rank's figures those of the run.

    ``main/loss`` and ``main/accuracy`` become means over the ranks, and a signal that one rank has
    received becomes known to all.

    Attributes:
        bytes_out, bytes_in: Bytes moved by all ranks together.
        peak_bytes: The most memory that any rank has held.
    """

    priority = training.extension.PRIORITY_EDITOR
    name = "Synchronize"

    def __init__(self, world: World, stop: Stop, gpu: bool) -> None:
        self._world = world
        self._stop = stop
        self._gpu = gpu
        self.bytes_out = self.bytes_in = self.peak_bytes = 0

    def __call__(self, trainer: training.Trainer) -> None:
        """Exchanges the figures. Collective."""
        observation = trainer.observation
        keys = ("main/loss", "main/accuracy")
        values = [float(chainer.backend.CpuDevice().send(_array(observation[k]))) for k in keys]
        moved = out_of_core.figures()
        total = self._world.sum([*values, moved.bytes_out, moved.bytes_in])
        for key, value in zip(keys, total / self._world.size, strict=False):
            observation[key] = float(value)
        self.bytes_out, self.bytes_in = int(total[2]), int(total[3])
        received, peak = self._world.max([self._stop.received, devices.peak_bytes(self._gpu)])
        self._stop.agreed, self.peak_bytes = int(received), int(peak)

    def add_to_log(self, entry: dict[str, Any]) -> None:
        """Adds the figures to an entry of LogReport (its ``postprocess``)."""
        entry["swapped GiB"] = (self.bytes_out + self.bytes_in) / GIB
        entry["peak GiB"] = self.peak_bytes / GIB


def _array(value: Any) -> Any:
    return chainer.as_array(value) if isinstance(value, chainer.Variable) else value


class History(training.Extension):
    """Losses and accuracies of every iteration and validation; a snapshot keeps them.

    Attributes:
        train: (iteration, loss, accuracy) of each iteration.
        validation: The same of each validation.
    """

    name = "History"

    def __init__(self) -> None:
        self.train: list[list[float]] = []
        self.validation: list[list[float]] = []

    def __call__(self, trainer: training.Trainer) -> None:
        """Appends what was observed in this iteration."""
        for rows, prefix in ((self.train, ""), (self.validation, "validation/")):
            if f"{prefix}main/loss" in trainer.observation:
                values = (trainer.observation[f"{prefix}main/{k}"] for k in ("loss", "accuracy"))
                rows.append([trainer.updater.iteration, *map(float, values)])

    def serialize(self, serializer: Any) -> None:
        """Saves or loads the history."""
        text = serializer("history", json.dumps([self.train, self.validation]))
        self.train, self.validation = json.loads(text)


class _Lines:
    """A stream for PrintReport that writes whole lines above the progress bar."""

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> None:
        # PrintReport clears the screen below the cursor, for Chainer's own progress bar.
        *lines, self._rest = (self._rest + text.replace("\033[J", "")).split("\n")
        for line in lines:
            tqdm.write(line.rstrip(), file=sys.stdout)
        sys.stdout.flush()

    def flush(self) -> None:
        sys.stdout.flush()


def print_report() -> extensions.PrintReport:
    """Returns the extension that prints the table of the log."""
    return extensions.PrintReport(COLUMNS, out=_Lines())


class Progress(training.Extension):
    """A progress bar of iterations, with the loss.

    It is on standard output like the table: mpiexec does not keep the order of two streams.

    Args:
        stop: The run's stop trigger.
        iterations_per_epoch: Number of iterations of an epoch.
    """

    name = "Progress"

    def __init__(self, stop: Stop, iterations_per_epoch: float) -> None:
        length, unit = stop.get_training_length()
        self._total = length if unit == "iteration" else math.ceil(length * iterations_per_epoch)
        self._bar: Any = None

    def initialize(self, trainer: training.Trainer) -> None:
        """Starts the bar where the training is."""
        # Under mpiexec the output is a pipe that ends in a terminal, so no terminal is not a
        # reason to show nothing; only the width is unknown then (a terminal may say 0, too).
        try:
            known = os.get_terminal_size(sys.stdout.fileno()).columns > 0
        except (OSError, ValueError):
            known = False
        width: dict[str, Any] = {"dynamic_ncols": True} if known else {"ncols": 79, "nrows": 24}
        self._bar = tqdm(
            file=sys.stdout,
            total=self._total,
            initial=trainer.updater.iteration,
            unit="it",
            mininterval=0.5,
            **width,
        )

    def __call__(self, trainer: training.Trainer) -> None:
        """Advances the bar."""
        self._bar.set_postfix_str(f"loss {trainer.observation['main/loss']:.3f}", refresh=False)
        self._bar.update(trainer.updater.iteration - self._bar.n)

    def finalize(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def write_plots(history: History, out: Path) -> list[Path]:
    """Draws loss and accuracy over iterations.

    Returns:
        The files written: loss.png and accuracy.png in ``out``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    for column, name in ((1, "loss"), (2, "accuracy")):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for rows, label, style in (
            (history.train, "training (mean over ranks)", "-"),
            (history.validation, "validation", "o-"),
        ):
            if rows:
                axes.plot([r[0] for r in rows], [r[column] for r in rows], style, label=label)
        axes.set_xlabel("iteration")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(name)
        if name == "accuracy":
            axes.set_ylim(0, 1)
        else:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
        axes.legend()
        path = out / f"{name}.png"
        _atomically(path, lambda f, fig=figure: fig.savefig(f, format="png", dpi=120))
        paths.append(path)
    return paths


def summarize(
    history: History,
    synchronize: Synchronize,
    world: World,
    iterations_per_second: float | None,
    in_core_peak_bytes: int | None,
) -> dict[str, Any]:
    """Returns the summary of a run: what ``summary.json`` holds.

    ``bytes_out`` and ``bytes_in`` are of all ranks together; ``peak_bytes``,
    ``in_core_peak_bytes`` and ``limit_bytes`` are of one rank (the largest). Losses are means over
    the ranks of the first and last iteration. What was not measured is None.
    """
    return {
        "ranks": world.size,
        "iterations_per_second": iterations_per_second,
        "loss_first": history.train[0][1] if history.train else None,
        "loss_last": history.train[-1][1] if history.train else None,
        "val_accuracy": history.validation[-1][2] if history.validation else None,
        "bytes_out": synchronize.bytes_out,
        "bytes_in": synchronize.bytes_in,
        "peak_bytes": synchronize.peak_bytes,
        "in_core_peak_bytes": in_core_peak_bytes,
        "limit_bytes": out_of_core.limit_bytes(),
    }


def print_summary(summary: dict[str, Any], out: Path) -> None:
    """Prints the summary and where the results are."""

    def number(key: str, form: str) -> str:
        return "-" if summary[key] is None else format(summary[key], form)

    def memory(key: str) -> str:
        return "-" if summary[key] is None else megabytes(summary[key])

    ranks = summary["ranks"]
    print(f"summary: {ranks} rank{'s' if ranks > 1 else ''}, "
          f"{number('iterations_per_second', '.2f')} iterations/s")  # fmt: skip
    print(f"  loss          {number('loss_first', '.3f')} -> {number('loss_last', '.3f')}")
    print(f"  val accuracy  {number('val_accuracy', '.3f')}")
    print(f"  swapped       {summary['bytes_out'] / GIB:.2f} GiB out, "
          f"{summary['bytes_in'] / GIB:.2f} GiB in (all ranks)")  # fmt: skip
    print(f"  peak memory   {memory('peak_bytes')} per rank; limit {memory('limit_bytes')}; "
          f"in core {memory('in_core_peak_bytes')}")  # fmt: skip
    print(f"  results in    {out}", flush=True)


def write_summary(summary: dict[str, Any], out: Path) -> None:
    """Writes summary.json to ``out``."""
    text = json.dumps(summary, indent=1) + "\n"
    _atomically(out / "summary.json", lambda f: f.write(text.encode()))


def _atomically(path: Path, write: Callable[[Any], Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as f:
            write(f)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
