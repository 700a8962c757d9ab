"""Steps that change values: normalization, colour jitter, noise and smoothing.

Brightness, contrast, saturation and lighting are those of fb.resnet.torch: a blend
``image * a + other * (1 - a)`` with ``a`` uniform from 1 - strength to 1 + strength.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from transforms.steps import Rng, Step, like, unit

LUMA = numpy.array([0.299, 0.587, 0.114], numpy.float32)
"""Weights of red, green and blue in the grey value (ITU-R BT.601)."""

PUBLISHED = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "mnist": ((0.1307,) * 3, (0.3081,) * 3),
}
"""Means and standard deviations of the channels, 0 to 1, that the recipes of each set use."""


def _planes(
    image: numpy.ndarray, factors: Sequence[float], shifts: Sequence[float]
) -> numpy.ndarray:
    """Returns ``image * factor - shift`` of each channel, for values from 0 to 1.

    The channels lie one after the other in memory, as the network will want them; working across
    them is several times slower.
    """
    result = numpy.empty((image.shape[-1], *image.shape[:-1]), numpy.float32)
    one = unit(image)
    for channel, plane in enumerate(result):
        factor = numpy.float32(factors[channel] / one)
        numpy.multiply(image[..., channel], factor, out=plane, dtype=numpy.float32)
        plane -= numpy.float32(shifts[channel])
    return result.transpose(*range(1, result.ndim), 0)


def grey(image: numpy.ndarray) -> numpy.ndarray:
    """Returns the grey values of an image, float32 (height, width)."""
    result = image[:, :, 0] * LUMA[0]
    result += image[:, :, 1] * LUMA[1]
    result += image[:, :, 2] * LUMA[2]
    return result


class ToFloat:
    """Makes uint8 float32 from 0 to 1."""

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        return _planes(image, (1.0,) * 3, (0.0,) * 3)


class Normalize:
    """Subtracts the mean of each channel and divides by its standard deviation: float32.

    Args:
        mean: Of the channels, 0 to 1.
        std: Of the channels, 0 to 1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.factors = [1 / s for s in std]
        self.shifts = [m / s for m, s in zip(mean, std, strict=True)]

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        return _planes(image, self.factors, self.shifts)


def _strength(strength: float, rng: Rng) -> numpy.float32:
    return numpy.float32(1 + rng.uniform(-strength, strength))


@dataclass(frozen=True)
class Brightness:
    """Blends with black."""

    strength: float

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        return like(image, image * _strength(self.strength, rng))


@dataclass(frozen=True)
class Contrast:
    """Blends with the mean of the image's grey values."""

    strength: float

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        a = _strength(self.strength, rng)
        result = image * a
        values = grey(image)
        # as values.mean() does, but for its overhead, which is felt in small images
        mean = numpy.float32(float(numpy.add.reduce(values, axis=None)) / values.size)
        result += mean * (1 - a)
        return like(image, result)


@dataclass(frozen=True)
class Saturation:
    """Blends with the grey image."""

    strength: float

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        a = _strength(self.strength, rng)
        result = image * a
        result += (grey(image) * (1 - a))[:, :, None]
        return like(image, result)


class ColorJitter:
    """Changes brightness, contrast and saturation, in random order.

    Args:
        brightness: Strength.
        contrast: Strength.
        saturation: Strength.
    """

    def __init__(
        self, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4
    ) -> None:
        self.steps: list[Step] = []
        if brightness:
            self.steps.append(Brightness(brightness))
        if contrast:
            self.steps.append(Contrast(contrast))
        if saturation:
            self.steps.append(Saturation(saturation))

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        for i in rng.permutation(len(self.steps)):
            image = self.steps[i](image, rng)
        return image


@dataclass(frozen=True)
class Lighting:
    """Adds the principal components of ImageNet's colours, times normal random numbers.

    From Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", 2012;
    the components are those of fb.resnet.torch.
    """

    std: float = 0.1

    VALUES = numpy.array([0.2175, 0.0188, 0.0045])
    VECTORS = numpy.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        shift = self.VECTORS @ (rng.normal(0, self.std, 3) * self.VALUES) * unit(image)
        return like(image, image + shift.astype(numpy.float32))


@dataclass(frozen=True)
class HSVJitter:
    """Turns the hue and scales saturation and value.

    Attributes:
        hue: The hue turns by up to this part of the colour circle.
        saturation: The saturation is multiplied by 1 - this to 1 + this.
        value: The value likewise.
    """

    hue: float = 0.1
    saturation: float = 0.4
    value: float = 0.4

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        turn = rng.uniform(-self.hue, self.hue)
        hue, saturation, value = to_hsv(image.astype(numpy.float32) / unit(image))
        saturation = (saturation * _strength(self.saturation, rng)).clip(0, 1)
        value = (value * _strength(self.value, rng)).clip(0, 1)
        return like(image, from_hsv((hue + turn) % 1, saturation, value) * unit(image))


def to_hsv(rgb: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Returns hue, saturation and value, each (height, width), 0 to 1, of an image from 0 to 1."""
    value = rgb.max(axis=2)
    span = value - rgb.min(axis=2)
    r, g, b = (rgb[:, :, i] for i in range(3))
    safe = numpy.where(span > 0, span, 1)
    hue = numpy.where(
        value == r, (g - b) / safe, numpy.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    saturation = span / numpy.where(value > 0, value, 1)
    return hue / 6 % 1, saturation, value


def from_hsv(hue: numpy.ndarray, saturation: numpy.ndarray, value: numpy.ndarray) -> numpy.ndarray:
    """Returns the image, float32 (height, width, 3), 0 to 1, of hue, saturation and value."""
    # each channel falls from the value as the hue leaves its own sector
    channels = []
    for n in (5, 3, 1):
        k = (n + hue * 6) % 6
        channels.append(value - value * saturation * numpy.minimum(k, 4 - k).clip(0, 1))
    return numpy.stack(channels, axis=2).astype(numpy.float32)


@dataclass(frozen=True)
class Noise:
    """Adds normal noise of this standard deviation, for values from 0 to 1."""

    std: float

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        noise = rng.standard_normal(image.shape, dtype=numpy.float32)
        return like(image, image + noise * numpy.float32(self.std * unit(image)))


@dataclass(frozen=True)
class Smoothing:
    """Blurs with a Gaussian whose standard deviation is 0 to ``sigma`` pixels."""

    sigma: float

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        sigma = rng.uniform(0, self.sigma)
        reach = min(math.ceil(3 * sigma), *(n - 1 for n in image.shape[:2]))
        if reach < 1:
            return image
        x = numpy.arange(-reach, reach + 1)
        weights = numpy.exp(-0.5 * (x / sigma) ** 2)
        weights = (weights / weights.sum()).astype(numpy.float32)
        result = image.astype(numpy.float32)
        for axis in (0, 1):
            pad = [(reach, reach) if i == axis else (0, 0) for i in range(3)]
            padded = numpy.pad(result, pad, mode="reflect")
            n = result.shape[axis]
            parts = (
                padded[i : i + n] if axis == 0 else padded[:, i : i + n] for i in range(len(x))
            )
            result = sum(part * weight for part, weight in zip(parts, weights, strict=True))
        return like(image, result)
