"""What the import hook registers as ``cupy.cuda.cudnn``: enumerations and C functions.

Importing it loads cuDNN. It fails with ``ImportError`` when there is nothing to load or no GPU to
use it on (see :mod:`.choice`), after one line that says what to install; Chainer then runs without
cuDNN.
"""

from __future__ import annotations

from chainer_ooc.compat.cudnn import choice as _choice
from chainer_ooc.compat.cudnn import device as _device
from chainer_ooc.compat.cudnn.constants import *  # noqa: F403
from chainer_ooc.compat.cudnn.errors import CuDNNError
from chainer_ooc.compat.cudnn.library import LibraryNotFoundError, loaded
from chainer_ooc.compat.cudnn.rnn_weights import getRNNParamsSize
from chainer_ooc.compat.cudnn.spatial import (
    spatialTfGridGeneratorBackward,
    spatialTfGridGeneratorForward,
    spatialTfSamplerBackward,
    spatialTfSamplerForward,
)

__all__ = [
    "CuDNNError",
    "available",
    "getRNNParamsSize",
    "getVersion",
    "spatialTfGridGeneratorBackward",
    "spatialTfGridGeneratorForward",
    "spatialTfSamplerBackward",
    "spatialTfSamplerForward",
]
__all__ += [_name for _name in globals() if _name.startswith("CUDNN_")]

#: CuPy 13's module has this name too.
available = True


def getVersion() -> int:
    """Return cuDNN's version: 10000 x major + 100 x minor + patch."""
    return loaded().version


if _choice.setting() == "auto" and not _device.available():
    raise _choice.WithoutCuDNNError(
        f"cuDNN is not loaded because there is no CUDA device "
        f"({_choice.VARIABLE}=own loads it all the same)"
    )
try:
    loaded()
except LibraryNotFoundError as _error:
    _choice.refuse(str(_error), LibraryNotFoundError)
