"""Show figures as short tables: aligned text for terminals, HTML for notebooks."""

from __future__ import annotations

import dataclasses
import html
import textwrap
from collections.abc import Iterator, Sequence

__all__ = ["Shown", "Table", "format_bytes", "format_seconds"]

#: Paragraphs are wrapped at this many columns.
_WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        rows: The rows, each with one text per column.
        align: One character for each column: ``"<"`` for words, ``">"`` for numbers.
        head: The names of the columns; empty for a table without.
    """

    rows: Sequence[Sequence[str]]
    align: str
    head: Sequence[str] = ()

    def __str__(self) -> str:
        shown = [self.head, *self.rows] if self.head else self.rows
        width = [max(map(len, column)) for column in zip(*shown, strict=True)]
        lines = (zip(row, self.align, width, strict=True) for row in shown)
        return "\n".join("  ".join(f"{t:{a}{w}}" for t, a, w in line).rstrip() for line in lines)

    def to_html(self) -> str:
        """Return the table as HTML, with every text shown literally."""
        head = f"<thead>{self._row(self.head, 'th')}</thead>" if self.head else ""
        rows = "".join(self._row(row, "td") for row in self.rows)
        return f"<table>{head}<tbody>{rows}</tbody></table>"

    def _row(self, texts: Sequence[str], tag: str) -> str:
        side = {"<": "left", ">": "right"}
        cells = (
            f'<{tag} style="text-align:{side[align]};white-space:pre-wrap">{html.escape(text)}</{tag}>'
            for text, align in zip(texts, self.align, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"


class Shown:
    """What ``print()`` shows as paragraphs and tables, and a notebook as HTML."""

    def _blocks(self) -> Iterator[str | Table]:
        """Yield the paragraphs and the tables."""
        raise NotImplementedError

    def __str__(self) -> str:
        fill = textwrap.TextWrapper(_WIDTH, break_long_words=False, break_on_hyphens=False).fill
        return "\n\n".join(fill(b) if isinstance(b, str) else str(b) for b in self._blocks())

    def _repr_html_(self) -> str:
        return "".join(
            f"<p>{html.escape(b)}</p>" if isinstance(b, str) else b.to_html()
            for b in self._blocks()
        )


def format_bytes(nbytes: float) -> str:
    """Return a number of bytes as text with a binary unit."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """Return a time as text."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.0f} us" if seconds else "0 s"
