#!/usr/bin/env python
"""Writes the list files of a folder that has a folder of images for each class.

    python examples/imagenet/tools/make_list.py photos --output lists --val 0.1

Classes are numbered in the order of their folders' names. Where the folder has `train` and
`val` folders, each of them makes its own list; otherwise the part `--val` of each class,
chosen by `--seed`, goes to the validation list. Writes OUTPUT/train.txt and OUTPUT/val.txt (a path
below the folder and a label on each line: give the folder to train.py as --root) and
OUTPUT/classes.txt (the name of class 0 on the first line, and so on). A validation set whose images
are not in class folders, such as ImageNet's, needs --val-labels: a file with the name of an image
and that of its class on each line.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
from datasets.folders import class_folders, class_images, find_images
from errors import InputError, is_utf8
from files import write_text
from parallel import in_parallel

from tools.common import (
    Parser,
    fraction,
    integer,
    make_folder,
    progress,
    require_folder,
    run,
)

ByClass = dict[str, list[str]]
"""Names of images, relative to the root, of each class."""


def _scan(folder: Path, prefix: Path, workers: int, skip_empty: bool) -> ByClass:
    def images(name: str) -> list[str]:
        return [str(prefix / path) for path in class_images(folder, name)]

    classes = class_folders(folder)
    found: ByClass = {}
    done = in_parallel(images, classes, workers)
    for name, result in progress(done, total=len(classes), desc=str(folder), unit="class"):
        if not isinstance(result, InputError):
            found[name] = result
        elif not skip_empty:
            raise result
    if not found:
        raise InputError(f"{folder}: none of its {len(classes)} classes has an image")
    return found


def _labelled(folder: Path, prefix: Path, path: Path) -> ByClass:
    """Returns the images that the file ``path`` assigns to classes."""
    found: ByClass = {}
    there = {str(p) for p in find_images(folder)}
    by_stem = {Path(name).stem: name for name in there}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        name, *rest = line.strip().rsplit(None, 1)
        name = name if name in there else by_stem.get(Path(name).stem, name)
        if not rest or name not in there:
            raise InputError(
                f"--val-labels {path} line {number}: {line.strip()[:80]!r} is not the name of an "
                f"image in {folder} and of its class"
            )
        found.setdefault(rest[0], []).append(str(prefix / name))
    return found


def _split(classes: ByClass, val: float, seed: int) -> tuple[ByClass, ByClass]:
    """Divides each class; both parts get an image of each class that has two or more."""
    train: ByClass = {}
    held: ByClass = {}
    for number, (name, images) in enumerate(classes.items()):
        n = round(len(images) * val)
        if val and len(images) > 1:
            n = min(max(n, 1), len(images) - 1)
        order = numpy.random.default_rng((seed, number)).permutation(len(images))
        held[name] = [images[i] for i in sorted(order[:n])]
        train[name] = [images[i] for i in sorted(order[n:])]
    return train, held


def _write(path: Path, classes: ByClass, labels: dict[str, int]) -> int:
    lines = []
    for name, images in classes.items():
        for image in images:
            if image != image.strip() or len(image.splitlines()) != 1 or not is_utf8(image):
                raise InputError(f"{image!r}: a list cannot hold this name; rename the file")
            lines.append(f"{image} {labels[name]}\n")
    write_text(path, "".join(lines))
    return len(lines)


def make_list(args: Namespace) -> int:
    """Writes the lists; returns the exit status."""
    folder = require_folder(args.folder, "folder")
    if all((folder / part).is_dir() for part in ("train", "val")):
        train = _scan(folder / "train", Path("train"), args.workers, args.skip_empty)
        if args.val_labels:
            val = _labelled(folder / "val", Path("val"), args.val_labels)
        else:
            val = _scan(folder / "val", Path("val"), args.workers, args.skip_empty)
        unknown = sorted(set(val) - set(train))
        if unknown:
            raise InputError(f"class {unknown[0]} is in val, but not in train of {folder}")
    elif args.val_labels:
        raise InputError(f"--val-labels {args.val_labels}: {folder} has no train and val folders")
    else:
        classes = _scan(folder, Path(), args.workers, args.skip_empty)
        train, val = _split(classes, args.val, args.seed)
    output = make_folder(args.output, "--output")
    labels = {name: label for label, name in enumerate(train)}
    n_train = _write(output / "train.txt", train, labels)
    n_val = _write(output / "val.txt", val, labels)
    write_text(output / "classes.txt", "".join(f"{name}\n" for name in labels))
    print(f"{output}: train.txt {n_train} images, val.txt {n_val}, classes.txt {len(labels)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("folder", type=Path, help="folder with a folder for each class")
    add("--output", "-o", type=Path, default=Path("."), metavar="DIR", help="default: here")
    add("--val", type=fraction, default=0.1, metavar="PART",
        help="part of each class to validate on (default %(default)s)")
    add("--seed", type=integer(0), default=0, metavar="N", help="of the split (default 0)")
    add("--val-labels", type=Path, metavar="FILE", help="classes of the images in FOLDER/val")
    add("--skip-empty", action="store_true", help="leave out classes without images")
    # fmt: on
    parser.add_workers()
    args = parser.parse_args(argv)
    return run(lambda: make_list(args))


if __name__ == "__main__":
    sys.exit(main())
