"""Find the places where a matrix product may be cut so that each part has the bits of the whole.

Each element is a sum over the depth, and BLAS orders that sum by the depth alone, except at the edges: small
products, single rows or columns and what is left over beside full register tiles run other code.
So cuts lie at multiples of every tile, no part is small, and this BLAS is asked once for each kind of
product whether it keeps to that.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

__all__ = ["Product"]

#: Cuts lie at multiples of this many rows or columns: a multiple of the register tiles.
_TILE = 16
#: Parts have at least this many multiplications: OpenBLAS has other code below a million.
_LEAST = 1_100_000
#: A trial has at least so many rows and elements, whichever are fewer rows: the sums of an element may also depend on
#: its place in the panels in which BLAS works (some 500 to 800 rows), and on how threads divide them.
_TRIAL_ROWS, _TRIAL_ELEMENTS = 4096, 1 << 20


class Product(NamedTuple):
    """A matrix product that is to be cut along one free side.

    Attributes:
        side: The free side: ``"rows"`` of the first matrix, or ``"columns"`` of the second.
        each: The rows or columns of one unit.
        depth: The length of the sums.
        other: The length of the side that is not cut.
        dtype: The dtype of the computation.
    """

    side: str
    each: int
    depth: int
    other: int
    dtype: np.dtype

    @property
    def in_order(self) -> bool:
        """Whether NumPy's own loop computes it, one sum after the other (half precision)."""
        return self.dtype.char == "e"

    @property
    def grain(self) -> int:
        """The number of units of which each cut is a multiple."""
        return 1 if self.in_order else _TILE // math.gcd(_TILE, self.each)

    @property
    def least(self) -> int:
        """The smallest number of units in a part."""
        return (
            1 if self.in_order else math.ceil(_LEAST / max(self.each * self.depth * self.other, 1))
        )

    def can_be_split(self, units: int) -> bool:
        """Return whether a cut keeps the bits, according to a trial on this machine's BLAS."""
        if self.in_order:
            return True
        if self.dtype.char not in "fd" or self.depth < 2 or self.other < 2:
            return False  # a product with a vector
        if units * self.each % _TILE or self.other % _TILE:
            return False  # the sums in a partial last tile depend on its size
        size = _TILE * math.ceil(_LEAST / (_TILE * min(self.depth, 4096) * self.other))
        with np.errstate(all="ignore"):  # the user wants to hear of his own numbers only
            return _keeps_bits(
                self.side,
                size,
                min(self.depth, 4096),
                self.other,
                units * self.each % _TILE,
                self.dtype.char,
            )


@functools.lru_cache(256)
def _keeps_bits(side: str, size: int, depth: int, other: int, rest: int, char: str) -> bool:
    random = np.random.Generator(np.random.PCG64(0))  # the global state is the user's
    rows = max(3 * size, min(_TRIAL_ROWS, max(_TRIAL_ELEMENTS // depth, 1024)) // _TILE * _TILE)
    free = random.standard_normal((rows + rest, depth)).astype(char)
    fixed = random.standard_normal((other, depth)).astype(char)
    for order in ("C", "F"):

        def multiply(part: np.ndarray, order: str = order) -> np.ndarray:
            part = np.array(part, order=order)  # type: ignore[call-overload]
            return np.dot(part, fixed.T) if side == "rows" else np.dot(fixed, part.T).T

        whole = multiply(free)
        for cut in (size, size + _TILE, rows // 2 // _TILE * _TILE):
            parts = [multiply(free[:cut]), multiply(free[cut:])]
            if not np.array_equal(whole, np.concatenate(parts)):
                return False
    return True
