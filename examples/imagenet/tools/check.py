#!/usr/bin/env python
"""Checks the images and labels of a list, and prints a table of what is wrong.

    python examples/imagenet/tools/check.py train.txt -R images --classes 1000

Every image is decoded. Exit status 0: nothing is wrong; 1: something is; 2: the check could not be
made. Images found good are remembered in LIST.checked with size and time, so that an interrupted
check continues, and the next one decodes only what has changed.
"""

from __future__ import annotations

import collections
import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.decoding import Size, read_image
from datasets.labeled import allowed_labels, parse_line, read_lines
from errors import InputError
from files import write_text
from parallel import in_parallel

from tools.common import Parser, integer, print_table, progress, require_folder, run

SAVE_EVERY = 30.0
"""Seconds between two savings of what was found good."""


class Problem(NamedTuple):
    """A line of the table."""

    line: int
    path: str
    label: str
    problem: str


Entry = tuple[int, str, int]
"""Line number, path, label."""


def read_entries(path: Path, n_classes: int | None) -> tuple[list[Entry], list[Problem]]:
    """Reads a list; a line that is no path and label, or whose label is not allowed, is a problem.

    Labels of a list are also expected to be distinct images: a path given twice is a problem.
    """
    entries: list[Entry] = []
    problems: list[Problem] = []
    first: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            name, label = parse_line(line)
        except ValueError:
            problems.append(Problem(number, line.strip()[:60], "", "not a path and a label"))
            continue
        entries.append((number, name, label))
        if label < 0 or (n_classes is not None and label >= n_classes):
            allowed = f"label out of range; allowed are {allowed_labels(n_classes)}"
            problems.append(Problem(number, name, str(label), allowed))
        if first.setdefault(name, number) != number:
            problems.append(Problem(number, name, str(label), f"twice: also line {first[name]}"))
    return entries, problems


class Journal:
    """The images that were found good, by path: bytes, time of change, width and height."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self.root = str(root.resolve())
        self.good: dict[str, list[int]] = {}
        self._saved = time.monotonic()
        try:
            found = json.loads(path.read_text())
            if found["root"] == self.root:
                self.good = found["good"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or not ours: everything is checked

    def save(self, now: bool = False) -> None:
        """Writes the journal if the last time is long ago; a read-only folder gets none."""
        if not now and time.monotonic() - self._saved < SAVE_EVERY:
            return
        try:
            write_text(self.path, json.dumps({"root": self.root, "good": self.good}))
        except InputError as e:
            if now:
                print(f"check.py: warning: {e}", file=sys.stderr)
        self._saved = time.monotonic()


def check(args: Namespace) -> int:
    """Checks a list; returns the exit status."""
    root = require_folder(args.root, "--root")
    entries, problems = read_entries(args.list, args.classes)
    if not entries and not problems:
        raise InputError(
            f"list file {args.list}: no images in it; give a file with a path and a label on each line"
        )
    journal = Journal(args.list.with_name(args.list.name + ".checked"), root)

    def examine(entry: Entry) -> list[int]:
        path = root / entry[1]
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            raise InputError(f"image {path}: no such file") from None
        known = journal.good.get(entry[1])
        if known is None or known[:2] != [status.st_size, status.st_mtime_ns]:
            height, width = read_image(path).shape[:2]
            known = [status.st_size, status.st_mtime_ns, width, height]
        return known

    n_good = 0
    sizes: set[Size] = set()
    try:
        done = in_parallel(examine, entries, args.workers)
        for (number, name, label), result in progress(done, total=len(entries), unit="image"):
            if isinstance(result, InputError):
                text = str(result).removeprefix(f"image {root / name}: ").split("; replace")[0]
                problems.append(Problem(number, name, str(label), text))
                continue
            n_good += 1
            journal.good[name] = result
            journal.save()
            width, height = result[2:]
            sizes.add((width, height))
            if min(width, height) < args.insize:
                problems.append(Problem(number, name, str(label),
                                        f"{width}x{height} is less than --insize"))  # fmt: skip
    finally:
        journal.save(now=True)
    _summarize(args, entries, n_good, sizes)
    problems.sort()
    if problems:
        print_table(Problem._fields, problems[: args.show] if args.show else problems)
        if args.show and len(problems) > args.show:
            print(f"... and {len(problems) - args.show} more (--show 0 shows all)")
    if args.json:
        write_text(args.json, json.dumps([p._asdict() for p in problems], indent=1) + "\n")
    print(f"{args.list}: {len(entries)} images, {len(problems)} problems")
    return 1 if problems else 0


def _summarize(args: Namespace, entries: list[Entry], n_good: int, sizes: set[Size]) -> None:
    counts = collections.Counter(label for _, _, label in entries)
    if counts:
        print(f"{len(counts)} classes of {min(counts.values())} to {max(counts.values())} images, "
              f"labels {min(counts)} to {max(counts)}; {n_good} images decode")  # fmt: skip
    missing = sorted(set(range(args.classes or 0)) - set(counts))
    if missing:
        print(f"{len(missing)} classes have no image, first: {', '.join(map(str, missing[:8]))}")
    if sizes:
        widths, heights = zip(*sizes, strict=True)
        if len(sizes) == 1:
            print(f"all of {widths[0]}x{heights[0]} pixels")
            return
        print(f"{len(sizes)} different sizes, {min(widths)} to {max(widths)} wide, "
              f"{min(heights)} to {max(heights)} high")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("list", type=Path, help="list file: a path and a label on each line")
    add("--root", "-R", type=Path, default=Path("."), metavar="DIR",
        help="folder of the paths in the list (default: here)")
    add("--classes", "-n", type=integer(1), metavar="N", help="labels must be below N")
    add("--insize", type=integer(0), default=0, metavar="PIXELS",
        help="images with fewer pixels on a side are a problem")
    add("--show", type=integer(0), default=50, metavar="N",
        help="rows of the table (default %(default)s; 0: all)")
    add("--json", type=Path, metavar="FILE", help="write the table to this file as well")
    # fmt: on
    parser.add_workers()
    args = parser.parse_args(argv)
    return run(lambda: check(args))


if __name__ == "__main__":
    sys.exit(main())
