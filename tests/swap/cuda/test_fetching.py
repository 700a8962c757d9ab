"""What backward needs: fetched ahead and for use, given away, and dropped after it."""

from __future__ import annotations

import pytest

from chainer_ooc import errors
from chainer_ooc.swap.storage import State
from tests.swap.cuda.conftest import UNIT, host_bytes, on_pool, states, values


@pytest.fixture
def rig(make_rig):
    return make_rig()


def test_hits_are_counted_once(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    counters = rig.manager.counters
    arrays = rig.manager.fetch(saved, read_only=True)
    assert (counters.hits, counters.storages_in) == (3, 0)
    del arrays
    rig.manager.move_all_out()
    rig.manager.fetch(saved, read_only=True)
    assert (counters.hits, counters.storages_in) == (3, 3)


def test_prefetched_storages_are_counted_when_they_are_used(rig):
    saved = [rig.save(float(i)) for i in range(4)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved[3:], read_only=True)
    rig.manager.prefetch(saved[3:])
    counters = rig.manager.counters
    assert (counters.prefetched, counters.prefetch_hits) == (3, 0)
    assert set(states(saved[:3])) == {State.COMING_IN}
    for _ in range(2):
        rig.manager.fetch(saved[2:], read_only=True)
        assert counters.prefetch_hits == 1
    rig.manager._transfers.end_in(saved[0].storage)
    rig.manager._transfers.release(saved[0].storage)  # in vain
    rig.manager.fetch(saved[:1], read_only=True)
    assert counters.prefetch_hits == 1
    assert values(saved) == [0, 1, 2, 3]


def test_what_is_used_or_here_is_not_prefetched(rig):
    saved = [rig.save(float(i)) for i in range(5)]
    rig.manager.move_all_out()
    rig.manager.release_use([saved[1]], drop=False)
    kept = saved[2].get()
    rig.manager.fetch(saved[4:], read_only=True)
    rig.manager.prefetch(saved[4:])
    assert rig.manager.counters.prefetched == 2
    assert saved[1].storage.state is State.OUT
    assert kept.get()[0] == 2


def test_prefetching_goes_by_falling_rank(rig):
    saved = [rig.save(float(i)) for i in range(4)]
    for rank, one in zip((3, 1, 2, 4), saved, strict=True):
        rig.manager.add_use([one], rank)
        rig.manager.add_use([one], 0)  # the highest counts
    rig.manager.move_all_out()
    held = [rig.array(0.0) for _ in range(5)]
    rig.manager.fetch(saved[3:], read_only=True)
    rig.manager.prefetch(saved[3:])
    assert states(saved[:3]) == [State.COMING_IN, State.OUT, State.OUT]
    del held


def test_prefetching_asks_no_room_for_what_is_here(rig):
    saved = [rig.save(0.0), rig.save(1.0, 4 * UNIT), rig.save(2.0)]
    held = saved[1].get()
    rig.manager.move_all_out()
    rig.manager.prefetch(saved[2:])
    assert states(saved) == [State.COMING_IN, State.RESIDENT, State.OUT]
    del held


def test_prefetching_goes_as_far_as_there_is_room(rig):
    saved = [rig.save(float(i)) for i in range(6)]
    rig.manager.move_all_out()
    held = [rig.array(0.0) for _ in range(3)]
    rig.manager.fetch(saved[5:], read_only=True)
    rig.manager.prefetch(saved[5:])
    assert rig.manager.counters.prefetched == 3  # 8, less the margin, less 4
    assert states(saved[:2]) == [State.OUT] * 2
    assert rig.pool.used_bytes() == 7 * UNIT
    del held


def test_where_a_plan_decides_nothing_else_is_fetched_ahead(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    rig.manager.move_all_out()
    rig.manager._evictor.follows_plan = True
    rig.manager.prefetch(saved[2:])
    assert states(saved) == [State.OUT] * 3
    rig.manager._evictor.follows_plan = False
    rig.manager.prefetch(saved[2:])
    assert states(saved[:2]) == [State.COMING_IN] * 2


@pytest.mark.parametrize(
    ("out", "back", "expected"),
    [(2.0, 3.0, (2, 3)), (2.0, None, (2, 2)), (None, 3.0, (3, 3)), (None, None, (7, 7))],
)
def test_a_bandwidth_that_nobody_knows_is_that_of_the_other_way(
    rig, monkeypatch, out, back, expected
):
    measured = {True: out, False: back}
    monkeypatch.setattr(rig.manager._transfers, "bandwidth", lambda out: measured[out])
    assert rig.manager.bandwidths(7.0) == expected


def test_prefetching_releases_what_has_been_used(rig):
    saved = [rig.save(float(i)) for i in range(6)]
    rig.manager.move_all_out()
    held = [rig.array(0.0) for _ in range(4)]
    rig.manager.fetch(saved[4:], read_only=True)
    rig.manager.release_use([saved[5]], drop=False)
    rig.manager.prefetch(saved[4:5])
    assert saved[5].storage.state is State.OUT
    assert states(saved[:4]).count(State.COMING_IN) == 2
    del held


@on_pool
def test_a_failed_prefetch_is_no_error(rig):
    saved = [rig.save(float(i)) for i in range(3)]
    rig.manager.move_all_out()
    rig.manager.fetch(saved[2:], read_only=True)
    rig.cupy.fail["malloc"] = [0, 1, 2, 3]
    rig.manager.prefetch(saved[2:])
    assert rig.manager.counters.prefetched == 0
    rig.cupy.fail.clear()
    assert values(saved) == [0, 1, 2]


def test_transfers_of_a_group_are_all_begun_before_one_is_waited_for(rig, monkeypatch):
    saved = [rig.save(float(i)) for i in range(3)]
    rig.manager.move_all_out()
    calls = []
    copy_in, wait = rig.device.copy_in, rig.device.streams.let_compute_wait
    monkeypatch.setattr(
        rig.device, "copy_in", lambda *args: [calls.append("begin"), copy_in(*args)][1]
    )
    monkeypatch.setattr(
        rig.device.streams, "let_compute_wait", lambda event: [calls.append("wait"), wait(event)][1]
    )
    rig.manager.fetch(saved, read_only=True)
    assert calls[:4] == ["begin"] * 3 + ["wait"]


def test_what_is_here_stays_while_the_rest_of_its_group_comes(rig):
    saved = [rig.save(float(i)) for i in range(4)]
    rig.manager.move_all_out()
    saved[0].get()  # clean, and held by nobody
    held = [rig.array(0.0) for _ in range(3)]
    before = rig.manager.counters.storages_in
    arrays = rig.manager.fetch(saved, read_only=True)
    assert rig.manager.counters.storages_in - before == 3
    assert [a.get()[0] for a in arrays] == [0, 1, 2, 3]
    del held


def test_a_reader_who_may_write_makes_the_copy_worthless(rig):
    saved = rig.save(1.0)
    rig.manager.move_all_out()
    rig.manager.read(saved, read_only=True)
    assert saved.storage.state is State.BOTH
    rig.manager.read(saved, read_only=False)
    assert saved.storage.state is State.RESIDENT
    assert saved.storage.copy is None
    rig.cupy.synchronize()
    assert rig.device.host.allocate(1) is not None
    assert rig.device.host.slab.allocated == 512


def test_what_cannot_be_written_to_keeps_its_copy(rig):
    array = rig.array(1.0)
    array.flags.writeable = False
    saved = rig.manager.save(array, "f")
    del array
    rig.manager.move_all_out()
    rig.manager.read(saved, read_only=False)
    assert saved.storage.state is State.BOTH


def test_backward_may_give_an_array_away(rig):
    saved = [rig.save(float(i)) for i in range(2)]
    rig.manager.move_all_out()
    kept, _ = rig.manager.fetch(saved, read_only=True)
    del _
    rig.manager.release_use(saved, drop=False)
    assert states(saved) == [State.RESIDENT, State.BOTH]
    assert kept.get()[0] == 0


def test_backward_may_give_away_what_goes_out(rig):
    saved = rig.save(1.0)
    rig.manager._transfers.begin_out(saved.storage)
    kept = rig.manager.read(saved, read_only=True)
    rig.manager.release_use([saved], drop=False)
    rig.manager.settle()
    assert saved.storage.state is State.RESIDENT
    assert host_bytes(rig) == 0
    kept.add(1)
    assert values([saved]) == [2]


def test_written_to_after_it_went_out_once_it_goes_out_again(rig):
    """The second copy is not taken for one that was written to meanwhile, as the first was."""
    saved = rig.save(1.0)
    transfers = rig.manager._transfers
    transfers.begin_out(saved.storage)
    rig.manager.read(saved, read_only=False)
    transfers.end_out(saved.storage)
    assert saved.storage.state is State.RESIDENT
    transfers.begin_out(saved.storage)
    transfers.end_out(saved.storage)
    assert saved.storage.state is State.BOTH


def test_only_the_last_function_drops(rig):
    saved = rig.save(1.0)
    rig.manager.add_use([saved])
    rig.manager.release_use([saved], drop=True)
    assert saved.storage.state is State.RESIDENT
    rig.manager.release_use([saved], drop=True)
    assert saved.storage.state is State.DROPPED
    rig.manager.release_use([saved], drop=True)
    assert rig.pool.used_bytes() == 0


def test_a_dropped_array_that_somebody_holds_can_be_read(rig):
    array = rig.array(1.0)
    saved = rig.manager.save(array, "f")
    rig.manager.release_use([saved], drop=True)
    assert saved.get() is array
    del array
    with pytest.raises(errors.GraphReleasedError):
        saved.get()
