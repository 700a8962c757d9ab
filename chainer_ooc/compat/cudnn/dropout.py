"""Dropout with cuDNN's random number generator."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy

from chainer_ooc.compat.cudnn import descriptors, device
from chainer_ooc.compat.cudnn.handles import get_handle
from chainer_ooc.compat.cudnn.library import loaded

__all__ = ["DropoutStates"]


@lru_cache(maxsize=4096)
def _reserve_size(char: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a dropout of this shape keeps for backward (the mask)."""
    return loaded().size("cudnnDropoutGetReserveSpaceSize", descriptors.tensor(char, shape).value)


class DropoutStates:
    """The random number generator of one thread on one device.

    Args:
        handle: A cuDNN handle, or ``None`` for the one of the current thread and device.
        seed: Of the generator, 64 bits.
    """

    def __init__(self, handle: int | None, seed: int) -> None:
        library = loaded()
        handle = get_handle() if handle is None else handle
        self._seed = int(seed)
        self._size = library.size("cudnnDropoutGetStatesSize", handle)
        # Held as long as the descriptor, which points into it.
        self._states = device.allocate(self._size)
        self._ratio = 0.0
        self._desc = descriptors.Descriptor("Dropout")
        library.cudnnSetDropoutDescriptor(
            self._desc.value, handle, self._ratio, self._states.ptr, self._size, self._seed
        )

    def set_dropout_ratio(self, dropout_ratio: float, handle: int | None = None) -> None:
        """Set the probability of dropping, in [0, 1); the generator goes on where it was."""
        ratio = float(dropout_ratio)
        if ratio == self._ratio:
            return
        # Setting it anew would start the generator again at its seed.
        loaded().cudnnRestoreDropoutDescriptor(
            self._desc.value,
            get_handle() if handle is None else handle,
            ratio,
            self._states.ptr,
            self._size,
            self._seed,
        )
        self._ratio = ratio

    def forward(self, handle: int | None, x: Any, dropout_ratio: float) -> tuple[Any, Any]:
        """Drop elements of ``x`` and scale the rest by ``1 / (1 - dropout_ratio)``.

        Args:
            handle: A cuDNN handle or ``None``.
            x: Any shape; float16, float32 or float64.
            dropout_ratio: The probability of dropping.

        Returns:
            ``(mask, y)``: bytes for :meth:`backward`, and a new array of the shape and dtype of
            ``x``.
        """
        device.check_same_device(x)
        handle = get_handle() if handle is None else handle
        self.set_dropout_ratio(dropout_ratio, handle)
        x = device.contiguous(x)
        y = device.empty(x.shape, x.dtype)
        desc = descriptors.matrix(x)
        rows = x.shape[0] if x.ndim else 1
        size = _reserve_size(x.dtype.char, (rows, x.size // rows if rows else 0))
        reserve = device.empty((size,), numpy.dtype("b"))
        loaded().cudnnDropoutForward(
            handle,
            self._desc.value,
            desc.value,
            x.data.ptr,
            desc.value,
            y.data.ptr,
            reserve.data.ptr,
            size,
        )
        return reserve, y

    def backward(
        self, handle: int | None, dy: Any, dropout_ratio: float, reserve_space: Any
    ) -> Any:
        """Apply the mask of a :meth:`forward` to ``dy``.

        Args:
            handle: A cuDNN handle or ``None``.
            dy: Of the shape and dtype that went into :meth:`forward`.
            dropout_ratio: As there.
            reserve_space: The mask that it returned.

        Returns:
            A new array of the shape and dtype of ``dy``.
        """
        device.check_same_device(dy, reserve_space)
        handle = get_handle() if handle is None else handle
        self.set_dropout_ratio(dropout_ratio, handle)
        dy = device.contiguous(dy)
        dx = device.empty(dy.shape, dy.dtype)
        desc = descriptors.matrix(dy)
        loaded().cudnnDropoutBackward(
            handle,
            self._desc.value,
            desc.value,
            dy.data.ptr,
            desc.value,
            dx.data.ptr,
            reserve_space.data.ptr,
            reserve_space.size,
        )
        return dx
