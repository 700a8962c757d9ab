#!/usr/bin/env python
"""Resizes images to exactly one size, whatever that does to their aspect ratio.

    python examples/imagenet/tools/enlarge.py images large --size 2560x2560

does what `convert INFILE -resize 2560x2560! OUTFILE` does to each image, with the same filter, and
turns photographs upright. Instead of writing large files, `train.py --enlarge 2560x2560` enlarges
the images when it reads them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
from datasets.decoding import read_image
from datasets.resizing import FILTERS, parse_size, resize

from tools.common import Parser, run
from tools.converting import add_arguments, convert


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser(__doc__)
    add_arguments(parser)
    # fmt: off
    parser.add_argument("--size", "-s", default="2560x2560", metavar="WIDTHxHEIGHT",
                        help="new size in pixels (default %(default)s)")
    parser.add_argument("--filter", "-f", choices=FILTERS, default="imagemagick",
                        help="default imagemagick: Mitchell's cubic to enlarge, Lanczos to shrink")
    # fmt: on
    args = parser.parse_args(argv)

    def enlarge() -> int:
        size = parse_size(args.size)

        def change(path: Path) -> numpy.ndarray:
            return resize(read_image(path), size, args.filter)

        settings = {"tool": "enlarge", "size": list(size), "filter": args.filter}
        return convert(args, settings, change)

    return run(enlarge)


if __name__ == "__main__":
    sys.exit(main())
