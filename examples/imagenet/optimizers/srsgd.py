"""Scheduled restart SGD (Wang, Nguyen, Sun, Bertozzi, Baraniuk, Osher 2020, arXiv:2002.10583).

Nesterov's growing momentum, set back to zero every F iterations::

    v_{k+1} = w_k - lr * g_k
    w_{k+1} = v_{k+1} + mu_k * (v_{k+1} - v_k)
    mu_k    = (k mod F) / ((k mod F) + 3)

F is the restart period in iterations. It moves to the next of a list whenever the learning rate
drops; in the last stage it may shrink linearly to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import chainer
from chainer.backends import cuda

from optimizers.fp32_master import Fp32MasterRule

PERIODS = ("paper", "authors")


def linear_restarts(first: float, growth: float, stages: int) -> tuple[int, ...]:
    """Returns the periods F_i = F_1 * (1 + (r - 1) * (i - 1)), i = 1..stages, rounded."""
    return tuple(_round(first * (1 + (growth - 1) * i)) for i in range(stages))


def exponential_restarts(first: float, growth: float, stages: int) -> tuple[int, ...]:
    """Returns the periods F_i = F_1 * r**(i - 1), i = 1..stages, rounded."""
    return tuple(_round(first * growth**i) for i in range(stages))


def shrunk_period(last: float, epoch: int, start: int, total: int) -> float:
    """Returns the period of an epoch of the last stage, which falls linearly to 1.

    F(e) = (F_last - 1) * (E - e - 1) / (E - S - 1) + 1

    Args:
        last: F_last in iterations.
        epoch: e, counted from 0.
        start: S, the first epoch of the last stage.
        total: E, the number of epochs.
    """
    if total - start <= 1:
        return 1.0
    rest = min(max(total - epoch - 1, 0), total - start - 1)
    return (last - 1) * rest / (total - start - 1) + 1


def _round(value: float) -> int:
    return max(1, math.floor(value + 0.5))  # halves up: 62.5 is the published 63


class SRSGDRule(Fp32MasterRule):
    """Update rule of one parameter; see the module for the formula.

    Attributes:
        restart_from_here: Whether the next update forgets v, as if it were the first one.
    """

    is_elementwise = True
    _kernel: Any = None

    def __init__(self, parent_hyperparam: chainer.optimizer.Hyperparameter) -> None:
        super().__init__(parent_hyperparam)
        self.restart_from_here = False

    def init_state(self, param: chainer.Parameter) -> None:
        """Starts with v_0 = w_0."""
        self.state["v"] = param.array.copy()

    def update_core(self, param: chainer.Parameter) -> None:
        """Updates the parameter and v in place."""
        if param.grad is None:
            return
        if self.restart_from_here:
            self.state["v"][...] = param.array
            self.restart_from_here = False
        super().update_core(param)

    def update_core_cpu(self, param: chainer.Parameter) -> None:
        """Updates on NumPy arrays."""
        lr, momentum = self.hyperparam.lr, self.hyperparam.momentum
        v = self.state["v"]
        following = param.array - lr * param.grad
        step = following - v
        step *= momentum
        v[...] = following
        following += step
        param.array[...] = following

    def update_core_gpu(self, param: chainer.Parameter) -> None:
        """Updates on CuPy arrays with one kernel."""
        if SRSGDRule._kernel is None:
            SRSGDRule._kernel = cuda.elementwise(
                "T grad, T lr, T momentum",
                "T param, T v",
                """
                const T following = param - lr * grad;
                param = following + momentum * (following - v);
                v = following;
                """,
                "srsgd",
            )
        hp = self.hyperparam
        SRSGDRule._kernel(param.grad, hp.lr, hp.momentum, param.array, self.state["v"])

    def serialize(self, serializer: Any) -> None:
        """Saves or loads the state."""
        super().serialize(serializer)
        self.restart_from_here = bool(
            _entry(serializer, "restart_from_here", self.restart_from_here)
        )


class SRSGD(chainer.optimizer.GradientMethod):
    """Scheduled restart SGD.

    Weight decay is Chainer's ``WeightDecay`` hook: L2, added to the gradient before the step.
    It works with ``chainermn.create_multi_node_optimizer``, loss scaling and ``use_fp32_update``.

    Args:
        lr: Learning rate.
        restarts: Restart period F in iterations of each stage of the learning rate; the last one
            stays for all further stages. See ``linear_restarts`` and ``exponential_restarts``.
        period: ``"paper"``: mu = c / (c + 3) with c = k mod F, k the number of updates so far.
            ``"authors"``: what the authors' programs do, which restart after F - 1 iterations:
            mu = (c - 1) / (c + 2) with c = 1, 2, ..., F - 1, and v starts again from w at a
            learning-rate drop and at each epoch of a shrinking stage.
        shrink_until: Total number of epochs E when the last stage's period shrinks to 1 at the
            end (``shrunk_period``); ``None``: it stays. Epochs are those of ``new_epoch``.

    Attributes:
        stage: Index of the stage of the learning rate, counted from 0.
        last_momentum: mu of the last update.

    Raises:
        ValueError: A period below 1, no period, or an unknown ``period``.
    """

    def __init__(
        self,
        lr: float = 0.1,
        restarts: Sequence[int] = (40,),
        period: str = "paper",
        shrink_until: int | None = None,
    ) -> None:
        super().__init__()
        if not restarts or any(f < 1 for f in restarts):
            raise ValueError(
                f"restarts {tuple(restarts)}: give one or more periods of at least 1 iteration"
            )
        if period not in PERIODS:
            raise ValueError(f"period {period!r}: choose one of {', '.join(PERIODS)}")
        self.restarts = tuple(restarts)
        self.period = period
        self.shrink_until = shrink_until
        self.hyperparam.lr = lr
        self.hyperparam.momentum = 0.0
        self.stage = 0
        self._stage_epoch = 0
        self._count = 1  # the authors' c
        self._seen_lr = lr
        self._seen_epoch = 0

    lr = chainer.optimizer.HyperparameterProxy("lr")
    last_momentum = chainer.optimizer.HyperparameterProxy("momentum")

    def create_update_rule(self) -> SRSGDRule:
        """Returns the rule of a parameter."""
        return SRSGDRule(self.hyperparam)

    @property
    def _shrinking(self) -> bool:
        return self.shrink_until is not None and self.stage >= len(self.restarts) - 1

    def restart_period(self) -> int:
        """Returns the period F in iterations of the current stage and epoch."""
        last = self.restarts[min(self.stage, len(self.restarts) - 1)]
        if not self._shrinking:
            return last
        # A counter of whole iterations reaches F when it reaches the next whole number.
        return math.ceil(shrunk_period(last, self.epoch, self._stage_epoch, self.shrink_until))

    def update(self, lossfun: Any = None, *args: Any, **kwds: Any) -> None:
        """Computes the gradients (unless ``lossfun`` is None) and updates the parameters."""
        self._follow_learning_rate()
        f = self.restart_period()
        c = self.t % f if self.period == "paper" else self._count - 1
        self.hyperparam.momentum = c / (c + 3)
        super().update(lossfun, *args, **kwds)
        self._count = self._count + 1 if self._count + 1 < f else 1

    def _follow_learning_rate(self) -> None:
        dropped = self.lr < self._seen_lr * (1 - 1e-6)
        if dropped:
            self.stage += 1
            self._stage_epoch = self.epoch
        new_epoch = self._shrinking and self.epoch != self._seen_epoch
        if self.period == "authors" and (dropped or new_epoch):
            for param in self.target.params():
                if param.update_rule is not None:
                    param.update_rule.restart_from_here = True
        self._seen_lr = self.lr
        self._seen_epoch = self.epoch

    def serialize(self, serializer: Any) -> None:
        """Saves or loads the state: that of the rules, the stage and the count."""
        super().serialize(serializer)
        for name in ("stage", "_stage_epoch", "_count", "_seen_epoch"):
            setattr(self, name, int(_entry(serializer, name.lstrip("_"), getattr(self, name))))
        self._seen_lr = float(_entry(serializer, "seen_lr", self._seen_lr))


def _entry(serializer: Any, key: str, value: Any) -> Any:
    """Returns what the serializer has for ``key``; ``value`` when an older file lacks it."""
    try:
        found = serializer(key, value)
    except KeyError:
        return value
    return value if found is None else found
