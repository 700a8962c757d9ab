"""PageArena alone: its structure against a model in C, and the driver's calls, on a simulated GPU."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from chainer_ooc.swap.devices.cuda import arenas as arenas_module
from chainer_ooc.swap.devices.ram import native
from tests.doubles.simulated_arenas import PAGE, Arenas
from tests.doubles.simulated_cuda import SimulatedCuda

pytestmark = pytest.mark.extension
STRESS = pathlib.Path(__file__).parents[2] / "native" / "page_arena_stress.c"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("seed", [1, 2])
def test_it_keeps_to_the_model(tmp_path, seed):
    program = tmp_path / "stress"
    subprocess.run(["cc", "-O1", STRESS, "-o", program, "-pthread"], check=True)
    done = subprocess.run(
        [program, "60000", str(seed)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


class Machine:
    """A simulated GPU that allocates from an arena with no engine."""

    def __init__(self, seed=0, limit=16):
        self.cupy = SimulatedCuda(seed, total=64 * PAGE)
        self.arenas = Arenas(self.cupy)
        self.made = arenas_module.ArenaPool(
            self.cupy,
            before=lambda device, nbytes: self.made.grant_all(device) or True,
            refused=lambda device, nbytes: False,
            order=lambda device, streams: False,
            otherwise=None,
            announced=0,
        )
        self.cupy.cuda.set_allocator(self.made.allocator)
        native.ask_again()
        self.made._make(0, 0)
        self.arena = self.made._arena()
        self.arena.set_limit(limit * PAGE)

    def array(self, pages, value=0.0):
        array = self.cupy.ndarray((int(pages * PAGE) // 4,), np.float32)
        array.fill(value)
        return array


@pytest.fixture
def machine(monkeypatch):
    made = []

    def make(**given):
        made.append(Machine.__new__(Machine))
        monkeypatch.setattr(
            arenas_module, "_current_stream", lambda: made[-1].arenas.current_stream
        )
        made[-1].__init__(**given)
        return made[-1]

    yield make
    for one in made:
        one.cupy.check()
        one.arena.check()
    native.allocator.set_driver(None)


def scattered(machine):
    """Take all memory, and free every other block of three pages."""
    held = [machine.array(3, float(i)) for i in range(5)]
    del held[::2]
    return held


@pytest.mark.parametrize("seed", range(6))
def test_pages_are_unmapped_when_the_last_work_on_them_is_done(machine, seed):
    one = machine(seed=seed)
    one.cupy.eagerness = 0
    held = scattered(one)
    big = one.array(8, 7.0)
    assert one.cupy.calls["cuMemUnmap"] >= 4
    assert one.arena.counts["waits"] == 1  # for an event, not for the GPU
    assert not one.cupy.calls["cuCtxSynchronize"]
    assert set(big.get()) == {7.0} and [set(a.get()) for a in held] == [{1.0}, {3.0}]


def test_pages_that_are_known_to_be_idle_are_taken_first(machine):
    one = machine()
    one.cupy.eagerness = 0
    held = [one.array(3) for _ in range(5)]
    held[0] = None
    one.cupy.synchronize()
    one.arena.trim(one.arena.taken_bytes - 1 * PAGE)  # it sees that there is one that is idle
    held[2] = None  # what was there is still in use
    one.array(4)  # two new pages and two of the first
    assert one.arena.counts["unmaps"] == 3 and one.arena.counts["waits"] <= 1
    assert held[1] is not None


@pytest.mark.parametrize("seed", range(6))
def test_another_streams_memory_comes_after_its_work(machine, seed):
    one = machine(seed=seed)
    one.cupy.eagerness = 0
    first, second = (one.cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with first:
        held = scattered(one)
        del held[:]
    with second:
        assert set(one.array(14, 2.0).get()) == {2.0}
    assert one.arena.counts["orders"] == 1


def test_a_freed_block_serves_its_own_stream_at_once(machine):
    one = machine()
    one.cupy.eagerness = 0
    address = one.array(3).data.ptr
    with one.cupy.cuda.Stream(non_blocking=True):
        assert one.array(3).data.ptr != address
    assert one.array(3).data.ptr == address
    assert one.arena.counts["exact"] == 1


def test_what_is_free_goes_back_to_the_gpu(machine):
    one = machine()
    held = scattered(one)
    assert one.arena.taken_bytes == 15 * PAGE
    assert one.arena.trim(0) == 6 * PAGE == one.arena.used_bytes
    held.clear()
    one.arenas.free_dead()
    one.arena.close(True)
    assert one.arena.taken_bytes == 0
    outlives = one.array(2)
    assert one.arena.taken_bytes
    del outlives  # what is freed after that goes back at once
    one.arenas.free_dead()
    assert one.arena.taken_bytes == 0
