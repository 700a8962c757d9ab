"""Escape foreign text for Markdown, so that it is shown literally."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["block", "plain"]

# Characters with a meaning in CommonMark, and in GitHub's tables, strikethroughs and formulas. An underscore between
# letters has none.
_SPECIAL = re.compile(r"[\\`*\[\]<&|~#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def plain(text: object) -> str:
    """Return Markdown that shows a text inside a line, with white space as single spaces."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(_visible(str(text), str.isspace).split()))


def block(text: str, language: str = "") -> str:
    """Return a code block that shows a text. No line of the text can end the block."""
    runs = re.findall("`+", text)
    fence = "`" * max(3, 1 + max(map(len, runs), default=0))
    lines = (_visible(line, "\t".__eq__).rstrip() for line in text.splitlines())
    return "\n".join([fence + language, *lines, fence])


def _visible(text: str, kept: Callable[[str], bool]) -> str:
    """Replace invisible characters, and those that control a terminal or the direction of writing, by their codes."""
    return "".join(
        c if c.isprintable() or kept(c) else c.encode("unicode_escape").decode() for c in text
    )
