"""An iteration costs the host no more calls of CUDA and of Python than ``costs.json`` says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment_of_children

TABLE = json.loads(Path(__file__).with_name("costs.json").read_text())
#: What the numbers may be above the table's: a share, and calls.
SHARE, CALLS = 0.03, 4


@pytest.fixture(scope="module")
def costs():
    """The costs as measured, in a process of its own."""
    script = Path(__file__).with_name("costs.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        env=environment_of_children(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", TABLE)
def test_no_more_than_it_was(costs, mode):
    """Plans depend on times, so that copies are more or fewer: the table has a fixed part, and one for each copy."""
    measured = costs[mode]
    allowed = {
        what: fixed + each * measured["copies"] for what, (fixed, each) in TABLE[mode].items()
    }
    over = {
        what: f"{measured[what]}, not {most:.0f}"
        for what, most in allowed.items()
        if measured[what] > most * (1 + SHARE) + CALLS
    }
    assert not over, f"with {measured['copies']} copies"


def test_something_is_measured(costs):
    assert costs["stock Chainer"]["kernels"] == costs["all fits"]["kernels"]
    assert costs["half the memory, by plan"]["copies"] > 20
    assert costs["all fits"]["copies"] == 0
