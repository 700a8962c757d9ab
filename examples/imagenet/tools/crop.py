#!/usr/bin/env python
"""Scales images so that their short side has 256 pixels, and crops the 256 x 256 in the middle.

python examples/imagenet/tools/crop.py images cropped
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
from datasets.decoding import read_image
from datasets.resizing import centre_crop, scale_short_side

from tools.common import Parser, integer, run
from tools.converting import add_arguments, convert


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser(__doc__)
    add_arguments(parser)
    # fmt: off
    parser.add_argument("--size", "-s", type=integer(1), default=256, metavar="PIXELS",
                        help="side of the crops (default %(default)s)")
    parser.add_argument("--full-decode", action="store_true",
                        help="decode every pixel of large JPEG files; the default is a few times "
                        "faster, and differs by one to three levels of 255 on average")
    # fmt: on
    args = parser.parse_args(argv)
    # Twice the size leaves the bicubic filter enough to choose from.
    need = None if args.full_decode else lambda width, height: (2 * args.size, 2 * args.size)

    def change(path: Path) -> numpy.ndarray:
        return centre_crop(scale_short_side(read_image(path, need), args.size), args.size)

    settings = {"tool": "crop", "size": args.size, "full_decode": args.full_decode}
    return run(lambda: convert(args, settings, change))


if __name__ == "__main__":
    sys.exit(main())
