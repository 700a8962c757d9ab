"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with its decay scaled by the learning rate.

Chainer's own ``AdamW`` takes the product of both (``weight_decay_rate``), which stays the same when
the learning rate drops. Here the decay follows it, as in the paper and in other frameworks.
"""

from __future__ import annotations

from typing import Any

from optimizers.stock import Adam


class AdamW(Adam):
    """Adam with decoupled weight decay and, if wanted, a linear warm-up.

    Args:
        alpha: Learning rate.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Each update subtracts alpha * weight_decay * w from a parameter w.
        warmup: Number of updates in which the learning rate rises linearly to ``alpha``: update t
            (counted from 1) takes alpha * t / warmup. 0: none.

    Raises:
        ValueError: ``warmup`` is negative.
    """

    def __init__(
        self,
        alpha: float = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        warmup: int = 0,
    ) -> None:
        super().__init__(alpha=alpha, beta1=beta1, beta2=beta2, eps=eps)
        if warmup < 0:
            raise ValueError(f"warmup {warmup}: give a number of updates, or 0 for none")
        self.weight_decay = weight_decay
        self.warmup = warmup

    def update(self, lossfun: Any = None, *args: Any, **kwds: Any) -> None:
        """Computes the gradients (unless ``lossfun`` is None) and updates the parameters."""
        # Chainer's rule subtracts eta * (alpha_t * m / (sqrt(v) + eps) + weight_decay_rate * w).
        self.hyperparam.eta = min(1.0, (self.t + 1) / self.warmup) if self.warmup else 1.0
        self.hyperparam.weight_decay_rate = self.hyperparam.alpha * self.weight_decay
        super().update(lossfun, *args, **kwds)
