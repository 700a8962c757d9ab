"""All that a trainer needs to report, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import chainer
import out_of_core
from chainer import training
from chainer.training import extensions as chainer_extensions
from training import Stop
from world import World

from reports.confusion import confusion_pictures
from reports.divergence import WarnOfDivergence
from reports.drawing import draw
from reports.figures import Synchronize
from reports.final import write_report
from reports.history import History
from reports.plots import plot_names
from reports.progress import Progress
from reports.summary import print_summary, summarize, write_summary
from reports.table import Table
from reports.tensorboard import TensorBoard

GRAPH_FILE = "cg.dot"


class DumpGraph(chainer_extensions.DumpGraph):
    """Draws the graph of the first iteration, and lets go of it before anything else needs memory."""

    priority = training.extension.PRIORITY_WRITER + 3  # before the statistics and the validation

    def __call__(self, trainer: training.Trainer) -> None:
        """Draws it; what was reported has no graph any more."""
        super().__call__(trainer)
        for key, value in trainer.observation.items():
            if isinstance(value, chainer.Variable):
                trainer.observation[key] = value.array


def extensions(
    *,
    out: Path,
    world: World,
    stop: Stop,
    gpu: bool,
    batchsize: int,
    iterations_per_epoch: float,
    every: Callable[[], Any],
) -> Reports:
    """Makes the reports of a run; ``attach`` them to its trainer.

    Args:
        out: Folder of the results.
        world: The ranks.
        stop: The run's stop trigger.
        gpu: Whether the ranks train on GPUs.
        batchsize: Images per rank and iteration.
        iterations_per_epoch: Number of iterations of an epoch, on each rank.
        every: Makes a trigger of the log and its table. Each gets its own: triggers keep count.
    """
    return Reports(out, world, stop, gpu, batchsize, iterations_per_epoch, every)


class Reports:
    """What a run reports: see ``extensions`` for the arguments.

    Attributes:
        synchronize: Collects every iteration's figures on all ranks.
        history: The course of the run; empty except on rank 0.
    """

    def __init__(
        self,
        out: Path,
        world: World,
        stop: Stop,
        gpu: bool,
        batchsize: int,
        iterations_per_epoch: float,
        every: Callable[[], Any],
    ) -> None:
        self._out = out
        self._world = world
        self._stop = stop
        self._iterations_per_epoch = iterations_per_epoch
        self._every = every
        self.synchronize = Synchronize(world, stop, gpu, batchsize)
        self.history = History(self.synchronize)

    def attach(self, trainer: training.Trainer) -> None:
        """Extends the trainer, on every rank. Only rank 0 prints and writes.

        Out-of-core mode, if it is wanted, must be on already.
        """
        trainer.extend(self.synchronize, trigger=(1, "iteration"))
        if self._world.rank != 0:
            return
        trainer.extend(DumpGraph("main/loss", filename=GRAPH_FILE))
        # Of equal priority, what was added first acts first: lr and history before their readers.
        trainer.extend(chainer_extensions.observe_lr(), trigger=(1, "iteration"))
        trainer.extend(self.history, trigger=(1, "iteration"))
        trainer.extend(WarnOfDivergence(), trigger=(1, "iteration"))
        trainer.extend(
            chainer_extensions.LogReport(
                trigger=self._every(), postprocess=self.synchronize.add_to_log
            )
        )
        trainer.extend(Table(), trigger=self._every(), priority=Table.priority - 1)
        limit = out_of_core.limit_bytes()
        trainer.extend(
            Progress(self._stop, self._iterations_per_epoch, self.synchronize, limit),
            trigger=(1, "iteration"),
            priority=Table.priority - 2,
        )
        length, unit = self._stop.get_training_length()
        iterations = length if unit == "iteration" else length * self._iterations_per_epoch
        try:
            board = TensorBoard(self._out, math.ceil(iterations), self.synchronize)
        except ImportError:
            print("no TensorBoard files: run `pip install tensorboardX` to get them", flush=True)
        else:
            trainer.extend(board, trigger=(1, "iteration"))

    def files(self) -> list[Path]:
        """Returns the files that ``finish`` writes when the training is done."""
        names = [f"{name}.png" for name in plot_names(self.history)]
        files = [self._out / name for name in ("summary.json", "report.md", *names)]
        return [*files, *confusion_pictures(self._out)]

    def finish(
        self,
        updater: Any,
        in_core_peak_bytes: int | None = None,
        configuration: Mapping[str, Any] | None = None,
        versions: Mapping[str, Any] | None = None,
        draws_all: bool = True,
    ) -> None:
        """Writes summary, plots and report and prints the summary; on rank 0 only.

        Args:
            updater: The run's updater, with its ``seconds`` and ``n_updates``.
            in_core_peak_bytes: Measured peak of an in-core step, None if it was not measured.
            configuration: The resolved configuration, for the report.
            versions: Versions of what the run used, for the report.
            draws_all: Whether to draw the confusion matrices; who has sent a signal does not wait for long.
        """
        if self._world.rank != 0:
            return
        rate = updater.n_updates / updater.seconds if updater.seconds else None
        limit = out_of_core.limit_bytes()
        pictures = draw(self.history, self._out, limit, in_core_peak_bytes, draws_all)
        self.synchronize.note_peak()  # of the last snapshot, too
        summary = summarize(self.history, self.synchronize, self._world, rate, in_core_peak_bytes)
        write_summary(summary, self._out)
        write_report(
            self._out,
            summary,
            self.history,
            self.synchronize,
            updater,
            pictures,
            configuration or {},
            versions or {},
        )
        print_summary(summary, self._out)
