"""The table of cases over ``chainer.links``: how each is made and with what it is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L

from tests.equality.function_cases import Make, i, n


@dataclasses.dataclass(frozen=True)
class LinkCase:
    """One link, trained two steps.

    Attributes:
        name: The link's name in ``chainer.links``, and what sets the case apart from others of it.
        create: Returns the link.
        makes: Each makes one input.
        call: Called with the link and the inputs. Returns variables.
    """

    name: str
    create: Callable[[], chainer.Link]
    makes: tuple[Make, ...]
    call: Callable[..., Any]


LINKS: list[LinkCase] = []


def link(name: str, create: Callable[[], Any], *makes: Make, call: Any = None) -> None:
    LINKS.append(LinkCase(name, create, makes, call or (lambda model, *xs: model(*xs))))


def twice(model: Any, *xs: Any) -> Any:
    """Two steps in time of a stateful link."""
    model.reset_state()
    return [model(*xs), model(*xs)]


def sequences(model: Any, *xs: Any) -> Any:
    *states, ys = model(*[None] * states_of(model), list(xs))
    return [*states, *ys]


def states_of(model: Any) -> int:
    return 2 if isinstance(model, L.NStepLSTM | L.NStepBiLSTM) else 1


IMAGES, SERIES = n(2, 3, 6, 6), [n(3, 4), n(2, 4), n(1, 4)]

# Activations and plain layers.
link("Maxout", lambda: L.Maxout(4, 3, 2), n(3, 4))
link("PReLU", lambda: L.PReLU((4,)), n(3, 4))
link("Swish", lambda: L.Swish((4,)), n(3, 4))
link("SimplifiedDropconnect", lambda: L.SimplifiedDropconnect(4, 3), n(3, 4))
link("Bias", lambda: L.Bias(1, (4,)), n(3, 4))
link("Scale", lambda: L.Scale(1, (4,), bias_term=True), n(3, 4))
link("Bilinear", lambda: L.Bilinear(3, 4, 2), n(2, 3), n(2, 4))
link("Linear", lambda: L.Linear(4, 3), n(2, 4))
link("Linear of unknown size", lambda: L.Linear(3), n(2, 4))
link("EmbedID", lambda: L.EmbedID(5, 3), i(5, 2, 3))
link("Highway", lambda: L.Highway(4), n(3, 4))

# Convolutions.
link("Convolution1D", lambda: L.Convolution1D(3, 2, 3), n(2, 3, 6))
link("Convolution2D", lambda: L.Convolution2D(3, 4, 3, stride=2, pad=1), IMAGES)
link("Convolution2D groups", lambda: L.Convolution2D(3, 6, 3, groups=3, nobias=True), IMAGES)
link("Convolution3D", lambda: L.Convolution3D(2, 2, 2), n(1, 2, 3, 3, 3))
link("ConvolutionND", lambda: L.ConvolutionND(2, 3, 2, 3), IMAGES)
link("Deconvolution1D", lambda: L.Deconvolution1D(3, 2, 3), n(2, 3, 6))
link("Deconvolution2D", lambda: L.Deconvolution2D(3, 2, 3, stride=2), IMAGES)
link("Deconvolution3D", lambda: L.Deconvolution3D(2, 2, 2), n(1, 2, 3, 3, 3))
link("DeconvolutionND", lambda: L.DeconvolutionND(2, 3, 2, 3), IMAGES)
link("DeformableConvolution2D", lambda: L.DeformableConvolution2D(3, 2, 3, pad=1), IMAGES)
link("DepthwiseConvolution2D", lambda: L.DepthwiseConvolution2D(3, 2, 3), IMAGES)
link("DilatedConvolution2D", lambda: L.DilatedConvolution2D(3, 2, 2, dilate=2), IMAGES)
link("LocalConvolution2D", lambda: L.LocalConvolution2D(3, 2, in_size=6, ksize=3), IMAGES)
link("Inception", lambda: L.Inception(3, 2, 2, 3, 2, 3, 2), IMAGES)
link("InceptionBN", lambda: L.InceptionBN(3, 2, 2, 3, 2, 3, "max", 2), IMAGES)
link("MLPConvolution2D", lambda: L.MLPConvolution2D(3, (4, 2), 3, activation=F.tanh), IMAGES)

# Losses.
link("BlackOut", lambda: L.BlackOut(4, [2, 1, 3], 2), n(3, 4), i(3, 3))
link(
    "CRF1d",
    lambda: L.CRF1d(3),
    n(3, 3),
    n(2, 3),
    i(3, 3),
    i(3, 2),
    call=lambda m, a, b, t, s: m([a, b], [t, s]),
)
link(
    "BinaryHierarchicalSoftmax",
    lambda: L.BinaryHierarchicalSoftmax(
        4, L.BinaryHierarchicalSoftmax.create_huffman_tree({0: 4, 1: 2, 2: 1, 3: 1})
    ),
    n(3, 4),
    i(4, 3),
)
link("NegativeSampling", lambda: L.NegativeSampling(4, [2, 1, 3], 2), n(3, 4), i(3, 3))
link("Classifier", lambda: L.Classifier(L.Linear(4, 3)), n(5, 4), i(3, 5))

# Normalizations.
link("BatchNormalization", lambda: L.BatchNormalization(3), IMAGES)
link(
    "BatchNormalization without training",
    lambda: L.BatchNormalization(3),
    IMAGES,
    call=lambda m, x: evaluated(m, x),
)
link("BatchRenormalization", lambda: L.BatchRenormalization(3), n(5, 3))
link(
    "DecorrelatedBatchNormalization",
    lambda: chainer.Sequential(L.Linear(3, 3), L.DecorrelatedBatchNormalization(3, groups=1)),
    n(6, 3),
)
link("GroupNormalization", lambda: L.GroupNormalization(2, 4), n(2, 4, 3))
link("LayerNormalization", lambda: L.LayerNormalization(4), n(3, 4))

# Recurrent networks.
link("GRU", lambda: L.GRU(4, 3), n(2, 4), call=twice)
link("StatefulGRU", lambda: L.StatefulGRU(4, 3), n(2, 4), call=twice)
link("StatelessGRU", lambda: L.StatelessGRU(4, 3), n(2, 3), n(2, 4))
link("LSTM", lambda: L.LSTM(4, 3), n(2, 4), call=twice)
link("StatelessLSTM", lambda: L.StatelessLSTM(4, 3), n(2, 3), n(2, 3), n(2, 4))
link("StatefulMGU", lambda: L.StatefulMGU(4, 3), n(2, 4), call=twice)
link("StatelessMGU", lambda: L.StatelessMGU(4, 3), n(2, 3), n(2, 4))
link("StatefulPeepholeLSTM", lambda: L.StatefulPeepholeLSTM(4, 3), n(2, 4), call=twice)
link("StatefulZoneoutLSTM", lambda: L.StatefulZoneoutLSTM(4, 3), n(2, 4), call=twice)
link("ChildSumTreeLSTM", lambda: L.ChildSumTreeLSTM(4, 3), *[n(2, 3)] * 4, n(2, 4))
link("NaryTreeLSTM", lambda: L.NaryTreeLSTM(4, 3, n_ary=2), *[n(2, 3)] * 4, n(2, 4))
KINDS = ("LSTM", "GRU", "RNNTanh", "RNNReLU")
for rnn in [f"NStep{direction}{kind}" for direction in ("", "Bi") for kind in KINDS]:
    link(rnn, lambda rnn=rnn: getattr(L, rnn)(2, 4, 3, 0.3), *SERIES, call=sequences)


def evaluated(model: Any, x: Any) -> Any:
    with chainer.using_config("train", False):
        return model(x)
