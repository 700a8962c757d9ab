"""What the steps of a transform have in common.

A step takes an image, uint8 (0 to 255) or float32, of shape (height, width, 3), and a random
generator, and returns an image; it draws from nothing but that generator. uint8 stays uint8 until
``Normalize`` or ``ToFloat`` makes it float32.
"""

from __future__ import annotations

from typing import Protocol

import numpy

Rng = numpy.random.Generator


class Unusable(ValueError):
    """An image that a step cannot be applied to; the message does not name it."""


class Step(Protocol):
    """A step of a transform."""

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        """Returns the changed image; the one given stays as it is."""


def like(image: numpy.ndarray, values: numpy.ndarray) -> numpy.ndarray:
    """Returns float values as the type of ``image``: rounded and clipped if that is uint8."""
    if image.dtype == numpy.uint8:
        return numpy.rint(values).clip(0, 255).astype(numpy.uint8)
    return values.astype(numpy.float32, copy=False)


def unit(image: numpy.ndarray) -> float:
    """Returns what the values of an image stand for when it says 1.0: 255 in uint8."""
    return 255.0 if image.dtype == numpy.uint8 else 1.0
