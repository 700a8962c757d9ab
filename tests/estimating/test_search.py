"""The largest size that fits, whatever memory grows like, in few trials."""

from __future__ import annotations

import pytest

from chainer_ooc.estimating.search import Fits, largest

GROWTH = {
    "linear": lambda n: 1000 + 37 * n,
    "quadratic": lambda n: 5000 + 3 * n * n,
    "cubic": lambda n: n**3,
    "steps": lambda n: 1000 * (n // 7) + 10 * n,
    "two lines": lambda n: max(900 + 10 * n, 60 * n),
    "constant": lambda n: 10,
}


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize(
    ("start", "multiple", "power"), [(1, 1, 1), (50, 1, 1), (224, 32, 2), (30, 32, 2)]
)
def test_largest(growth, start, multiple, power):
    takes, limit = GROWTH[growth], 100_000
    tried = []

    def trial(size):
        tried.append(size)
        # Out of core takes half, but never less than 60000.
        return Fits(takes(size), max(takes(size) // 2, 60_000))

    here = trial(start)
    found = largest(trial, start, here, limit, multiple, power)
    assert len(tried) <= 42
    for key, need in (("in_core", takes), ("out_of_core", lambda n: takes(n) // 2)):
        if growth == "constant":
            assert found[key] >= 1000 * start  # no end: it stops
            continue
        best = max(n for n in (start, *range(multiple, 25_000, multiple)) if need(n) <= limit)
        smooth = growth in ("linear", "quadratic", "cubic")
        assert (best if smooth else 0.98 * best) <= found[key] <= best


def test_a_larger_size_that_is_not_allowed_is_a_bound():
    found = largest(lambda n: Fits(n, n) if n <= 700 else None, 64, Fits(64, 64), 1000, 1, 1)
    assert 690 <= found["in_core"] <= 700


def test_nothing_fits():
    found = largest(lambda n: Fits(500 + n, 10 + n), 64, Fits(564, 74), 100, 1, 1)
    assert found == {"in_core": None, "out_of_core": 90}
