"""A kernel has failed: each call has its error from then on. It is told, not taken for a copy that is still running."""

from __future__ import annotations

import gc

import pytest

from chainer_ooc.swap.storage import State
from tests.doubles.simulated_cuda import CUDARuntimeError
from tests.swap.cuda.conftest import UNIT, host_bytes, values
from tests.swap.cuda.test_eviction import with_recipe
from tests.swap.cuda.test_late_verdicts import begin

LAUNCH_FAILURE = 719


@pytest.fixture
def rig(make_rig):
    """A rig that does nothing before it must. At the end its GPU works again."""
    rig = make_rig(limit=16 * UNIT)
    rig.cupy.eagerness = 0
    yield rig
    rig.cupy.broken = 0


def fails():
    return pytest.raises(CUDARuntimeError, match=str(LAUNCH_FAILURE))


def going_out(rig, value=1.0):
    saved = rig.save(value)
    rig.manager._transfers.begin_out(saved.storage)
    return saved


def coming_in(rig, value=1.0):
    saved = going_out(rig, value)
    rig.manager._transfers.end_out(saved.storage)
    rig.manager._transfers.release(saved.storage)
    rig.manager._transfers.begin_in(saved.storage)
    return saved


@pytest.mark.parametrize("begun", [going_out, coming_in])
def test_a_transfer(rig, begun):
    transfer = begun(rig).storage.transfer
    assert not transfer.done()
    assert transfer.span() is None
    rig.cupy.broken = LAUNCH_FAILURE
    for ask in (transfer.done, transfer.span, transfer.wait, transfer.join):
        with fails():
            ask()
    assert transfer._owner is not None  # a copy may still use the memory
    rig.cupy.broken = 0
    transfer.wait()
    assert transfer.done()


def test_a_verdict(rig):
    x = rig.save(1.0)
    verdict = begin(rig, with_recipe(rig, x)).storage.verdict
    assert not verdict.done()
    rig.cupy.broken = LAUNCH_FAILURE
    with fails():
        verdict.done()


def test_flags_of_verdicts_that_nobody_wants_any_more(rig):
    array = rig.array(1.0)

    def compare():
        return rig.device.compare([[rig.device.fingerprint(array.data.mem, 0, UNIT) for _ in "12"]])

    compare()
    flags = rig.device.fingerprints
    free = len(flags._free_flags)
    rig.cupy.broken = LAUNCH_FAILURE
    with fails():
        flags._take_flag()
    rig.cupy.broken = 0
    rig.cupy.synchronize()
    assert compare().equal()
    assert len(flags._free_flags) == free


def test_the_blocks_of_a_dead_storage(rig):
    saved = going_out(rig)
    transfers = rig.manager._transfers
    del saved
    rig.cupy.broken = LAUNCH_FAILURE
    gc.collect()
    for _ in range(2):
        with fails():
            rig.save(2.0)
    assert len(transfers.deferred_frees) == 1
    assert repr(rig.manager)  # no error
    rig.cupy.broken = 0
    rig.cupy.synchronize()
    transfers.run_deferred_frees()
    assert host_bytes(rig) == 0


def test_pinned_blocks_that_are_taken_back(rig):
    running = [rig.device.copy_out(rig.owner(float(i)), 0, UNIT) for i in range(3)]
    rig.cupy.broken = LAUNCH_FAILURE
    for transfer in running:
        transfer.copy.free()
    for nbytes in (UNIT, 16 * UNIT):
        with fails():
            rig.device.host.allocate(nbytes)
    rig.cupy.broken = 0
    assert host_bytes(rig) == 0


def test_pinned_blocks_that_are_waited_for(rig):
    rig.device.host.slab.limit = 3 * UNIT
    running = [rig.device.copy_out(rig.owner(float(i)), 0, UNIT) for i in range(3)]
    for transfer in running:
        transfer.copy.free()
    rig.device.streams.has_passed = lambda event: False  # the error comes in between
    rig.cupy.broken = LAUNCH_FAILURE
    with fails():
        rig.device.host.allocate(UNIT)
    del rig.device.streams.has_passed
    rig.cupy.broken = 0
    assert host_bytes(rig) == 0


def test_making_room(rig):
    """The error comes at once, and not after a wait for what will never be done."""
    saved = [rig.save(float(i)) for i in range(8)]
    rig.manager._transfers.begin_out(saved[0].storage)
    before = [one.storage.state for one in saved]
    rig.cupy.broken = LAUNCH_FAILURE
    with fails():
        rig.manager.make_room(12 * UNIT)
    assert [one.storage.state for one in saved] == before
    rig.cupy.broken = 0
    assert rig.manager.make_room(12 * UNIT)
    assert values(saved) == list(range(8))


def test_a_stream_that_is_new(rig):
    rig.cupy.broken = LAUNCH_FAILURE
    with rig.cupy.cuda.Stream(non_blocking=True), fails():
        rig.device.note_allocation()


def test_what_is_told_of_the_past_is_told(rig):
    saved = going_out(rig)
    rig.manager._transfers.end_out(saved.storage)
    rig.cupy.broken = LAUNCH_FAILURE
    assert rig.manager.measured_bandwidths() == (None, None)
    assert saved.storage.state is State.BOTH


def test_out_of_core_mode_ends(rig):
    """What was computed again is not known to be right, and never will be."""
    x = rig.save(1.0)
    y = begin(rig, with_recipe(rig, x))
    rig.manager._transfers.end_discard(y.storage)
    y.get()
    assert rig.manager._transfers._remade
    rig.cupy.broken = LAUNCH_FAILURE
    with fails():
        rig.manager._transfers.check_remade()
    rig.manager.check_remade()
