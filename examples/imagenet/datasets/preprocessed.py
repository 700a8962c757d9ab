"""Datasets for training and validation, and an order of examples that can be resumed exactly.

Nothing here draws from a global random state. The order of an epoch is a function of
(seed, rank, epoch), and an example's augmentation of (seed, rank, epoch, index). A resumed run
thus repeats both, whichever process decodes the image and however far ahead it was read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy
from errors import InputError

from datasets.decoding import Size
from datasets.labeled import Source

Example = tuple[numpy.ndarray, numpy.ndarray]


@dataclass(frozen=True)
class BadExample:
    """Stands for an example that could not be made.

    A dataset returns it instead of raising, because an exception in a worker of
    ``MultiprocessIterator`` would leave the training process waiting for ever.
    """

    message: str


class Transform(Protocol):
    """Makes a network's input of an image.

    It may have a method ``at_least(width, height, rng)`` that returns which width and height
    suffice of an image, or None if every pixel counts; it gets ``rng`` in the state in which
    ``__call__`` will get it.
    """

    def __call__(
        self, image: numpy.ndarray, name: str, rng: numpy.random.Generator | None
    ) -> numpy.ndarray:
        """Returns float32 (channels, height, width).

        Args:
            image: uint8, (height, width, 3).
            name: What errors call the image.
            rng: Source of the augmentation; None: no augmentation.
        """


def generator(seeds: tuple[int, ...]) -> numpy.random.Generator:
    """Returns ``numpy.random.default_rng(seeds)``, sooner if all seeds have 32 bits."""
    # Integers become words one by one; an array of words is taken as it is.
    if max(seeds) < 2**32:
        return numpy.random.default_rng(numpy.array(seeds, dtype=numpy.uint32))
    return numpy.random.default_rng(seeds)


class PreprocessedImages:
    """Images ready for a network.

    Args:
        images: The images to read.
        transform: Makes a network's input of an image.
        seed: Seeds of the augmentation, e.g. (seed, rank); None: no augmentation.

    Index ``i`` is ``visit * len(self) + position``: the ``visit`` makes the augmentation of an
    image differ from epoch to epoch (see ``EpochOrder``).
    """

    def __init__(self, images: Source, transform: Transform, seed: tuple[int, ...] | None) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def get(self, i: int) -> Example:
        """Returns image, float32 (3, insize, insize), and label, int32 scalar.

        Raises:
            InputError: The image cannot be used.
        """
        visit, position = divmod(int(i), len(self))

        def rng() -> numpy.random.Generator | None:
            if self.seed is None:
                return None
            return generator((*self.seed, visit, position))

        need = None
        at_least = getattr(self.transform, "at_least", None)
        if at_least is not None:

            def need(width: int, height: int) -> Size | None:
                return at_least(width, height, rng())

        image = self.images.image(position, need)
        x = self.transform(image, self.images.name(position), rng())
        return x, numpy.array(self.images.label(position), dtype=numpy.int32)

    def __getitem__(self, i: int) -> Example | BadExample:
        """Like ``get``, but returns a ``BadExample`` instead of raising InputError."""
        try:
            return self.get(i)
        except InputError as e:
            return BadExample(str(e))


class EpochOrder:
    """Order sampler of Chainer's iterators whose order depends on the epoch alone.

    Args:
        size: Number of examples.
        seed: Seeds of the order, e.g. (seed, rank).

    The order it returns for the n-th epoch (from 1) holds ``n * size + permutation``, which
    ``PreprocessedImages`` takes apart again; so the order itself says which epoch follows it.
    """

    def __init__(self, size: int, seed: tuple[int, ...]) -> None:
        self.size = size
        self.seed = seed

    def __call__(self, order: numpy.ndarray, position: int) -> numpy.ndarray:
        # An iterator starts with arange(size), that is epoch 0.
        visit = int(order[0]) // self.size + 1
        rng = numpy.random.default_rng((*self.seed, visit))
        return rng.permutation(self.size).astype(numpy.int64) + visit * self.size
