#!/usr/bin/env python
"""Makes lists of some of the classes, relabelled from 0, such as a mini-ImageNet of 16 classes.

    python examples/imagenet/tools/make_mini.py train.txt val.txt -n 16

writes train016.txt and val016.txt beside them: the names that `nclasses: 16` stands for in a
configuration. The classes are chosen by --seed, and the same ones are taken of all lists. With
--classes FILE (the names of the classes, one on each line) it writes classes016.txt as well.
"""

from __future__ import annotations

import collections
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
from datasets.labeled import Pair, read_lines, read_list
from errors import InputError
from files import write_text

from tools.common import Parser, integer, make_folder, progress, run


def choose(labels: set[int], n: int, seed: int) -> dict[int, int]:
    """Returns the new label, from 0, of each of ``n`` classes, which keep their order.

    Raises:
        InputError: There are fewer classes.
    """
    if n > len(labels):
        raise InputError(f"-n {n}: the lists have only {len(labels)} classes in common")
    chosen = numpy.random.default_rng(seed).choice(sorted(labels), n, replace=False)
    return {int(old): new for new, old in enumerate(sorted(chosen))}


def first_of_each(pairs: list[Pair], n: int) -> list[Pair]:
    """Returns the first ``n`` images of each class."""
    seen: collections.Counter[int] = collections.Counter()
    kept = []
    for name, label in pairs:
        seen[label] += 1
        if seen[label] <= n:
            kept.append((name, label))
    return kept


def make_mini(args: Namespace) -> int:
    """Writes the lists; returns the exit status."""
    lists: dict[Path, list[Pair]] = {path: read_list(path) for path in args.list}
    new = choose(
        set.intersection(*({label for _, label in pairs} for pairs in lists.values())),
        args.n,
        args.seed,
    )
    for path, pairs in progress(lists.items(), unit="list"):
        kept = [(name, new[label]) for name, label in pairs if label in new]
        if args.per_class:
            kept = first_of_each(kept, args.per_class)
        output = make_folder(args.output or path.parent, "--output")
        target = output / f"{path.stem}{args.n:03d}{path.suffix}"
        write_text(target, "".join(f"{name} {label}\n" for name, label in kept))
        print(f"{target}: {len(kept)} images of {args.n} classes")
    if args.classes:
        names = read_lines(args.classes)
        if len(names) <= max(new):
            raise InputError(f"--classes {args.classes}: has no name for class {max(new)}")
        target = (args.output or args.classes.parent) / f"{args.classes.stem}{args.n:03d}.txt"
        write_text(target, "".join(f"{names[old]}\n" for old in new))
        print(f"{target}: {', '.join(names[old] for old in list(new)[:8])}"
              + (" ..." if len(new) > 8 else ""))  # fmt: skip
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("list", type=Path, nargs="+", help="list files, such as train.txt and val.txt")
    add("-n", type=integer(1), required=True, metavar="N",
        help="number of classes: 8, 16 and 32 are usual")
    add("--seed", type=integer(0), default=0, metavar="N", help="chooses the classes (default 0)")
    add("--per-class", type=integer(1), metavar="N", help="only the first N images of each class")
    add("--classes", type=Path, metavar="FILE", help="names of the classes, from make_list.py")
    add("--output", "-o", type=Path, metavar="DIR", help="default: beside each list")
    # fmt: on
    args = parser.parse_args(argv)
    return run(lambda: make_mini(args))


if __name__ == "__main__":
    sys.exit(main())
