#!/usr/bin/env python
"""Computes the mean image of a list of equally large images.

    python examples/imagenet/compute_mean.py train.txt -R images -o mean.npy

The sum is kept in float64, so the mean of a million images is as good as that of ten.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy
from datasets.labeled import LabeledImages, read_list
from errors import InputError
from tqdm import tqdm


def compute_mean(images: LabeledImages, indices: Iterable[int] | None = None) -> numpy.ndarray:
    """Returns the mean of the images, float32 of shape (3, height, width).

    Args:
        images: The images; all must have one size.
        indices: Which of them, in this order (tqdm may wrap them); None: all.

    Raises:
        InputError: An image cannot be read or its size differs from the first one's.
    """
    total: numpy.ndarray | None = None
    count = 0
    for i in range(len(images)) if indices is None else indices:
        image, _ = images[i]
        if total is None:
            total = numpy.zeros(image.shape, dtype=numpy.float64)
        elif image.shape != total.shape:
            raise InputError(
                f"image {images.path(i)}: {image.shape[1]}x{image.shape[0]} pixels, but the first "
                f"image has {total.shape[1]}x{total.shape[0]}; resize the images to one size"
            )
        total += image
        count += 1
    if total is None:
        raise InputError("the list has no images")
    return (total / count).transpose(2, 0, 1).astype(numpy.float32)


def save_mean(path: Path, mean: numpy.ndarray) -> None:
    """Writes ``mean`` to exactly ``path``, which appears only when it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as f:
            numpy.save(f, mean)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2: an input cannot be used)."""
    parser = argparse.ArgumentParser(description="Compute the mean image of a list of images")
    parser.add_argument("dataset", help="list file: a path and a label on each line")
    parser.add_argument("--root", "-R", default=".", help="folder of the paths in the list")
    parser.add_argument("--output", "-o", default="mean.npy", help="the file to write")
    args = parser.parse_args(argv)
    output = Path(args.output)
    try:
        if not output.parent.is_dir():
            raise InputError(f"--output {output}: there is no folder {output.parent}; create it")
        images = LabeledImages(read_list(args.dataset), args.root)
        mean = compute_mean(images, tqdm(range(len(images)), unit="image"))
        save_mean(output, mean)
    except InputError as e:
        print(f"compute_mean.py: error: {e}", file=sys.stderr)
        return 2
    channels = ", ".join(f"{value:.2f}" for value in mean.mean(axis=(1, 2)))
    print(f"{output}: mean of {len(images)} images, shape {mean.shape}, per channel {channels}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
