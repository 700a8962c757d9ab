"""Small images that are in memory as one array: MNIST, CIFAR, the digits."""

from __future__ import annotations

import ctypes
import math
import zlib
from multiprocessing.sharedctypes import RawArray

import numpy
from errors import InputError

from datasets.decoding import Need, Size


class ArrayImages:
    """Images of one size in an array, which loader processes share.

    Args:
        images: uint8, (n, height, width) grey or (n, height, width, 3) RGB.
        labels: Integers, (n,).
        name: What errors call the set.
        classes: Names of the classes; labels must be below their number.

    Raises:
        InputError: Shapes, types or labels are not as they should be.
    """

    def __init__(
        self, images: numpy.ndarray, labels: numpy.ndarray, name: str, classes: list[str]
    ) -> None:
        colour = images.ndim == 4 and images.shape[3] == 3
        if images.dtype != numpy.uint8 or not (images.ndim == 3 or colour):
            raise InputError(
                f"{name}: images are {images.dtype} {images.shape}; expected uint8 of shape "
                f"(n, height, width) or (n, height, width, 3)"
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise InputError(
                f"{name}: labels are {labels.dtype} {labels.shape} for {len(images)} images; "
                f"expected one integer for each"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
            raise InputError(
                f"{name}: labels go from {labels.min()} to {labels.max()}; allowed are 0 to "
                f"{len(classes) - 1}"
            )
        self.classes = classes
        self.names = None  # labels of published sets are numbers
        self.labels = labels.astype(numpy.int32)
        self._shape = images.shape
        self._name = name
        self._memory = RawArray(ctypes.c_uint8, max(images.size, 1))
        self.pixels[...] = images

    @property
    def pixels(self) -> numpy.ndarray:
        """The array of all images, uint8."""
        size = math.prod(self._shape)
        return numpy.frombuffer(self._memory, numpy.uint8, size).reshape(self._shape)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Returns what errors call the ``i``-th image."""
        return f"{i} of {self._name}"

    def label(self, i: int) -> int:
        """Returns the class of the ``i``-th image."""
        return int(self.labels[i])

    def version(self, i: int) -> tuple[int, ...]:
        """Returns a checksum of the ``i``-th image."""
        return (zlib.crc32(self.pixels[i].tobytes()),)

    def image_size(self, i: int) -> Size:
        """Returns the width and height of the images."""
        return self._shape[2], self._shape[1]

    def image(self, i: int, need: Need | None = None) -> numpy.ndarray:
        """Returns the ``i``-th image, uint8 RGB (height, width, 3), which must not be changed."""
        image = self.pixels[i]
        if image.ndim == 2:
            image = numpy.broadcast_to(image[:, :, None], (*image.shape, 3))
        return image
