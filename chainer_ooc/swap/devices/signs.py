"""Signs: one bit for each element of an array, in place of its copy where nothing else of it is needed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from chainer_ooc.swap.observing import Span

__all__ = ["SignCopy", "SignTransfer"]

#: So many elements are packed at a time, a multiple of 8: what it takes meanwhile is one byte for each.
_AT_ONCE = 1 << 20


class SignCopy:
    """Which elements of an array are greater than zero. It is in memory.

    Args:
        elements: The array, of one dimension.
    """

    skipped_bytes = 0  # nothing goes over a link

    def __init__(self, elements: np.ndarray[Any, Any]) -> None:
        self.dtype = elements.dtype
        with np.errstate(invalid="ignore"):  # NaN is not greater than zero
            self._bits = [np.packbits(part > 0) for part in _parts(elements)]

    def fill(self, elements: np.ndarray[Any, Any]) -> None:
        """Write 1 to the elements that were greater than zero, 0 to the others."""
        for part, bits in zip(_parts(elements), self._bits, strict=True):
            part[...] = np.unpackbits(bits, count=part.size)

    def free(self) -> None:
        """Give the memory back."""
        self._bits = []


class SignTransfer:
    """The making of a :class:`SignCopy`, or of an array from it: over when it is begun."""

    def __init__(self, copy: SignCopy) -> None:
        self.copy = copy
        self._end = time.perf_counter()

    def done(self) -> bool:
        """Return ``True``."""
        return True

    def join(self) -> None:
        """Do nothing."""

    def wait(self) -> None:
        """Do nothing."""

    def span(self) -> Span | None:
        """Return ``None``: no link was used."""
        return None

    def arrival(self) -> float:
        """Return when it was over."""
        return self._end


def _parts(elements: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    return [elements[start : start + _AT_ONCE] for start in range(0, elements.size, _AT_ONCE)]
