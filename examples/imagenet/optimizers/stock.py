"""Chainer's own optimizers, with the float32 copies of float16 parameters in their snapshots."""

from __future__ import annotations

from chainer import optimizers
from chainer.optimizers.adam import AdamRule
from chainer.optimizers.momentum_sgd import MomentumSGDRule
from chainer.optimizers.rmsprop import RMSpropRule

from optimizers.fp32_master import Fp32MasterRule


class _MomentumSGDRule(Fp32MasterRule, MomentumSGDRule):
    pass


class _AdamRule(Fp32MasterRule, AdamRule):
    pass


class _RMSpropRule(Fp32MasterRule, RMSpropRule):
    pass


class MomentumSGD(optimizers.MomentumSGD):
    """``v <- momentum * v - lr * g; w <- w + v``."""

    def create_update_rule(self) -> MomentumSGDRule:
        """Returns the rule of a parameter."""
        return _MomentumSGDRule(self.hyperparam)


class Adam(optimizers.Adam):
    """Adam (arXiv:1412.6980); ``alpha`` is its learning rate."""

    def create_update_rule(self) -> AdamRule:
        """Returns the rule of a parameter."""
        return _AdamRule(self.hyperparam)


class RMSprop(optimizers.RMSprop):
    """``m <- alpha * m + (1 - alpha) * g**2; w <- w - lr * g / (sqrt(m) + eps)``."""

    def create_update_rule(self) -> RMSpropRule:
        """Returns the rule of a parameter."""
        return _RMSpropRule(self.hyperparam)
