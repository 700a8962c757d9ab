"""Transforms made of steps, and the ones that are known by name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from errors import InputError

from transforms import colour, geometry
from transforms.steps import Step, Unusable

# Decoding at a fraction of the size leaves the filter of a step that shrinks less to choose from:
# twice the pixels that the step makes are enough.
_MARGIN = 2

_NO_RNG = numpy.random.default_rng(0)


class Compose:
    """Steps one after the other, and at the end channels first.

    Args:
        steps: The steps. Without a random generator they must not be random.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = list(steps)

    def at_least(
        self, width: int, height: int, rng: numpy.random.Generator | None
    ) -> tuple[int, int] | None:
        """Returns the width and height that suffice of an image, or None if every pixel counts.

        ``rng`` must be in the state that ``__call__`` will get it in.
        """
        needed = getattr(self.steps[0], "needed", None) if self.steps else None
        if needed is None:
            return None
        new_width, new_height = needed(width, height, rng if rng is not None else _NO_RNG)
        return _MARGIN * new_width, _MARGIN * new_height

    def __call__(
        self, image: numpy.ndarray, name: str, rng: numpy.random.Generator | None
    ) -> numpy.ndarray:
        """Returns a network's input: float32, (3, height, width), or (10, 3, ...) of ten crops.

        Args:
            image: uint8, (height, width, 3).
            name: What errors call the image.
            rng: Source of the augmentation.

        Raises:
            InputError: The image is too small.
        """
        try:
            for step in self.steps:
                image = step(image, _NO_RNG if rng is None else rng)
        except Unusable as e:
            raise InputError(f"image {name}: {e}") from e
        n = image.ndim
        return numpy.ascontiguousarray(
            image.transpose(*range(n - 3), n - 1, n - 3, n - 2), dtype=numpy.float32
        )


AUGMENTATIONS = ("torch7", "resnet", "cifar", "none")
"""Names of the transforms of ``training`` and ``validation``.

torch7: short side to 256, random 224, normalize, flip, colour jitter; resnet: random part resized
to 224, flip, normalize; cifar: padding of 4, random 32, flip, normalize; none: as in validation.
Sizes are in proportion to the input's, 224 or 32.
"""


def training(name: str, insize: int, mean: Sequence[float], std: Sequence[float]) -> Compose:
    """Returns the transform of training images.

    Args:
        name: One of ``AUGMENTATIONS``.
        insize: Side of the network's input in pixels.
        mean: Of the channels, 0 to 1.
        std: Of the channels, 0 to 1.

    Raises:
        InputError: There is no such name.
    """
    normalize, flip = colour.Normalize(mean, std), geometry.HorizontalFlip()
    if name == "none":
        return validation(name, insize, mean, std)
    if name == "torch7":
        return Compose(
            [
                geometry.Scale(scaled_size(insize)),
                geometry.RandomCrop(insize),
                normalize,
                flip,
                colour.ColorJitter(0.4, 0.4, 0.4),
            ]
        )
    if name == "resnet":
        crop = geometry.RandomSizedCrop(insize, log_aspect=True, method="bilinear")
        return Compose([crop, flip, normalize])
    if name == "cifar":
        return Compose([geometry.RandomCrop(insize, padding=insize // 8), flip, normalize])
    raise InputError(f"augmentation {name!r}: allowed are {', '.join(AUGMENTATIONS)}")


def validation(
    name: str, insize: int, mean: Sequence[float], std: Sequence[float], ten_crop: bool = False
) -> Compose:
    """Returns the transform of validation images; see ``training``.

    Args:
        name: As in ``training``: cifar takes the middle of the image as it is, the others scale
            the short side first.
        insize: Side of the network's input in pixels.
        mean: Of the channels, 0 to 1.
        std: Of the channels, 0 to 1.
        ten_crop: Ten crops instead of the middle one.
    """
    steps: list[Step] = []
    if name != "cifar":
        method = "bilinear" if name == "resnet" else "bicubic"
        steps.append(geometry.Scale(scaled_size(insize), method))
    steps.append(geometry.TenCrop(insize) if ten_crop else geometry.CenterCrop(insize))
    return Compose([*steps, colour.Normalize(mean, std)])


def scaled_size(insize: int) -> int:
    """Returns the short side before cropping: 256 pixels for an input of 224."""
    return round(insize * 256 / 224)
