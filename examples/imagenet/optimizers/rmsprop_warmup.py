"""From RMSprop to SGD with momentum (Akiba, Suzuki, Fukuda 2017, arXiv:1711.04325)."""

from __future__ import annotations

import math
from typing import Any, Literal

import chainer
from chainer.backends import cuda

from optimizers.fp32_master import Fp32MasterRule

Slope = Literal["continuous", "printed"]


def sgd_weight(
    epoch: float, center: float = 10.0, period: float = 5.0, slope: Slope = "continuous"
) -> float:
    """Returns a_SGD, the weight of SGD in the update, at an epoch (counted from 0, fractional).

    It grows as ``exp(2 (epoch - center) / period) / 2`` up to the center, where it is 1/2, then
    linearly for half a period, and is 1 after it.

    Args:
        epoch: The epoch.
        center: Where both weigh the same, in epochs.
        period: Length of the change, in epochs.
        slope: Slope of the line. ``continuous``: 1 / period, which continues the exponential and
            ends at 1. ``printed``: 2 / period, as in the paper's formula, which reaches 1.5 and
            then drops to 1.
    """
    distance = epoch - center
    if distance < 0:
        return 0.5 * math.exp(2 * distance / period)
    if distance < period / 2:
        return 0.5 + (1 if slope == "continuous" else 2) * distance / period
    return 1.0


class RMSpropWarmupRule(Fp32MasterRule):
    """Update rule of one parameter; see ``RMSpropWarmup`` for the formula."""

    is_elementwise = True
    _kernel: Any = None

    def init_state(self, param: chainer.Parameter) -> None:
        """Starts with the mean square and the step at zero."""
        xp = param.device.xp
        self.state["m"] = xp.zeros_like(param.array)
        self.state["delta"] = xp.zeros_like(param.array)

    def _weights(self) -> tuple[float, float]:
        """Returns a_SGD and a_RMS."""
        hp = self.hyperparam
        return hp.sgd_weight, (1 - hp.sgd_weight) * hp.rms_lr / hp.lr

    def update_core_cpu(self, param: chainer.Parameter) -> None:
        """Updates on NumPy arrays."""
        grad = param.grad
        if grad is None:
            return
        hp = self.hyperparam
        m, delta = self.state["m"], self.state["delta"]
        sgd, rms = self._weights()
        m *= hp.mu2
        m += (1 - hp.mu2) * grad * grad
        delta *= hp.mu1
        delta -= (sgd + rms / (m**0.5 + hp.eps)) * grad
        param.array += hp.lr * delta

    def update_core_gpu(self, param: chainer.Parameter) -> None:
        """Updates on CuPy arrays with one kernel."""
        grad = param.grad
        if grad is None:
            return
        if RMSpropWarmupRule._kernel is None:
            RMSpropWarmupRule._kernel = cuda.elementwise(
                "T grad, T lr, T mu1, T mu2, T one_minus_mu2, T eps, T sgd, T rms",
                "T param, T m, T delta",
                """
                m = mu2 * m + one_minus_mu2 * grad * grad;
                delta = mu1 * delta - (sgd + rms / (sqrt(m) + eps)) * grad;
                param += lr * delta;
                """,
                "rmsprop_warmup",
            )
        hp = self.hyperparam
        sgd, rms = self._weights()
        RMSpropWarmupRule._kernel(
            grad, hp.lr, hp.mu1, hp.mu2, 1 - hp.mu2, hp.eps, sgd, rms,
            param.array, self.state["m"], self.state["delta"],
        )  # fmt: skip


class RMSpropWarmup(chainer.optimizer.GradientMethod):
    """RMSprop at first, SGD with momentum in the end.

    ::

        m     <- mu2 * m + (1 - mu2) * g**2
        delta <- mu1 * delta - (a_SGD + a_RMS / (sqrt(m) + eps)) * g
        w     <- w + lr * delta
        a_RMS  = (1 - a_SGD) * rms_lr / lr

    Args:
        lr: Learning rate.
        mu1: Momentum.
        mu2: Decay rate of the mean square of the gradient.
        eps: Added to the root of the mean square.
        rms_lr: Learning rate of the RMSprop part.
        center: See ``sgd_weight``.
        period: See ``sgd_weight``.
        slope: See ``sgd_weight``.
    """

    def __init__(
        self,
        lr: float = 0.1,
        mu1: float = 0.9,
        mu2: float = 0.99,
        eps: float = 1e-8,
        rms_lr: float = 3e-4,
        center: float = 10.0,
        period: float = 5.0,
        slope: Slope = "continuous",
    ) -> None:
        super().__init__()
        self.hyperparam.lr = lr
        self.hyperparam.mu1 = mu1
        self.hyperparam.mu2 = mu2
        self.hyperparam.eps = eps
        self.hyperparam.rms_lr = rms_lr
        self._change = (center, period, slope)
        self.set_epoch(0.0)

    lr = chainer.optimizer.HyperparameterProxy("lr")
    sgd_weight = chainer.optimizer.HyperparameterProxy("sgd_weight")

    def set_epoch(self, epoch: float) -> None:
        """Sets a_SGD for the updates of this epoch (counted from 0, fractional)."""
        self.hyperparam.sgd_weight = sgd_weight(epoch, *self._change)

    def create_update_rule(self) -> RMSpropWarmupRule:
        """Returns the rule of a parameter."""
        return RMSpropWarmupRule(self.hyperparam)
