"""Rectified Adam (Liu, Jiang, He, Chen, Liu, Gao, Han 2019, arXiv:1908.03265).

The variance of Adam's adaptive step is large in the first updates. RAdam multiplies the step by a
factor r_t that makes up for it, and steps like SGD with momentum while the variance has no bound::

    rho_inf = 2 / (1 - beta2) - 1
    rho_t   = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    r_t     = sqrt((rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t))
"""

from __future__ import annotations

import math
from typing import Any

import chainer
import numpy
from chainer.backends import cuda

from optimizers.fp32_master import Fp32MasterRule

THRESHOLD = 5.0
"""Smallest rho_t that is rectified. The paper says more than 4; its programs use 5, as here."""


def rectification(t: int, beta2: float) -> float | None:
    """Returns r_t of update t (counted from 1); None while the variance cannot be rectified."""
    rho_inf = 2 / (1 - beta2) - 1
    decay = beta2**t
    rho = rho_inf - 2 * t * decay / (1 - decay)
    if rho < THRESHOLD:
        return None
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


class RAdamRule(Fp32MasterRule):
    """Update rule of one parameter; see the module for the formula."""

    is_elementwise = True
    _kernel: Any = None

    def init_state(self, param: chainer.Parameter) -> None:
        """Starts with both moments at zero."""
        xp = param.device.xp
        self.state["m"] = xp.zeros_like(param.array)
        self.state["v"] = xp.zeros_like(param.array)

    def _steps(self) -> tuple[float, float]:
        """Returns the steps for m / (sqrt(v) + eps) and for m alone; one of them is 0."""
        hp = self.hyperparam
        first = hp.alpha / (1 - hp.beta1**self.t)
        r = rectification(self.t, hp.beta2)
        if r is None:
            return 0.0, first
        return first * r * math.sqrt(1 - hp.beta2**self.t), 0.0

    def update_core_cpu(self, param: chainer.Parameter) -> None:
        """Updates on NumPy arrays."""
        if param.grad is None:
            return
        hp = self.hyperparam
        m, v = self.state["m"], self.state["v"]
        grad = param.grad
        m += (1 - hp.beta1) * (grad - m)
        v += (1 - hp.beta2) * (grad * grad - v)
        adaptive, plain = self._steps()
        if hp.weight_decay:
            param.array[...] *= 1 - hp.alpha * hp.weight_decay
        if adaptive:
            param.array[...] -= adaptive * m / (numpy.sqrt(v) + hp.eps)
        else:
            param.array[...] -= plain * m

    def update_core_gpu(self, param: chainer.Parameter) -> None:
        """Updates on CuPy arrays with one kernel."""
        if param.grad is None:
            return
        if RAdamRule._kernel is None:
            RAdamRule._kernel = cuda.elementwise(
                "T grad, T one_minus_beta1, T one_minus_beta2, T eps, T keep, T adaptive, T plain",
                "T param, T m, T v",
                """
                m += one_minus_beta1 * (grad - m);
                v += one_minus_beta2 * (grad * grad - v);
                param *= keep;
                param -= plain * m;
                if (adaptive != T(0)) {
                    param -= adaptive * m / (sqrt(v) + eps);
                }
                """,
                "radam",
            )
        hp = self.hyperparam
        RAdamRule._kernel(
            param.grad,
            1 - hp.beta1,
            1 - hp.beta2,
            hp.eps,
            1 - hp.alpha * hp.weight_decay,
            *self._steps(),
            param.array,
            self.state["m"],
            self.state["v"],
        )


class RAdam(chainer.optimizer.GradientMethod):
    """Rectified Adam with decoupled weight decay.

    Float16 parameters need ``use_fp32_update()``: the default ``eps`` is zero in float16.

    Args:
        alpha: Learning rate.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment; its ``rho_inf`` has to reach 5: at least 2/3.
        eps: Added to the root of the second moment.
        weight_decay: Each update first multiplies the parameter by 1 - alpha * weight_decay.

    Raises:
        ValueError: A rate is not in its range.
    """

    def __init__(
        self,
        alpha: float = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= beta1 < 1:
            raise ValueError(f"beta1 {beta1}: choose 0 <= beta1 < 1")
        if not 2 / 3 <= beta2 < 1:
            raise ValueError(f"beta2 {beta2}: choose 2/3 <= beta2 < 1")
        self.hyperparam.alpha = alpha
        self.hyperparam.beta1 = beta1
        self.hyperparam.beta2 = beta2
        self.hyperparam.eps = eps
        self.hyperparam.weight_decay = weight_decay

    alpha = chainer.optimizer.HyperparameterProxy("alpha")
    lr = chainer.optimizer.HyperparameterProxy("alpha")
    beta1 = chainer.optimizer.HyperparameterProxy("beta1")
    beta2 = chainer.optimizer.HyperparameterProxy("beta2")
    eps = chainer.optimizer.HyperparameterProxy("eps")
    weight_decay = chainer.optimizer.HyperparameterProxy("weight_decay")

    def create_update_rule(self) -> RAdamRule:
        """Returns the rule of a parameter."""
        return RAdamRule(self.hyperparam)
