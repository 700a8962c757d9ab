"""The limit: measured by the system, in a process of its own."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import NamedTuple

import chainer.functions as F
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.errors import OutOfMemoryError
from chainer_ooc.swap.manager import SwapManager

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
        assert done.stderr == ""
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
    done = run_python(CHILD, "56MiB")
    assert done.returncode == 0, done.stderr  # though warnings are errors in the child
    assert done.stderr.startswith("chainer_ooc: ")
    assert done.stderr.count("\n") == 1
    done = run_python(CHILD, "56MiB", "strict=1")
    assert done.returncode
    last = done.stderr.strip().splitlines()[-1]
    assert "OutOfMemoryError: Convolution2DFunction((1, 3, 192, 192), (16, 3, 3, 3), (16,))" in last
    assert "limit=" in last
    assert last.endswith("; what runs later may need more.")  # in the first iteration


@pytest.mark.parametrize(("limit", "announced"), [(64 << 20, 128 << 10), (16 << 20, 64 << 10)])
def test_what_the_margin_does_not_hold_is_announced(monkeypatch, limit, announced):
    """Under a small limit that is little: what a function takes in arrays below a mebibyte counts."""
    asked = []
    make_room = SwapManager.make_room

    def asking(manager, nbytes):
        asked.append(nbytes)
        return make_room(manager, nbytes)

    monkeypatch.setattr(SwapManager, "make_room", asking)
    monkeypatch.setattr(state.process, "announced", None)  # what earlier tests have asked for
    state.unhook_allocations()
    with chainer_ooc.out_of_core_mode(limit=limit):
        F.exp(np.ones(1 << 20, np.float32))  # the interpreter alone is beyond the limit
        asked.clear()
        np.empty(announced - 64, np.uint8)
        assert not asked
        np.empty(announced, np.uint8)
        assert asked == [announced]
        with chainer_ooc.out_of_core_mode(limit=limit // 2):
            np.empty(max(announced // 2, 64 << 10), np.uint8)
        assert asked == [announced, max(announced // 2, 64 << 10)]


def test_an_error_for_want_of_memory_keeps_no_memory():
    """Who catches it and goes on with fewer images has the room of the first try."""
    dead = []

    def compute():
        x = np.ones(1 << 20, np.float32)
        dead.append(weakref.ref(x))
        F.exp(x)

    gc.disable()
    try:
        for _ in range(3):
            with chainer_ooc.out_of_core_mode(limit="1MiB", strict=True):
                try:
                    compute()
                except OutOfMemoryError:
                    pass
                else:
                    pytest.fail("it fits")
        np.empty(1 << 20)  # the allocator keeps the last error until it is asked again
        assert all(reference() is None for reference in dead)
    finally:
        gc.enable()
