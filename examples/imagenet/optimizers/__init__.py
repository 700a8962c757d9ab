"""The optimizer of a run: its rule, learning rate, weight decay and precision.

``create`` returns it with a ``Control``, which sets before each update what changes with the epoch.
"""

from __future__ import annotations

from typing import Any

import chainer
from config import Config

from optimizers import schedules
from optimizers.adamw import AdamW
from optimizers.hooks import LARS, WeightDecay
from optimizers.radam import RAdam
from optimizers.rmsprop_warmup import RMSpropWarmup
from optimizers.schedules import Regime, Schedule
from optimizers.srsgd import SRSGD
from optimizers.stock import Adam, MomentumSGD, RMSprop

DEFAULT_LR = {
    "momentum_sgd": 0.01,
    "adam": 0.001,
    "rmsprop": 0.01,
    "rmsprop_warmup": 0.1,
    "srsgd": 0.1,
    "radam": 0.001,
    "adamw": 0.001,
}
DECOUPLED = ("adamw", "radam")
"""Rules with a weight decay of their own, instead of one that is added to the gradient."""

DEFAULT_RESTARTS = (40,)


class Control:
    """Sets what changes with the epoch: learning rate, weight decay and the like.

    Args:
        optimizer: The optimizer itself, not its multi-node form.
        lr: The learning rate that the schedule's factors multiply.
        schedule: The schedule.
        decay: The weight decay that a regime changes.
        regime: Says learning rate and weight decay in place of ``lr`` and ``schedule``.
    """

    def __init__(
        self,
        optimizer: Any,
        lr: float,
        schedule: Schedule,
        decay: WeightDecay,
        regime: Regime | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._lr = lr
        self._schedule = schedule
        self._decay = decay
        self._regime = regime

    def __call__(self, epoch: float, done: float) -> None:
        """Prepares the next update.

        Args:
            epoch: How many epochs are done, with the fraction of the one that is going on.
            done: Which part of the whole training is done, 0 to 1.
        """
        if self._regime is not None:
            lr, self._decay.rate = self._regime(epoch)
        else:
            lr = self._lr * self._schedule(epoch, done)
        # Adam and its kin call it alpha; RMSprop's alpha is something else.
        hyperparam = self._optimizer.hyperparam
        setattr(hyperparam, "lr" if "lr" in hyperparam.get_dict() else "alpha", lr)
        if hasattr(self._optimizer, "set_epoch"):
            self._optimizer.set_epoch(epoch)


def _rule(config: Config, lr: float) -> Any:
    betas = config.beta1, config.beta2
    if config.optimizer == "momentum_sgd":
        return MomentumSGD(lr, config.momentum)
    if config.optimizer == "adam":
        return Adam(lr, *betas)
    if config.optimizer == "rmsprop":
        return RMSprop(lr)
    if config.optimizer == "radam":
        return RAdam(lr, *betas, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return AdamW(lr, *betas, weight_decay=config.weight_decay)
    if config.optimizer == "srsgd":
        return SRSGD(
            lr,
            config.restarts or DEFAULT_RESTARTS,
            config.restart_period,
            config.epoch if config.restart_shrink else None,
        )
    return RMSpropWarmup(
        lr,
        config.momentum,
        center=config.warmup_center,
        period=config.warmup_period,
        slope=config.rmsprop_slope,
    )


def _schedule(config: Config, start: float) -> Schedule:
    name = config.lr_schedule or (
        "step"
        if config.lr_drops
        else "slow_start"
        if config.optimizer == "rmsprop_warmup"
        else "constant"
    )
    schedule: Schedule = {
        "constant": schedules.constant,
        "regime": schedules.constant,
        "step": schedules.step(config.lr_drops, config.lr_gamma),
        "slow_start": schedules.slow_start,
        "polynomial": schedules.polynomial(config.lr_power),
        "cosine": schedules.cosine,
    }[name]
    return (
        schedules.with_warmup(schedule, config.lr_warmup, start) if config.lr_warmup else schedule
    )


def base_lr(config: Config, ranks: int) -> float:
    """Returns the learning rate before any schedule, for this many ranks."""
    lr = config.lr or DEFAULT_LR[config.optimizer]
    scaling = config.lr_scaling or ("linear" if config.optimizer == "rmsprop_warmup" else "none")
    return schedules.scaled(lr, ranks * config.batchsize) if scaling == "linear" else lr


def create(config: Config, ranks: int, model: chainer.Chain) -> tuple[Any, Control]:
    """Returns the optimizer of ``model``, set up, and its control.

    Args:
        config: The run's settings.
        ranks: Number of ranks, for the linear scaling rule.
        model: The network, with all its parameters.
    """
    lr = base_lr(config, ranks)
    optimizer = _rule(config, lr)
    if config.dtype == "mixed16":
        optimizer.use_fp32_update()
        optimizer.loss_scaling()
    optimizer.setup(model)
    l2 = 0.0 if config.optimizer in DECOUPLED else config.weight_decay
    decay = WeightDecay(l2, config.weight_decay_on == "weights")
    hook = LARS(decay, config.lars_coefficient) if config.lars else decay
    if config.lars or l2 or config.regime:
        for param in model.params():
            param.update_rule.add_hook(hook)
    unscaled = config.lr or DEFAULT_LR[config.optimizer]
    start = min(1.0, unscaled / lr) if lr != unscaled else 0.1
    control = Control(
        optimizer,
        lr,
        _schedule(config, start),
        decay,
        Regime(config.regime) if config.regime else None,
    )
    return optimizer, control
