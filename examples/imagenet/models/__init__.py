"""The networks of the ImageNet trainer, each a ``chainer.Chain`` that returns its loss.

Every network is called as ``model(x, t)`` with ``x`` of shape (batch, 3, insize, insize), float32,
and ``t`` of shape (batch,), int32, and reports ``loss`` and ``accuracy``. The names of the links
and the shapes of the parameters are those of Chainer's examples, so that model files fit.
"""

from __future__ import annotations

import chainer
import numpy
from errors import InputError

from models.alex import Alex
from models.googlenet import GoogLeNet
from models.googlenetbn import GoogLeNetBN
from models.nin import NIN
from models.resnet import ResNet50, ResNeXt50

ARCHS: dict[str, type[chainer.Chain]] = {
    "alex": Alex,
    "googlenet": GoogLeNet,
    "googlenetbn": GoogLeNetBN,
    "nin": NIN,
    "resnet50": ResNet50,
    "resnext50": ResNeXt50,
}


def check_insize(arch: str, insize: int) -> None:
    """Raises InputError when the network cannot take images of ``insize`` x ``insize`` pixels."""
    cls = ARCHS[arch]
    step = cls.insize_multiple
    if step > 1 and (insize < step or insize % step):
        raise InputError(
            f"--insize {insize}: {arch} takes multiples of {step} ({step}, {2 * step}, {3 * step}, "
            f"...); choose one of them or another --arch"
        )
    if insize < cls.insize_min:
        raise InputError(
            f"--insize {insize}: {arch} takes {cls.insize_min} or more pixels; "
            f"choose a larger size or another --arch"
        )


def create(arch: str, insize: int, n_classes: int = 1000) -> chainer.Chain:
    """Builds a network with all its parameters allocated (on the CPU).

    Args:
        arch: A key of ``ARCHS``.
        insize: Height and width of the input in pixels.
        n_classes: Number of outputs.

    Raises:
        InputError: The network does not take this ``insize``.
    """
    check_insize(arch, insize)
    model = ARCHS[arch](insize, n_classes)
    # Links built with in_size=None allocate their weights at the first forward pass: do it here,
    # in test mode and without a graph, so that optimizers and broadcasts see every parameter.
    x = numpy.zeros((1, 3, insize, insize), dtype=numpy.float32)
    t = numpy.zeros(1, dtype=numpy.int32)
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        model(x, t)
    return model
