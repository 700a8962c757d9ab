"""Counts what the cases moved, and prints it at the end."""

from __future__ import annotations

import pytest

_totals = {"cases": 0, "moved": 0, "bytes": 0}


@pytest.fixture
def moved_bytes():
    """Return a function to be called with what a case moved."""

    def count(moved):
        _totals["cases"] += 1
        _totals["moved"] += moved.bytes_in > 0
        _totals["bytes"] += moved.bytes_in

    return count


def pytest_terminal_summary(terminalreporter):
    if _totals["cases"]:
        terminalreporter.write_line(
            "equality: {cases} cases, {moved} that moved bytes, {bytes:,} bytes came back".format(
                **_totals
            )
        )
