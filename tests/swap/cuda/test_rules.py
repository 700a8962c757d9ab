"""The simulated GPU keeps the rules that are tested on real ones."""

from __future__ import annotations

import pytest

from tests.doubles.simulated_cuda import SimulatedCuda
from tests.swap.cuda.rules import RULES, Bench


@pytest.fixture
def bench():
    cupy = SimulatedCuda(total=1 << 20, devices=2)
    cupy.eagerness = 0  # what is not waited for is not done

    def spin(stream):
        cupy.kernel("a kernel that takes long", [], [], queue=stream.queue)

    yield Bench(cupy, spin, lambda array, value: array.add(value))
    cupy.synchronize()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule, bench):
    rule(bench)
