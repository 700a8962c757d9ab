"""How float32 convolutions multiply: strict float32, or TF32 on tensor cores."""

from __future__ import annotations

import os
import sys

import numpy

from chainer_ooc.compat.cudnn import choice, device
from chainer_ooc.compat.cudnn.constants import (
    CUDNN_DEFAULT_MATH,
    CUDNN_FMA_MATH,
    CUDNN_TENSOR_OP_MATH,
    CUDNN_TENSOR_OP_MATH_ALLOW_CONVERSION,
)

__all__ = [
    "VARIABLE",
    "allowed",
    "configured_tensor_core",
    "get_math_mode",
    "is_tensor_core_available",
    "math_type_for",
    "set_math_mode",
]

VARIABLE = "CHAINER_OOC_CUDNN_MATH"

_MODES = ("fp32", "tf32")


def _checked(mode: str, where: str) -> str:
    if mode not in _MODES:
        raise ValueError(
            f"{where}{mode!r} is not understood: use 'fp32' (every product and sum "
            "in float32) or 'tf32' (products of 10-bit mantissas on tensor cores, sums in float32)"
        )
    return mode


def _from_environment() -> str:
    try:
        return _checked(os.environ.get(VARIABLE, "").strip() or "fp32", f"{VARIABLE}=")
    except ValueError as error:
        choice.refuse(str(error))


_mode = _from_environment()


def get_math_mode() -> str:
    """Return the math mode of float32 convolutions: ``"fp32"`` (the default) or ``"tf32"``."""
    return _mode


def set_math_mode(mode: str) -> None:
    """Set the math mode of float32 convolutions for the process.

    It holds while ``chainer.config.use_cudnn_tensor_core`` is ``"auto"``. ``"always"`` there means
    TF32 and ``"never"`` strict float32, whatever is set here.

    Args:
        mode: ``"fp32"`` or ``"tf32"``.

    Raises:
        ValueError: For any other value.
    """
    global _mode
    _mode = _checked(mode, "math mode ")


def configured_tensor_core() -> str:
    """Return ``chainer.config.use_cudnn_tensor_core``, for calls that Chainer does not pass it to."""
    chainer = sys.modules.get("chainer")
    return "auto" if chainer is None else chainer.config.use_cudnn_tensor_core


def is_tensor_core_available(dtype: numpy.dtype) -> bool:
    """Return whether the current device's tensor cores take this dtype (float16, from 7.0 on)."""
    return (
        numpy.dtype(dtype).char == "e" and device.compute_capability(device.current_device()) >= 70
    )


def math_type_for(dtype: numpy.dtype, tensor_core: str) -> int:
    """Return the ``cudnnMathType_t`` to ask for.

    Args:
        dtype: Of the arrays.
        tensor_core: ``chainer.config.use_cudnn_tensor_core``: ``"auto"``, ``"always"`` or
            ``"never"``.

    Raises:
        ValueError: For another ``tensor_core``.
    """
    if tensor_core not in ("auto", "always", "never"):
        raise ValueError(f"tensor_core must be 'auto', 'always' or 'never', not {tensor_core!r}")
    if dtype.char == "d":
        return CUDNN_DEFAULT_MATH
    if tensor_core == "never":
        return CUDNN_FMA_MATH
    if dtype.char == "e":
        return CUDNN_TENSOR_OP_MATH
    # For float32 cuDNN's default math is TF32 where the device has it.
    return CUDNN_DEFAULT_MATH if tensor_core == "always" or _mode == "tf32" else CUDNN_FMA_MATH


def allowed(asked: int, offered: int, dtype: numpy.dtype) -> bool:
    """Return whether an algorithm offered with one math type may serve when another was asked.

    cuDNN's searches also return algorithms of other math types than the descriptor's.
    """
    if asked == CUDNN_FMA_MATH:
        return offered in (CUDNN_FMA_MATH, CUDNN_DEFAULT_MATH)
    if offered == CUDNN_TENSOR_OP_MATH_ALLOW_CONVERSION:
        # It rounds float32 data to float16, which nobody asked for.
        return dtype.char == "e"
    return True


def to_run(asked: int, offered: int) -> int:
    """Return the math type to run an offered algorithm with: strict stays strict."""
    return CUDNN_FMA_MATH if asked == CUDNN_FMA_MATH else offered
