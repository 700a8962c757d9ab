"""One activation's way through the code: which functions one sigmoid calls, forward and backward.

    python benchmarks/activation_path.py [--calls] [--svg FILE]

Everything moves (``swap_all``). Counted are the calls in chainer_ooc's own files, how many files they are in, and how
often one file calls into another. ``--calls`` prints every call, indented by its depth;
``--svg`` draws the way forward.
"""

from __future__ import annotations

import argparse
import html
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import chainer
import chainer.functions as F
import numpy as np

import chainer_ooc

ROOT = os.path.dirname(chainer_ooc.__file__) + os.sep


class Call(NamedTuple):
    """A call: how deep it is among ours, in which file, of which function."""

    depth: int
    file: str
    name: str


def calls_of(run: Callable[[], Any]) -> list[Call]:
    """Return the calls of functions of chainer_ooc while ``run`` runs in this thread."""
    found: list[Call] = []
    depth = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal depth
        path = frame.f_code.co_filename
        if path.startswith(ROOT):
            if event == "call":
                found.append(Call(depth, path.removeprefix(ROOT), frame.f_code.co_qualname))
            depth += {"call": 1, "return": -1}.get(event, 0)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def changes(found: list[Call]) -> int:
    """Return how often the next call is in another file."""
    return sum(a.file != b.file for a, b in itertools.pairwise(found))


def measure(functions: int) -> dict[str, list[Call]]:
    """Return the calls of so many sigmoids, forward and backward, when others have run before."""
    x = chainer.Variable(np.ones((64, 1 << 14), "f"))

    def chain() -> Any:
        h = x * 1.0
        for _ in range(functions):
            h = F.sigmoid(h)
        return h

    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1, limit="1TiB"):
        F.sum(chain()).backward()  # what runs once has run
        h = x * 1.0
        forward = calls_of(lambda: F.sigmoid(h))
        y = F.sum(chain())
        y.grad = np.ones((), "f")
        backward = calls_of(y.backward)
    return {"one function forward": forward, f"{functions + 2} functions backward": backward}


def draw(found: list[Call]) -> str:
    """Return the way as SVG: a column for each file, a row for each call."""
    files = list(dict.fromkeys(call.file for call in found))
    column, row, left, top = 66, 15, 10, 118
    width, height = left + column * len(files) + 190, top + row * len(found) + 10
    at = [(left + column * files.index(c.file) + 20, top + row * n) for n, c in enumerate(found)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for n, file in enumerate(files):
        x = left + column * n + 20
        parts.append(f'<line x1="{x}" y1="{top - 12}" x2="{x}" y2="{height - 8}" stroke="#ddd"/>')
        turned = f'transform="rotate(-35 {x} {top - 18})"'
        parts.append(
            f'<text x="{x}" y="{top - 18}" font-size="11" {turned}>{html.escape(file)}</text>'
        )
    style = 'font-size="10" stroke="white" stroke-width="3" paint-order="stroke"'
    points = " ".join(f"{x},{y}" for x, y in at)
    parts.append(f'<polyline points="{points}" fill="none" stroke="#4477aa" stroke-width="1.2"/>')
    for (x, y), call in zip(at, found, strict=True):
        name = html.escape(call.name.rpartition("<locals>.")[2])
        parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="#4477aa"/>')
        parts.append(f'<text x="{x + 6}" y="{y + 3.5}" {style}>{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--calls", action="store_true", help="print every call")
    parser.add_argument("--svg", type=Path, help="draw the way forward into this file")
    arguments = parser.parse_args()
    print("| | calls | files | changes of file |\n|---|---:|---:|---:|")
    ways = measure(2)
    for name, found in ways.items():
        print(f"| {name} | {len(found)} | {len({c.file for c in found})} | {changes(found)} |")
    if arguments.svg is not None:
        arguments.svg.write_text(draw(next(iter(ways.values()))))
    for name, found in ways.items() if arguments.calls else ():
        print(f"\n{name}")
        for call in found:
            print(f"{'  ' * call.depth}{call.name}  ({call.file})")


if __name__ == "__main__":
    main()
