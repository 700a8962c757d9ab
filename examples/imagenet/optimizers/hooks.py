"""What is done to gradients before the update: weight decay, and layer-wise adaptive rates.

They are hooks of update rules, not of the optimizer: with mixed precision the gradient of a rule is
the one that it takes, in float32 and without the loss scale.
"""

from __future__ import annotations

from typing import Any

import chainer


class WeightDecay:
    """Adds ``rate`` times the parameter to its gradient (L2).

    Args:
        rate: The factor; may be changed between updates.
        only_weights: Leave biases and batch normalization's parameters (one axis) alone.
    """

    name = "WeightDecay"
    timing = "pre"

    def __init__(self, rate: float, only_weights: bool = False) -> None:
        self.rate = rate
        self.only_weights = only_weights

    def __call__(self, rule: chainer.UpdateRule, param: chainer.Parameter) -> None:
        """Changes the gradient in place."""
        if param.grad is None or not self.rate or (self.only_weights and param.ndim < 2):
            return
        with chainer.using_device(param.device):
            param.grad += self.rate * param.array


class LARS:
    """Layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017, arXiv:1708.03888).

    Scales the gradient g of a weight w (weight decay included) by
    ``coefficient * |w| / (|g| + decay * |w|)``, norms taken before the decay; so the update of each
    layer is in proportion to its weight. Parameters of one axis, and weights or gradients that are
    zero, keep their gradient.

    Args:
        decay: The weight decay, which takes part in the ratio and is added here.
        coefficient: The trust coefficient.
    """

    name = "LARS"
    timing = "pre"

    def __init__(self, decay: WeightDecay, coefficient: float = 0.001) -> None:
        self.decay = decay
        self.coefficient = coefficient

    def __call__(self, rule: chainer.UpdateRule, param: chainer.Parameter) -> None:
        """Changes the gradient in place."""
        if param.grad is None or param.ndim < 2:
            self.decay(rule, param)
            return
        with chainer.using_device(param.device):
            xp: Any = param.device.xp
            w, g = xp.linalg.norm(param.array), xp.linalg.norm(param.grad)
            self.decay(rule, param)
            positive = (w > 0) & (g > 0)
            bottom = xp.where(positive, g + self.decay.rate * w, 1)
            scale = xp.where(positive, self.coefficient * w / bottom, 1)
            param.grad *= scale.astype(param.grad.dtype)
