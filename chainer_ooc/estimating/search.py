"""Find the largest size that fits with few trials: memory grows with a power of the size."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Fits", "largest"]

#: Trials at most for one answer.
_TRIALS = 20
#: Sizes beyond so many times the first are not looked at.
_FARTHEST = 4096


class Fits(NamedTuple):
    """The memory for a size: the peak in core, and the least limit out of core (bytes)."""

    in_core: int
    out_of_core: int


def largest(
    trial: Callable[[int], Fits | None],
    start: int,
    here: Fits,
    limit: int,
    multiple: int,
    power: int,
) -> dict[str, int | None]:
    """Return the largest sizes whose memory is within a limit, ``None`` if no size fits.

    Args:
        trial: Takes a size and returns its memory, ``None`` for a size that is not allowed.
        start: A size that was tried already.
        here: The memory for it.
        limit: The limit (bytes).
        multiple: Sizes are multiples of this number.
        power: Memory grows with the size to this power.
    """
    tried: dict[int, Fits | None] = {start: here}

    def take(size: int) -> Fits | None:
        if size not in tried:
            tried[size] = trial(size)
        return tried[size]

    found: dict[str, int | None] = {}
    for index, key in enumerate(Fits._fields):
        found[key] = _largest(take, tried, index, limit, multiple, power)
    return found


def _largest(
    take: Callable[[int], Fits | None],
    tried: dict[int, Fits | None],
    index: int,
    limit: int,
    multiple: int,
    power: int,
) -> int | None:
    """Return one largest size: secant steps between known bounds, then bisection."""
    start = next(iter(tried))
    step = multiple
    for number in range(_TRIALS):
        known = sorted((size, fits[index]) for size, fits in tried.items() if fits is not None)
        low = max((size for size, taken in known if taken <= limit), default=0)
        # A size that is not allowed is an upper bound, too.
        failing = [size for size, taken in known if taken > limit]
        failing += [size for size, fits in tried.items() if fits is None and size > low]
        high = min(failing, default=0)
        least = low // multiple * multiple + multiple
        if high and least >= high:
            break
        middle = (low + high) // 2 // multiple * multiple
        guess = _secant(known, limit, power, low, start) // multiple * multiple
        # If the secant falls short repeatedly, double the steps.
        guess = max(guess, least + step - multiple)
        if high and (guess >= high or number % 2):
            guess = max(middle, least)
        if not high and low:
            guess = min(guess, 16 * low)
        if guess > _FARTHEST * max(start, 64):
            break
        fits = take(guess)
        step = 2 * step if fits is not None and fits[index] <= limit else multiple
    sizes = [s for s, fits in tried.items() if fits is not None and fits[index] <= limit]
    return max(sizes, default=None)


def _secant(known: list[tuple[int, int]], limit: int, power: int, low: int, start: int) -> int:
    """Return the size at which a + b·size**power, through the two nearest known points, meets the limit."""
    if len(known) < 2:
        size, taken = known[0]
        return 2 * size if taken <= limit else max(size // 2, 1)
    nearest = sorted(known, key=lambda item: abs(item[1] - limit))[:2]
    (s0, m0), (s1, m1) = sorted(nearest)
    slope = (m1 - m0) / (s1**power - s0**power)
    if slope <= 0:
        return 2 * max(s1, start)
    reach = (limit - m0) / slope + s0**power
    return min(int(max(reach, 0) ** (1 / power)), 1000 * max(low, start))
