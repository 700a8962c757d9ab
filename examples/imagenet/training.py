"""Updater, evaluator and stop trigger of a run whose ranks act as one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import chainer
from chainer import training
from chainer.dataset import concat_examples
from chainer.training import extensions
from datasets.preprocessed import BadExample
from errors import InputError
from world import World

Save = Callable[[training.Trainer], None]


def first_error(batch: list[Any]) -> str | None:
    """Returns the message of the first example of a batch that could not be made."""
    return next((e.message for e in batch if isinstance(e, BadExample)), None)


class Updater(training.updaters.StandardUpdater):
    """An updater whose ranks all have their batch before any of them trains on it.

    When an example cannot be made on any rank, the batch is given back, a snapshot is saved, and
    every rank raises the same InputError.

    Args:
        iterator: Iterator of the training examples.
        optimizer: The optimizer.
        device: This rank's device.
        world: The ranks.
        save: Saves a snapshot.

    Attributes:
        seconds: Time spent in updates by this process, in seconds.
        data_seconds: The part of it spent waiting for batches, in seconds.
        n_updates: Number of updates by this process.
    """

    def __init__(
        self,
        iterator: chainer.dataset.Iterator,
        optimizer: Any,
        device: chainer.backend.Device,
        world: World,
        save: Save,
    ) -> None:
        super().__init__(iterator, optimizer, device=device)
        self._world = world
        self._save = save
        self._trainer: training.Trainer | None = None
        self.seconds = 0.0
        self.data_seconds = 0.0
        self.n_updates = 0

    def connect_trainer(self, trainer: training.Trainer) -> None:
        """Remembers the trainer, which a snapshot is made of."""
        self._trainer = trainer

    def update_core(self) -> None:
        """Trains on one batch."""
        start = time.perf_counter()
        iterator = self.get_iterator("main")
        optimizer = self.get_optimizer("main")
        before = iterator._state, iterator._previous_epoch_detail
        batch = iterator.next()
        self.data_seconds += time.perf_counter() - start
        try:
            self._world.agree(first_error(batch))
        except InputError:
            iterator._state, iterator._previous_epoch_detail = before
            if self._trainer is not None and self.iteration:
                self._save(self._trainer)
            raise
        optimizer.update(optimizer.target, *concat_examples(batch, self.device))
        if self.auto_new_epoch and iterator.is_new_epoch:
            optimizer.new_epoch(auto=True)
        self.seconds += time.perf_counter() - start
        self.n_updates += 1


class Evaluator(extensions.Evaluator):
    """Validation whose result is the mean over all images, however they are divided.

    Chainer's evaluator averages batches, and its multi-node form averages ranks; both give
    an image of a smaller batch or shard more weight.
    """

    def __init__(
        self,
        iterator: chainer.dataset.Iterator,
        model: chainer.Chain,
        device: chainer.backend.Device,
        world: World,
        save: Save,
    ) -> None:
        super().__init__(iterator, model, device=device)
        self._world = world
        self._save = save

    def __call__(self, trainer: training.Trainer | None = None) -> dict[str, float]:
        """Validates; saves a snapshot first when an image cannot be used."""
        try:
            return super().__call__(trainer)
        except InputError:
            if trainer is not None:
                self._save(trainer)
            raise

    def evaluate(self) -> dict[str, float]:
        """Returns loss and accuracy on the validation images of all ranks. Collective."""
        iterator = self.get_iterator("main")
        model = self.get_target("main")
        keys = [f"{self.name}/main/{key}" for key in ("loss", "accuracy")]
        totals = [0.0, 0.0, 0.0]
        error = None
        iterator.reset()
        for batch in iterator if len(iterator.dataset) else ():
            error = first_error(batch)
            if error is not None:
                break
            observation: dict[str, Any] = {}
            with chainer.reporter.report_scope(observation), chainer.no_backprop_mode():
                model(*concat_examples(batch, self.device))
            for i, key in enumerate(keys):
                totals[i] += float(chainer.as_array(observation[key])) * len(batch)
            totals[2] += len(batch)
        self._world.agree(error)
        loss, accuracy, count = self._world.sum(totals)
        return {keys[0]: loss / count, keys[1]: accuracy / count}


class Stop:
    """Stop trigger: the last epoch or iteration, or a signal to any rank.

    SIGTERM and Ctrl-C do not stop a rank at once: ``Synchronize`` tells all ranks after the
    iteration, so that they save one snapshot together and leave. A second Ctrl-C ends at once.

    Args:
        epoch: Number of epochs.
        iteration: Number of iterations; 0: by epochs.

    Attributes:
        received: The signal that this process got, or 0.
        agreed: The signal that all ranks act on, or 0.
    """

    def __init__(self, epoch: int, iteration: int) -> None:
        self._length = (iteration, "iteration") if iteration else (epoch, "epoch")
        self.received = 0
        self.agreed = 0

    def get_training_length(self) -> tuple[int, str]:
        """Returns the length of the training and its unit."""
        return self._length

    def reached(self, trainer: training.Trainer) -> bool:
        """Whether the last epoch or iteration is done."""
        length, unit = self._length
        return bool(getattr(trainer.updater, unit) >= length)

    def __call__(self, trainer: training.Trainer) -> bool:
        """Whether to stop."""
        return bool(self.agreed) or self.reached(trainer)

    def listen(self) -> None:
        """Takes over SIGTERM and SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number


class At:
    """Trigger: every epoch or some iterations, and when the training is done.

    Args:
        period: Such as (1, "epoch").
        stop: The run's stop trigger.
        on_signal: Whether to fire as well when a signal stops the run.
    """

    def __init__(self, period: tuple[int, str], stop: Stop, on_signal: bool = False) -> None:
        self._interval = training.triggers.IntervalTrigger(*period)
        self._stop = stop
        self._on_signal = on_signal

    def __call__(self, trainer: training.Trainer) -> bool:
        """Whether to act now."""
        now = self._interval(trainer)  # it keeps count, so it must be asked every time
        return now or self._stop.reached(trainer) or (self._on_signal and self._stop.agreed > 0)

    def serialize(self, serializer: Any) -> None:
        """Saves or loads how far the period has got."""
        self._interval.serialize(serializer)
