"""Random programs come out of core as they do on stock Chainer: bits, errors, output, exit status, nothing left."""

from __future__ import annotations

import pytest

from chainer_ooc.swap.devices.ram import native
from tests.differential.contest import Arena
from tests.differential.planted import PLANTED
from tests.differential.program import make_program

#: So many programs find each planted error, and take about a minute and a half on two cores.
FEW, MANY = 160, 5000

pytestmark = pytest.mark.skipif(native.allocator is None, reason="the C extension is not built")


def failures(seeds, **options):
    with Arena(**options) as arena:
        for _, failure in arena.failures(seeds):
            if failure is not None:
                yield arena.shrunk(failure, 60) if not options.get("plant") else failure


@pytest.mark.parametrize(
    "seeds",
    [
        *(range(start, start + 40) for start in range(0, FEW, 40)),
        *(
            pytest.param(range(start, start + 220), marks=pytest.mark.exhaustive)
            for start in range(FEW, MANY, 220)
        ),
    ],
    ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}",
)
def test_programs_are_those_of_stock(seeds):
    assert not [str(failure) for failure in failures(seeds)]


def test_the_program_of_a_seed_is_the_same_and_seeds_differ():
    assert make_program(3) == make_program(3)
    assert len({tuple(make_program(seed).steps) for seed in range(50)}) == 50


@pytest.mark.exhaustive
def test_stock_itself_is_deterministic():
    assert not [str(failure) for failure in failures(range(200), contender="stock")]


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(name, marks=() if name == "free by Python" else pytest.mark.exhaustive)
        for name in PLANTED
    ],
)
def test_a_planted_error_is_found(plant):
    for start in range(0, FEW, 8):
        if any(failures(range(start, start + 8), plant=plant)):
            return
    pytest.fail(f"{FEW} programs do not find it")
