"""The summary of a run: a few numbers, printed and in summary.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import out_of_core
from world import World

from reports.figures import Synchronize
from reports.history import History
from reports.units import GIB, megabytes, write_atomically


def summarize(
    history: History,
    synchronize: Synchronize,
    world: World,
    iterations_per_second: float | None,
    in_core_peak_bytes: int | None,
) -> dict[str, Any]:
    """Returns the summary of a run: what ``summary.json`` holds.

    ``bytes_out`` and ``bytes_in`` are of all ranks together; ``peak_bytes``,
    ``in_core_peak_bytes`` and ``limit_bytes`` are of one rank (the largest). Losses are means over
    the ranks of the first and last iteration. What was not measured is None.
    """
    return {
        "ranks": world.size,
        "iterations_per_second": iterations_per_second,
        "loss_first": history.loss_first,
        "loss_last": history.loss_last,
        "val_accuracy": history.validation[-1][2] if history.validation else None,
        "bytes_out": synchronize.bytes_out,
        "bytes_in": synchronize.bytes_in,
        "peak_bytes": synchronize.peak_bytes,
        "in_core_peak_bytes": in_core_peak_bytes,
        "limit_bytes": out_of_core.limit_bytes(),
    }


def print_summary(summary: dict[str, Any], out: Path) -> None:
    """Prints what was shown, in three lines, and where to look."""

    def number(key: str, form: str) -> str:
        return "-" if summary[key] is None else format(summary[key], form)

    def memory(key: str) -> str:
        return "-" if summary[key] is None else megabytes(summary[key])

    ranks = summary["ranks"]
    print(f"summary: {ranks} rank{'s' if ranks > 1 else ''}, "
          f"{number('iterations_per_second', '.3g')} iterations/s, "
          f"loss {number('loss_first', '.3f')} -> {number('loss_last', '.3f')}, "
          f"val accuracy {number('val_accuracy', '.3f')}")  # fmt: skip
    print(f"  memory   peak {memory('peak_bytes')} per rank; limit {memory('limit_bytes')}; "
          f"in core {memory('in_core_peak_bytes')}")  # fmt: skip
    print(f"  swapped  {summary['bytes_out'] / GIB:.2f} GiB out, "
          f"{summary['bytes_in'] / GIB:.2f} GiB in (all ranks)")  # fmt: skip
    if (advice := out_of_core.advice()) is not None:
        print(f"  rank 0   {advice}")
    print(f"  results  {out}: report.md, its plots, summary.json", flush=True)


def write_summary(summary: dict[str, Any], out: Path) -> None:
    """Writes summary.json to ``out``."""
    text = json.dumps(summary, indent=1) + "\n"
    write_atomically(out / "summary.json", lambda f: f.write(text.encode()))
