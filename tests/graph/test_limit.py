"""The limit: measured by the system, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

CHILD = Path(__file__).with_name("limit_child.py")

pytestmark = pytest.mark.extension  # without it: test_unannounced.py


class Result(NamedTuple):
    peak: int
    digest: str
    bytes_out: int
    bytes_in: int
    reported_peak: int


@pytest.fixture
def run(run_python):
    def run(*arguments):
        done = run_python(CHILD, *arguments, timeout=300)
        assert done.returncode == 0, done.stderr
        assert (
            "RuntimeWarning" not in done.stderr
        )  # an error in the child, or told there, if it is ours
        peak, digest, *numbers = done.stdout.split()
        return Result(int(peak), digest, *map(int, numbers))

    return run


def test_a_deep_convnet_at_half_of_its_in_core_peak_stays_under_the_limit(run):
    in_core = run("none")
    limit = in_core.peak // 2
    twice = run(limit)
    assert twice.digest == in_core.digest
    assert twice.peak <= 1.02 * limit
    assert abs(twice.reported_peak - twice.peak) < 1 << 20
    assert twice.bytes_in > in_core.peak // 4
    once = run(limit, "single_backward=1")
    assert once.digest == in_core.digest
    assert once.peak <= 1.02 * limit
    assert once.bytes_out <= twice.bytes_out
    # What is fetched ahead does not have to make room for the next function, and come again.
    assert once.bytes_in <= 1.1 * once.bytes_out


def test_with_room_enough_nothing_moves(run):
    in_core = run("none")
    roomy = run(2 * in_core.peak)
    assert (roomy.bytes_out, roomy.bytes_in) == (0, 0)
    assert roomy.digest == in_core.digest


def test_what_cannot_fit_is_one_warning_or_with_strict_an_error(run_python):
    done = run_python(CHILD, "56MiB", env={"PYTHONWARNINGS": "default"})
    assert done.returncode == 0, done.stderr  # though warnings are errors in the child
    assert done.stderr.count("RuntimeWarning: ") == 1
    done = run_python(CHILD, "56MiB", "strict=1")
    assert done.returncode
    last = done.stderr.strip().splitlines()[-1]
    assert "OutOfMemoryError: Convolution2DFunction((1, 3, 192, 192), (16, 3, 3, 3), (16,))" in last
    assert "limit=" in last
