"""Layers that several networks share."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
from chainer import Variable, initializers

from models.common import ImageClassifier


class ScoredClassifier(ImageClassifier):
    """Base of networks with one output: a subclass gives ``scores``."""

    def scores(self, x: Variable) -> Variable:
        """Returns the scores (batch, n_classes) of images x (batch, 3, insize, insize)."""
        raise NotImplementedError

    def forward(self, x: Variable, t: Variable) -> Variable:
        return self.classify(self.scores(x), t)


class ConvBN(chainer.Chain):
    """A convolution, batch normalization and, unless ``activate`` is off, ReLU.

    Args:
        in_size: Channels of the input.
        out_size: Channels of the output.
        ksize: Side of the filters.
        stride: Stride.
        pad: Zeros on each edge.
        groups: Groups of channels.
        bias: Whether the convolution has a bias beside that of the normalization.
        eps: Added to the variance.
        activate: Whether ReLU follows.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        ksize: int,
        stride: int = 1,
        pad: int = 0,
        *,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
        activate: bool = True,
    ) -> None:
        super().__init__()
        with self.init_scope():
            self.conv = convolution(in_size, out_size, ksize, stride, pad, groups=groups, bias=bias)
            self.bn = L.BatchNormalization(out_size, eps=eps)
        self.activate = activate

    def forward(self, x: Variable) -> Variable:
        h = self.bn(self.conv(x))
        return F.relu(h) if self.activate else h


class Stage(chainer.ChainList):
    """Links one after another."""

    def forward(self, x: Variable) -> Variable:
        for link in self:
            x = link(x)
        return x


def convolution(
    in_size: int,
    out_size: int,
    ksize: int,
    stride: int = 1,
    pad: int = 0,
    *,
    groups: int = 1,
    bias: bool = False,
) -> L.Convolution2D:
    """Returns a convolution whose weights have variance 2 / (ksize**2 * out_size)."""
    return L.Convolution2D(
        in_size,
        out_size,
        ksize,
        stride,
        pad,
        nobias=not bias,
        groups=groups,
        initialW=initializers.HeNormal(fan_option="fan_out"),
    )


def pooled_side(n: int, ksize: int, stride: int) -> int:
    """Returns the side of what a max pooling without padding makes of a map of side n."""
    return (n - ksize) // stride + 1


def max_pool(h: Variable, ksize: int, stride: int, pad: int = 0) -> Variable:
    """Max pooling of whole windows only."""
    return F.max_pooling_2d(h, ksize, stride, pad, cover_all=False)
