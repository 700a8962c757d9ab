"""The loss of the classifiers: cross entropy, with smoothed labels in training if wanted.

It is always computed in float32, also of half-precision scores.
"""

from __future__ import annotations

import chainer
import chainer.functions as F
import numpy
from chainer import Variable

chainer.global_config.label_smoothing = 0.0


def softmax_cross_entropy(h: Variable, t: Variable) -> Variable:
    """Returns the mean cross entropy of scores and labels, a float32 scalar.

    In training ``chainer.config.label_smoothing`` e spreads a part of the target evenly: its
    distribution is ``1 - e`` on the label plus ``e / n_classes`` on every class (Szegedy et al.
    2016, arXiv:1512.00567). Validation always takes the labels as they are.

    Args:
        h: Scores (batch, n_classes).
        t: Labels (batch,), int32.
    """
    h = full_precision(h)
    loss = F.softmax_cross_entropy(h, t)
    smoothing = chainer.config.label_smoothing
    if not (smoothing and chainer.config.train):
        return loss
    return (1 - smoothing) * loss - smoothing * F.mean(F.log_softmax(h))


def full_precision(h: Variable) -> Variable:
    """Returns half-precision scores in float32, others as they are."""
    return F.cast(h, numpy.float32) if h.dtype == numpy.float16 else h
