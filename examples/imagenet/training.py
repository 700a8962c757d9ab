"""Updater and triggers of a run whose ranks act as one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import chainer
import numpy
import stop_signals
from chainer import training
from chainer.dataset import concat_examples
from datasets.preprocessed import BadExample
from errors import InputError
from world import World, end_at_once

Save = Callable[[training.Trainer], None]
Control = Callable[[float, float], None]
"""Prepares an update: from the epochs done (with a fraction), and the part of the training done."""

SAME_SIGNAL = 1.0
"""Signals that come this soon after the first (seconds) are the same one: a launcher passes on what a terminal or a
batch system has sent to its ranks, too."""


def first_error(batch: list[Any]) -> str | None:
    """Returns the message of the first example of a batch that could not be made."""
    return next((e.message for e in batch if isinstance(e, BadExample)), None)


def to_arrays(
    batch: list[Any], device: chainer.backend.Device
) -> tuple[chainer.types.NdArray, chainer.types.NdArray]:
    """Returns images (batch, 3, height, width) in the networks' precision, and labels (batch,)."""
    x, t = concat_examples(batch, device)
    return x.astype(chainer.get_dtype(map_mixed16=numpy.float16), copy=False), t


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
        control: Sets the learning rate and the like before each update.

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
        control: Control,
    ) -> None:
        super().__init__(iterator, optimizer, device=device)
        self._world = world
        self._save = save
        self._control = control
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
        epoch, done = iterator.epoch_detail, self._done()
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
        self._control(epoch, done)
        optimizer.update(optimizer.target, *to_arrays(batch, self.device))
        if self.auto_new_epoch and iterator.is_new_epoch:
            optimizer.new_epoch(auto=True)
        self.seconds += time.perf_counter() - start
        self.n_updates += 1

    def _done(self) -> float:
        """Returns the part of the training that is done, 0 to 1."""
        if self._trainer is None:
            return 0.0
        length, unit = self._trainer.stop_trigger.get_training_length()
        return (self.iteration if unit == "iteration" else self.epoch_detail) / length

    def serialize(self, serializer: Any) -> None:
        """Saves or loads the state, with the loss scale, which Chainer leaves out."""
        super().serialize(serializer)
        optimizer = getattr(self.get_optimizer("main"), "actual_optimizer", None)
        optimizer = optimizer or self.get_optimizer("main")
        if optimizer._loss_scaling_is_dynamic:
            for name in ("_loss_scale", "_loss_scaling_isnan_ever"):
                value = serializer(name.strip("_"), getattr(optimizer, name))
                setattr(optimizer, name, type(getattr(optimizer, name))(value))


class Stop:
    """Stop trigger: the last epoch or iteration, or a signal to any rank.

    The first signal does not stop a rank at once: ``Synchronize`` tells all ranks after the
    iteration, so that they save one snapshot together and leave. A second one ends at once.

    Args:
        epoch: Number of epochs.
        iteration: Number of iterations; 0: by epochs.

    Attributes:
        received: The signal that this process got, or 0.
        agreed: The signal that all ranks act on, or 0.
    """

    def __init__(self, epoch: int, iteration: int) -> None:
        self._length = (iteration, "iteration") if iteration else (epoch, "epoch")
        self._since = 0.0
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
        """Takes over the signals that ask a run to end. Only the main thread can."""
        stop_signals.listen(self.receive)

    def receive(self, number: int) -> None:
        """Takes note of a signal; ends all ranks when it is a second one."""
        now = time.monotonic()
        if not self.received:
            self.received, self._since = number, now
        elif now - self._since > SAME_SIGNAL:
            end_at_once(number)


class At:
    """Trigger: every epoch or some iterations, and when the training is done.

    Args:
        period: Such as (1, "epoch"); None: only when the training is done.
        stop: The run's stop trigger.
        on_signal: Whether to fire as well when a signal stops the run.
    """

    def __init__(self, period: tuple[int, str] | None, stop: Stop, on_signal: bool = False) -> None:
        self._interval = training.triggers.IntervalTrigger(*period) if period else None
        self._stop = stop
        self._on_signal = on_signal

    def __call__(self, trainer: training.Trainer) -> bool:
        """Whether to act now."""
        # it keeps count, so it must be asked every time
        now = self._interval is not None and self._interval(trainer)
        return now or self._stop.reached(trainer) or (self._on_signal and self._stop.agreed > 0)

    def serialize(self, serializer: Any) -> None:
        """Saves or loads how far the period has got."""
        if self._interval is not None:
            self._interval.serialize(serializer)
