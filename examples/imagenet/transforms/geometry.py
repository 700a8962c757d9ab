"""Steps that choose, move or resample pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
from PIL import Image

from transforms.steps import Rng, Unusable

Box = tuple[int, int, int, int]
"""Left, top, width and height of a crop."""


def _resample(
    image: numpy.ndarray,
    size: tuple[int, int],
    method: str,
    matrix: tuple[float, ...] | None = None,
) -> numpy.ndarray:
    """Resizes to (width, height), or samples at an affine map of the new coordinates."""
    resampling = Image.Resampling[method.upper()]

    def change(plane: Image.Image) -> Image.Image:
        if matrix is None:
            return plane.resize(size, resampling)
        return plane.transform(size, Image.Transform.AFFINE, matrix, resampling)

    if image.dtype == numpy.uint8:
        return numpy.asarray(change(Image.fromarray(image)))
    planes = [change(Image.fromarray(image[:, :, c])) for c in range(image.shape[2])]
    return numpy.stack([numpy.asarray(plane) for plane in planes], axis=2)


def _crop(image: numpy.ndarray, box: Box) -> numpy.ndarray:
    left, top, width, height = box
    return image[top : top + height, left : left + width]


def _offset(rng: Rng, n: int) -> int:
    # A part of the range rather than one of n numbers, so that the place is the same in an image
    # that was decoded at a fraction of its size.
    return min(int(rng.random() * (n + 1)), n)


def _check(image: numpy.ndarray, width: int, height: int) -> None:
    if image.shape[0] < height or image.shape[1] < width:
        raise Unusable(
            f"{image.shape[1]}x{image.shape[0]} pixels are less than the crop of {width}x{height}; "
            f"use larger images or a smaller --insize"
        )


def short_side(width: int, height: int, size: int) -> tuple[int, int]:
    """Returns width and height scaled so that the shorter one is ``size``."""
    short = min(width, height)
    return max(1, round(width * size / short)), max(1, round(height * size / short))


@dataclass(frozen=True)
class Scale:
    """Resizes so that the short side has ``size`` pixels."""

    size: int
    method: str = "bicubic"

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        new = short_side(image.shape[1], image.shape[0], self.size)
        return image if new == image.shape[1::-1] else _resample(image, new, self.method)

    def needed(self, width: int, height: int, rng: Rng) -> tuple[int, int]:
        """Returns the width and height that the image must have at least."""
        return short_side(width, height, self.size)


@dataclass(frozen=True)
class RandomScale:
    """Resizes so that the short side has ``smallest`` to ``largest`` pixels."""

    smallest: int
    largest: int
    method: str = "bicubic"

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        size = int(rng.integers(self.smallest, self.largest, endpoint=True))
        return Scale(size, self.method)(image, rng)

    def needed(self, width: int, height: int, rng: Rng) -> tuple[int, int]:
        """Returns the width and height that the image must have at least."""
        return short_side(width, height, self.largest)


@dataclass(frozen=True)
class Resize:
    """Resizes to exactly this width and height."""

    width: int
    height: int
    method: str = "bicubic"

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        return _resample(image, (self.width, self.height), self.method)

    def needed(self, width: int, height: int, rng: Rng) -> tuple[int, int]:
        """Returns the width and height that the image must have at least."""
        return self.width, self.height


@dataclass(frozen=True)
class CenterCrop:
    """Takes the middle ``size`` x ``size`` pixels."""

    size: int

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        _check(image, self.size, self.size)
        top, left = (image.shape[0] - self.size) // 2, (image.shape[1] - self.size) // 2
        return _crop(image, (left, top, self.size, self.size))


@dataclass(frozen=True)
class RandomCrop:
    """Takes ``size`` x ``size`` pixels anywhere, after adding ``padding`` zeros on each side."""

    size: int
    padding: int = 0

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        p = self.padding
        if p:
            padded = numpy.zeros(
                (image.shape[0] + 2 * p, image.shape[1] + 2 * p, image.shape[2]), image.dtype
            )
            padded[p:-p, p:-p] = image
            image = padded
        _check(image, self.size, self.size)
        left = _offset(rng, image.shape[1] - self.size)
        top = _offset(rng, image.shape[0] - self.size)
        return _crop(image, (left, top, self.size, self.size))


@dataclass(frozen=True)
class RandomSizedCrop:
    """Takes a part of random area and aspect ratio, and resizes it to ``size`` x ``size``.

    After ``tries`` parts that do not fit into the image it takes the middle of the scaled image.

    Attributes:
        size: Side of the result in pixels.
        area: Range of the part's area, as a part of the image's.
        aspect: Range of its width divided by its height.
        log_aspect: Whether the logarithm of the ratio is uniform, as in torchvision; otherwise the
            ratio is, and width and height change places half of the time, as in fb.resnet.torch.
        method: Filter of the resizing.
        tries: Number of attempts.
    """

    size: int
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    log_aspect: bool = False
    method: str = "bicubic"
    tries: int = 10

    def _choose(self, width: int, height: int, rng: Rng) -> Box | None:
        low, high = self.aspect
        for _ in range(self.tries):
            area = width * height * rng.uniform(*self.area)
            aspect = rng.uniform(low, high)
            if self.log_aspect:
                aspect = low * (high / low) ** ((aspect - low) / (high - low))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not self.log_aspect and rng.random() < 0.5:
                w, h = h, w
            if 0 < w <= width and 0 < h <= height:
                return _offset(rng, width - w), _offset(rng, height - h), w, h
        return None

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        box = self._choose(image.shape[1], image.shape[0], rng)
        if box is None:
            return CenterCrop(self.size)(Scale(self.size, self.method)(image, rng), rng)
        return _resample(_crop(image, box), (self.size, self.size), self.method)

    def needed(self, width: int, height: int, rng: Rng) -> tuple[int, int]:
        """Returns the width and height that the image must have at least."""
        box = self._choose(width, height, rng)
        if box is None:
            return short_side(width, height, self.size)
        scale = max(self.size / box[2], self.size / box[3])
        return math.ceil(width * scale), math.ceil(height * scale)


@dataclass(frozen=True)
class TenCrop:
    """Takes the four corners and the centre, and their mirror images: (10, size, size, 3)."""

    size: int

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        _check(image, self.size, self.size)
        bottom, right = image.shape[0] - self.size, image.shape[1] - self.size
        places = [(0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2)]
        five = numpy.stack([_crop(image, (x, y, self.size, self.size)) for x, y in places])
        return numpy.concatenate([five, five[:, :, ::-1]])


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirrors the image with this probability."""

    probability: float = 0.5

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        return image[:, ::-1] if rng.random() < self.probability else image


@dataclass(frozen=True)
class Warp:
    """Rotates, scales and shears about the centre in one sampling; what is beyond the edge is 0.

    Attributes:
        rotation: Degrees; the angle, counterclockwise, is uniform from minus a half of it to a half.
        scale: The image becomes 1/(1 + scale) to 1 + scale times as large, log-uniformly.
        shear: Rows move sideways by up to this part of their distance from the centre.
        method: Filter of the sampling.
    """

    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    method: str = "bilinear"

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        angle = math.radians((rng.random() - 0.5) * self.rotation)
        zoom = math.exp(rng.uniform(-1, 1) * math.log1p(self.scale))
        shear = rng.uniform(-self.shear, self.shear)
        height, width = image.shape[:2]
        # from new coordinates to old: the inverse of shearing, scaling and rotating
        cos, sin = math.cos(angle) / zoom, -math.sin(angle) / zoom  # rows go down
        a, b, d, e = cos, sin + cos * shear, -sin, cos - sin * shear
        x, y = width / 2, height / 2
        matrix = (a, b, x - a * x - b * y, d, e, y - d * x - e * y)
        return _resample(image, (width, height), self.method, matrix)


@dataclass(frozen=True)
class Rotation:
    """Rotates about the centre by an angle from minus a half of ``degrees`` to a half."""

    degrees: float

    def __call__(self, image: numpy.ndarray, rng: Rng) -> numpy.ndarray:
        return Warp(rotation=self.degrees)(image, rng)
