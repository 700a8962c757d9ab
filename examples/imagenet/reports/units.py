"""Numbers of bytes and seconds as a person reads them, and files that are whole or not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from chainer_ooc.report.whole import replacing

GIB = 1 << 30


def megabytes(n: float) -> str:
    """Formats a number of bytes in MiB."""
    return f"{n / (1 << 20):,.0f} MiB"


def gibibytes(n: float) -> str:
    """Formats a number of bytes in GiB with three significant digits, or in MiB below 1 GiB."""
    if n < GIB:
        return megabytes(n)
    value = n / GIB
    return f"{value:,.{max(0, 2 - len(str(int(value))) + 1)}f} GiB"


def duration(seconds: float) -> str:
    """Formats a time: ``4.2 s``, ``3 min 05 s``, ``2 h 04 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """Lets ``write`` fill a binary file that appears under its name only when it is complete."""
    with replacing(path) as partial, open(partial, "wb") as f:
        write(f)
