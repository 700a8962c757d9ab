"""The networks of the ImageNet trainer, each a ``chainer.Chain`` that returns its loss.

Every network is called as ``model(x, t)`` with ``x`` of shape (batch, 3, insize, insize), float32,
and ``t`` of shape (batch,), int32, and reports ``loss`` and ``accuracy``. In ``alex``, ``googlenet``,
``googlenetbn``, ``nin``, ``resnet50`` and ``resnext50`` the names of the links and the shapes of the
parameters are those of Chainer's examples, so that model files fit.
"""

from __future__ import annotations

import chainer
import numpy
from arch_names import ARCH_NAMES
from errors import InputError

from models import cifar, densenet, resnet, vgg
from models.alex import Alex
from models.alexnets import AlexNet, AlexNetBN, AlexNetOWT, AlexNetOWTBN
from models.googlenet import GoogLeNet
from models.googlenet_torch7 import GoogLeNetTorch7
from models.googlenetbn import GoogLeNetBN
from models.nin import NIN
from models.ninbn import NINBN
from models.overfeat import OverFeat
from models.squeezenet import SqueezeNet

_ALL: dict[str, type[chainer.Chain]] = {
    "alex": Alex,
    "alexnet": AlexNet,
    "alexnetbn": AlexNetBN,
    "alexnetowt": AlexNetOWT,
    "alexnetowtbn": AlexNetOWTBN,
    "googlenet": GoogLeNet,
    "googlenet_torch7": GoogLeNetTorch7,
    "googlenetbn": GoogLeNetBN,
    "nin": NIN,
    "ninbn": NINBN,
    "overfeat": OverFeat,
    "squeezenet": SqueezeNet,
    **vgg.ARCHS,
    **resnet.ARCHS,
    **densenet.ARCHS,
    **cifar.ARCHS,
}

ARCHS: dict[str, type[chainer.Chain]] = {name: _ALL[name] for name in ARCH_NAMES}


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
        InputError: There is no such network, or it does not take this ``insize``.
    """
    if arch not in ARCHS:
        raise InputError(f"--arch {arch}: no such network; choose one of {', '.join(ARCHS)}")
    check_insize(arch, insize)
    model = ARCHS[arch](insize, n_classes)
    if any(param.array is None for param in model.params()):
        # Links built with in_size=None allocate their weights at the first forward pass: do it
        # here, in test mode and without a graph, so that optimizers and broadcasts see every
        # parameter.
        dtype = chainer.get_dtype(map_mixed16=numpy.float16)
        x = numpy.zeros((1, 3, insize, insize), dtype=dtype)
        t = numpy.zeros(1, dtype=numpy.int32)
        with chainer.using_config("train", False), chainer.no_backprop_mode():
            model(x, t)
    return model
