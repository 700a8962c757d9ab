#!/usr/bin/env python
"""Computes the mean image of a list of equally large images, or the mean of each channel.

    python examples/imagenet/compute_mean.py train.txt -R images -o mean.npy

prints the mean and the standard deviation of each channel as well (--stats writes them to a JSON
file). The sums are kept in float64, where they are exact: the mean of a million images is as good
as that of ten, and does not depend on the number of workers. An interrupted run continues.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
from datasets.labeled import Enlarged, LabeledImages, Source, read_list
from datasets.resizing import parse_size
from datasets.statistics import collect, save_mean
from errors import InputError
from files import write_text
from tools.common import Parser, progress


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2: an input cannot be used)."""
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("dataset", help="list file: a path and a label on each line")
    add("--root", "-R", default=".", help="folder of the paths in the list")
    add("--output", "-o", default="mean.npy", help="the file to write")
    add("--enlarge", metavar="WIDTHxHEIGHT",
        help="resize the images to this size first, as train.py --enlarge does")
    add("--per-channel", action="store_true",
        help="write one value per channel, shape (3,); the images may have any sizes")
    add("--stats", metavar="FILE", help="write mean and standard deviation of each channel (JSON)")
    # fmt: on
    parser.add_workers()
    args = parser.parse_args(argv)
    output = Path(args.output)
    try:
        if not output.parent.is_dir():
            raise InputError(f"--output {output}: there is no folder {output.parent}; create it")
        source: Source = LabeledImages(read_list(args.dataset), args.root)
        if args.enlarge:
            source = Enlarged(source, parse_size(args.enlarge, "--enlarge"))
        sums = collect(
            source,
            mean_image=not args.per_channel,
            workers=args.workers,
            progress=progress,
            resume=output.with_name(output.name + ".partial"),
        )
        mean = sums.mean.astype(numpy.float32) if args.per_channel else sums.mean_image
        save_mean(output, mean)
        if args.stats:
            values = {"mean": list(sums.mean), "std": list(sums.std), "images": sums.n_images}
            write_text(Path(args.stats), json.dumps(values) + "\n")
    except InputError as e:
        print(f"compute_mean.py: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncompute_mean.py: interrupted; the same command continues", file=sys.stderr)
        return 130
    text = "; ".join(
        f"{name} {', '.join(f'{value:.2f}' for value in values)}"
        for name, values in (("mean", sums.mean), ("standard deviation", sums.std))
    )
    print(f"{output}: {sums.n_images} images, shape {mean.shape}, per channel {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
