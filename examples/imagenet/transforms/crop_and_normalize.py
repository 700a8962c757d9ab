"""From a decoded image to a network's input: crop, flip, subtract the mean, scale."""

from __future__ import annotations

from pathlib import Path

import numpy
from errors import InputError


def load_mean(path: str | Path, insize: int) -> numpy.ndarray:
    """Loads the mean of the training images.

    Args:
        path: ``.npy`` file with an array of shape (3, height, width) as compute_mean.py writes it,
            or (3,) or (3, 1, 1): one value per channel.
        insize: Side of the crops in pixels; the mean image must not be smaller.

    Returns:
        float32 array of shape (3, height, width) or (3, 1, 1).

    Raises:
        InputError: The file cannot be read, has another shape, or a value that is not finite.
    """
    try:
        # mapped: then a header cannot ask for more memory than the file has bytes
        mean = numpy.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as e:
        raise InputError(
            f"mean file {path}: no such file; make it with compute_mean.py or give --mean/-m"
        ) from e
    except Exception as e:  # of zipfile and of Python's parser, too
        raise InputError(_no_numbers(path)) from e
    if not isinstance(mean, numpy.ndarray) or mean.dtype.kind not in "fiu":
        raise InputError(_no_numbers(path))
    if mean.shape == (3,):
        mean = mean.reshape(3, 1, 1)
    if mean.ndim != 3 or mean.shape[0] != 3:
        raise InputError(
            f"mean file {path}: shape {mean.shape} is not allowed; "
            f"allowed are (3, height, width) of the images, (3, 1, 1) and (3,)"
        )
    if mean.shape[1:] != (1, 1) and min(mean.shape[1:]) < insize:
        raise InputError(
            f"mean file {path}: {mean.shape[2]}x{mean.shape[1]} pixels are less than "
            f"--insize {insize}; use larger images or a smaller --insize"
        )
    with numpy.errstate(over="ignore"):
        mean = numpy.array(mean, dtype=numpy.float32)
    bad = ~numpy.isfinite(mean)
    if bad.any():
        raise InputError(
            f"mean file {path}: {bad.sum()} of its {mean.size} values are no finite numbers, such as "
            f"{mean[bad][0]}; make it again with compute_mean.py"
        )
    return mean


def _no_numbers(path: str | Path) -> str:
    return f"mean file {path}: not a .npy file of numbers; make one with compute_mean.py"


class CropAndNormalize:
    """Crops to a square, flips, subtracts the mean and scales by 1/255.

    Args:
        mean: As ``load_mean`` returns it.
        size: Side of the crop in pixels.
    """

    def __init__(self, mean: numpy.ndarray, size: int) -> None:
        self.mean = mean
        self.size = size

    def __call__(
        self, image: numpy.ndarray, name: str, rng: numpy.random.Generator | None
    ) -> numpy.ndarray:
        """Returns a network's input.

        Args:
            image: uint8, (height, width, 3).
            name: What errors call the image.
            rng: Chooses the crop's place and whether to flip; None: the centre, not flipped.

        Returns:
            float32, (3, size, size).

        Raises:
            InputError: The image is smaller than the crop, or its size is not the mean image's.
        """
        height, width = image.shape[:2]
        size = self.size
        if height < size or width < size:
            raise InputError(
                f"image {name}: {width}x{height} pixels are less than --insize {size}; "
                f"enlarge it or choose a smaller --insize"
            )
        per_channel = self.mean.shape[1:] == (1, 1)
        if not per_channel and self.mean.shape[1:] != (height, width):
            raise InputError(
                f"image {name}: {width}x{height} pixels, but the mean file is for "
                f"{self.mean.shape[2]}x{self.mean.shape[1]}; resize the images to one size "
                f"or use a mean of one value per channel"
            )
        flip = False
        if rng is None:
            top, left = (height - size) // 2, (width - size) // 2
        else:
            # `integers` excludes its upper end: every offset from 0 to height - size can occur.
            top = int(rng.integers(height - size + 1))
            left = int(rng.integers(width - size + 1))
            flip = bool(rng.integers(2))
        rows = slice(top, top + size)
        columns = slice(left, left + size)
        crop = image[rows, columns]
        # The mean is that of the same place, so it is flipped as well.
        mean = self.mean if per_channel else self.mean[:, rows, columns]
        if flip:
            crop, mean = crop[:, ::-1], mean[:, :, ::-1]
        result = numpy.empty((3, size, size), numpy.float32)
        for channel, plane in enumerate(result):
            # one plane after the other: reading across channels is several times slower
            numpy.subtract(crop[:, :, channel], mean[channel], out=plane, dtype=numpy.float32)
            plane *= numpy.float32(1 / 255)
        return result
