"""Text of others in Markdown: shown as it is, whatever it contains."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["block", "plain"]

# What begins something in CommonMark, and in GitHub's tables, strikethroughs and formulas. An underscore between
# letters does not.
_SPECIAL = re.compile(r"[\\`*\[\]<&|~#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def plain(text: object) -> str:
    """Return Markdown, for within a line, that shows a text, its white space as single spaces."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(_visible(str(text), str.isspace).split()))


def block(text: str, language: str = "") -> str:
    """Return a block of code that shows a text; no line of it can end the block."""
    runs = re.findall("`+", text)
    fence = "`" * max(3, 1 + max(map(len, runs), default=0))
    lines = (_visible(line, "\t".__eq__).rstrip() for line in text.splitlines())
    return "\n".join([fence + language, *lines, fence])


def _visible(text: str, kept: Callable[[str], bool]) -> str:
    """Replace characters that are not seen, or steer a terminal or the direction of writing, by their codes."""
    return "".join(
        c if c.isprintable() or kept(c) else c.encode("unicode_escape").decode() for c in text
    )
