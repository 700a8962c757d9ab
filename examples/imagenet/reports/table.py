"""The table of the log that rank 0 prints."""

from __future__ import annotations

import sys
import textwrap
from typing import Any

from chainer import training
from tqdm import tqdm

from reports import terminal

COLUMNS = {
    "epoch": "epoch",
    "iteration": "iter",
    "main/loss": "loss",
    "validation/main/loss": "val loss",
    "main/accuracy": "acc",
    "validation/main/accuracy": "val acc",
    "lr": "lr",
    "images/s": "images/s",
    "swapped GiB": "swap GiB",
    "peak GiB": "peak GiB",
}
"""Entries of the log that are shown, and their names where the terminal is narrow."""


class Table(training.Extension):
    """Prints a line for each new entry of the log.

    The names of the columns are those of the log. On a terminal too narrow for them the short
    ones stand in, and where even these do not fit each entry is wrapped text.

    Args:
        log: Name of the LogReport extension.
    """

    name = "Table"

    def __init__(self, log: str = "LogReport") -> None:
        self._log_name = log
        self._printed = 0
        self._heading: str | None = None

    def __call__(self, trainer: training.Trainer) -> None:
        """Prints what is new."""
        log = trainer.get_extension(self._log_name).log
        for entry in log[self._printed :]:
            for line in self._lines(entry, terminal.columns()):
                tqdm.write(line, file=sys.stdout)
        self._printed = len(log)
        sys.stdout.flush()

    def _lines(self, entry: dict[str, Any], width: int | None) -> list[str]:
        short = tuple(COLUMNS.values())
        for names, least, gap, digits in ((tuple(COLUMNS), 7, 2, 4), (short, 6, 1, 3)):
            widths = [max(len(name), least) for name in names]
            if width is not None and sum(widths) + gap * (len(names) - 1) >= width:
                continue
            texts = [_text(entry.get(key), digits) for key in COLUMNS]
            heading, row = (
                (" " * gap).join(map(str.ljust, cells, widths)).rstrip() for cells in (names, texts)
            )
            new, self._heading = heading != self._heading, heading
            return [heading, row] if new else [row]
        words = [f"{short} {_text(entry[key])}" for key, short in COLUMNS.items() if key in entry]
        glued = ", ".join(word.replace(" ", "\xa0") for word in words)
        wrapped = textwrap.wrap(glued, max(20, width - 1), subsequent_indent="  ")
        return [line.replace("\xa0", " ") for line in wrapped]

    def serialize(self, serializer: Any) -> None:
        """Saves or loads how much of the log has been printed."""
        self._printed = int(serializer("printed", self._printed))


def _text(value: Any, digits: int = 4) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def print_report() -> Table:
    """Returns the extension that prints the table of the log."""
    return Table()
