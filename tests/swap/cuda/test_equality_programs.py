"""Links, optimizers and what programs do with graphs, on the CUDA device's own code under random schedules."""

from __future__ import annotations

import gc

import pytest

import chainer_ooc
from chainer_ooc.testing import assert_same_bits
from tests.doubles.adopted_arrays import simulated_gpu
from tests.equality import test_links
from tests.equality.link_cases import LINKS
from tests.equality.test_programs import *  # noqa: F403  the programs, with the fixture below

MIB = 1 << 20


def check(program, seed, directory, single=False, moves=True):
    """Run a program on stock Chainer and on the simulated GPU, where all that is saved goes out at once."""
    expected = program()
    gc.collect()
    with simulated_gpu(seed, directory, 64 * MIB if seed % 2 else MIB) as machine:
        with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1, single_backward=single):
            actual = program()
        assert machine.calls["memcpyAsync"] or not moves
        assert_same_bits(actual, expected)
        del actual
        gc.collect()


#: Programs that hold all that could move.
ALL_IS_HELD = {"test_retain_grad"}
MANY = [pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(2, 12)]


@pytest.fixture(params=[0, 1, *MANY])
def equal(request, tmp_path):
    """Return a function that compares the bits; every other schedule drops after the last use."""

    def compare(program, once=True, moves=True):
        single = bool(request.param % 2)
        if single and not once:
            pytest.skip("backward runs more than once")
        held = request.node.originalname in ALL_IS_HELD
        check(program, request.param, str(tmp_path), single, moves and not held)

    return compare


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [0, *MANY])
@pytest.mark.parametrize("case", LINKS, ids=lambda case: case.name)
def test_links_and_their_statistics(case, seed, tmp_path):
    check(lambda: test_links.train(case), seed, str(tmp_path))


@pytest.mark.parametrize("seed", [1, *MANY])
@pytest.mark.parametrize("name", ["MomentumSGD", "Adam", "SMORMS3"])
def test_optimizers_with_hooks(name, seed, tmp_path):
    program = test_links.OPTIMIZERS[name]
    check(lambda: test_links.optimize(program), seed, str(tmp_path), single=True)
