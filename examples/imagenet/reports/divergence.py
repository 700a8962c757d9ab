"""A warning when the training has gone wrong."""

from __future__ import annotations

import math

from chainer import training
from tqdm import tqdm


class WarnOfDivergence(training.Extension):
    """Prints one line when the training loss is no number any more; the training goes on."""

    priority = training.extension.PRIORITY_READER
    name = "WarnOfDivergence"

    def __init__(self) -> None:
        self._warned = False

    def __call__(self, trainer: training.Trainer) -> None:
        """Looks at the loss of this iteration."""
        loss = float(trainer.observation["main/loss"])
        if not self._warned and not math.isfinite(loss):
            self._warned = True
            tqdm.write(
                f"warning: the training loss is {loss} in iteration {trainer.updater.iteration}; "
                f"stop it with Ctrl-C, and begin again with a smaller --lr, a longer --lr-warmup, or --debug, "
                f"which says where it comes from"
            )
