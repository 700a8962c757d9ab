"""Fingerprints on the GPU: the host never waits, comparisons are right, and what cannot be had is "not equal"."""

from __future__ import annotations

import numpy as np
import pytest

from chainer_ooc.swap.devices.cuda import fingerprints
from chainer_ooc.swap.devices.cuda.checksum import NAME
from chainer_ooc.swap.devices.cuda.fingerprints import COMPARED, COMPARISON
from chainer_ooc.swap.devices.protocol import Known
from chainer_ooc.swap.storage import State
from tests.swap.cuda.conftest import UNIT
from tests.swap.cuda.test_eviction import value, with_recipe


@pytest.fixture
def few(monkeypatch):
    """Allocate few slots at a time, and have few flags."""
    monkeypatch.setattr(fingerprints, "SLOTS", 4)
    monkeypatch.setattr(fingerprints, "FLAGS", 2)


def take(rig, array, nbytes=None):
    return rig.device.fingerprint(array.data.mem, 0, nbytes or array.nbytes)


def are_equal(rig, *pairs):
    return rig.device.compare(pairs).equal()


@pytest.fixture
def late(make_rig):
    """A rig that does nothing before it must, and an array; fingerprints have been used before."""
    rig = make_rig()
    rig.cupy.eagerness = 0
    array = rig.array(1.0)
    assert are_equal(rig, (take(rig, array), take(rig, array)))
    rig.cupy.synchronize()
    rig.cupy.calls.clear()
    return rig, array


def test_the_host_never_waits_and_makes_few_calls(late):
    rig, array = late
    time = rig.cupy.time
    pair = take(rig, array), take(rig, array)
    assert rig.cupy.calls == {NAME: 2}
    verdict = rig.device.compare([pair])
    assert not verdict.done()
    assert rig.cupy.calls == {NAME: 2, COMPARISON: 1, "wait_event": 1, "memcpyAsync": 1}
    assert rig.cupy.time == time  # the GPU has done nothing yet
    assert verdict.equal() and verdict.done()


def test_fingerprints_are_of_the_bytes_in_the_order_of_computation(late):
    rig, array = late
    one = take(rig, array)
    array.fill(2.0)
    two = take(rig, array)
    array.fill(1.0)
    again = take(rig, array)
    array.fill(3.0)
    verdicts = [rig.device.compare([pair]) for pair in ((one, two), (one, again), (two, again))]
    assert [verdict.equal() for verdict in verdicts] == [False, True, False]


def test_a_comparison_outlives_its_fingerprints(late):
    rig, array = late
    equal = rig.device.compare([(take(rig, array), take(rig, array))])
    other = rig.array(2.0)
    differs = rig.device.compare([(take(rig, array), take(rig, other))])
    took = [take(rig, other) for _ in range(8)]  # in the same slots
    assert (equal.equal(), differs.equal()) == (True, False)
    assert len(took) == 8


def test_other_sizes_are_never_equal(rig):
    """Not even if the sums are: the last word is filled up with zeros."""
    array = rig.array(0.0)
    sizes = [take(rig, array, nbytes) for nbytes in (3, 5, 8, 16, UNIT)]
    for first in sizes:
        for second in sizes:
            assert are_equal(rig, (first, second)) is (first is second)
    assert are_equal(rig, (take(rig, array, 8), take(rig, array, 8)))
    assert not rig.device.matches(sizes[0], array.data.mem, 0, 5).equal()


@pytest.mark.parametrize("count", [1, COMPARED, COMPARED + 1, 3 * COMPARED - 1])
def test_any_pair_that_differs_makes_the_verdict(rig, count):
    same, other = rig.array(1.0), rig.array(2.0)
    pairs = [(take(rig, same), take(rig, same)) for _ in range(count)]
    assert are_equal(rig, *pairs)
    bad = take(rig, other)
    for place in range(count):
        changed = [*pairs]
        changed[place] = (changed[place][0], bad)
        assert not are_equal(rig, *changed)


def test_what_is_unknown_is_not_equal_and_what_is_the_same_needs_no_comparison(rig):
    one = take(rig, rig.array(1.0))
    rig.cupy.calls.clear()
    assert rig.device.compare([(one, None), (one, one)]) == Known(False)
    assert rig.device.compare([(None, None)]) == Known(False)
    assert rig.device.compare([(one, one)]) == Known(True)
    assert rig.device.compare([]) == Known(True)
    assert not rig.cupy.calls


def test_slots_are_used_again(few, rig):
    array = rig.array(1.0)
    for _ in range(40):
        some = [take(rig, array) for _ in range(3)]
        assert are_equal(rig, *((some[0], one) for one in some))
        some.clear()
    assert len(rig.device.fingerprints._slots) == 1
    many = [take(rig, array) for _ in range(11)]
    assert are_equal(rig, *((many[0], one) for one in many))
    assert len(rig.device.fingerprints._slots) == 3


def test_flags_are_used_again_once_their_copies_have_ended(few, make_rig):
    rig = make_rig()
    rig.cupy.eagerness = 0
    array, other = rig.array(1.0), rig.array(2.0)
    pair = take(rig, array), take(rig, array)
    differ = pair[0], take(rig, other)
    verdicts = [rig.device.compare([pair]) for _ in range(2)]
    assert rig.device.compare([pair]) == Known(False)  # no flag is left
    verdicts.clear()
    assert rig.device.compare([pair]) == Known(False)  # their copies run
    rig.cupy.synchronize()
    for one in (differ, pair, differ):
        later = rig.device.compare([one])
        assert not later.done()
        assert later.equal() is (one is pair)


@pytest.mark.parametrize("seed", range(6))
def test_streams_are_put_in_order(make_rig, seed):
    """Arrays are written on any stream; slots and flags go from one to another."""
    rig = make_rig(seed=seed)
    rng = np.random.RandomState(seed)
    streams = [rig.cupy.get_current_stream()]
    streams += [rig.cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    arrays, values = [], []
    for number in range(4):
        with streams[number % 3]:
            rig.device.note_allocation()
            arrays.append(rig.array(float(number % 2)))
            values.append(number % 2)
    for _ in range(30):
        first, second = rng.randint(4, size=2)
        with streams[rng.randint(3)]:
            taken = take(rig, arrays[first])
        with streams[rng.randint(3)]:
            verdict = rig.device.compare([(taken, take(rig, arrays[second]))])
        with streams[first % 3]:  # where it was allocated, with no order to the others
            before, values[first] = values[first], int(rng.randint(2))
            equal = before == values[second] if first != second else True
            arrays[first].fill(values[first])
        with streams[rng.randint(3)]:
            found = rig.device.matches(taken, arrays[first].data.mem, 0, UNIT)
        with streams[first % 3]:
            arrays[first].add(0)
        assert verdict.equal() is equal
        assert found.equal() is (values[first] == before)


def test_a_stream_that_is_new_comes_after_the_fingerprints_that_it_compares(make_rig):
    rig = make_rig()
    rig.cupy.eagerness = 0
    array = rig.array(1.0)
    pair = take(rig, array), take(rig, array)
    with rig.cupy.cuda.Stream(non_blocking=True):
        assert are_equal(rig, pair)


def test_freed_memory_is_used_after_fingerprints_on_other_streams(make_rig):
    rig = make_rig()
    rig.cupy.eagerness = 0
    other = rig.cupy.cuda.Stream(non_blocking=True)
    with other:
        rig.device.note_allocation()
        array = rig.array(1.0)
    taken = take(rig, array)
    with other:
        del array
        again = rig.array(1.0)
    assert rig.device.matches(taken, again.data.mem, 0, UNIT).equal()


def test_what_is_known_and_has_a_copy_or_is_out_needs_none(rig, monkeypatch):
    taken, real = [], rig.device.fingerprint
    monkeypatch.setattr(
        rig.device, "fingerprint", lambda *args: taken.append(found := real(*args)) or found
    )
    known, unknown = rig.save(1.0), rig.save(2.0)
    before = rig.manager.fingerprint(known)
    rig.manager.read(known, read_only=False).add(1)
    assert not are_equal(rig, (before, rig.manager.fingerprint(known)))
    taken.clear()
    for one in (known, unknown):
        rig.manager._transfers.begin_out(one.storage)
    rig.manager.settle()
    (found,) = taken  # the one that is known has another, as it goes
    assert known.storage.state is State.BOTH
    assert rig.manager.fingerprint(known) is found
    rig.manager.move_all_out()
    rig.manager._evictor.release_clean(2 * UNIT)
    assert unknown.storage.state is State.OUT
    assert rig.manager.fingerprint(known) is found
    assert rig.manager.fingerprint(unknown) is None
    assert taken == [found]


# What cannot be had.


def test_neither_a_full_pool_nor_full_pinned_memory_matters(make_rig):
    rig = make_rig(host_limit=0)
    arrays = [rig.array(1.0) for _ in range(8)]
    with pytest.raises(MemoryError):
        rig.array(1.0, 512)
    assert rig.device.host.allocate(1) is None
    used = rig.pool.used_bytes()
    assert are_equal(rig, (take(rig, arrays[0]), take(rig, arrays[1])))
    assert rig.pool.used_bytes() == used


def test_without_memory_for_slots_arrays_move(make_rig):
    rig = make_rig()
    calls, real = [], rig.cupy.cuda.Memory

    def refuse(nbytes):
        calls.append(nbytes)
        raise (MemoryError, rig.cupy.cuda.runtime.CUDARuntimeError)[len(calls) % 2]

    rig.cupy.cuda.Memory = refuse
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    assert rig.manager.fingerprint(x) is None
    assert rig.device.compare([(None, None)]) == Known(False)
    assert len(calls) == 1  # each refusal takes time
    rig.manager.move_all_out()
    assert (x.storage.state, y.storage.state) == (State.OUT, State.OUT)
    assert value(y) == 2
    rig.cupy.cuda.Memory = real


def test_without_pinned_memory_for_flags_arrays_move(make_rig):
    rig = make_rig()
    rig.cupy.fail["hostRegister"] = [0]
    x = rig.save(1.0)
    y = with_recipe(rig, x)
    assert y.storage.recipe is not None
    rig.manager.move_all_out()
    assert y.storage.state is State.OUT
    assert value(y) == 2


def test_a_flag_that_cannot_be_copied_makes_arrays_move(rig):
    y = with_recipe(rig, rig.save(1.0))
    rig.cupy.fail["memcpyAsync"] = [0]
    assert not rig.manager._evictor.give_up(y.storage)
    assert y.storage.state is State.RESIDENT
    assert rig.manager._evictor.give_up(y.storage) or y.storage.state is State.CHECKING
    rig.manager.settle()
    assert y.storage.state is State.DISCARDED
    assert value(y) == 2


@pytest.mark.parametrize("lack", ["of a flag", "of a copy"])
def test_what_was_made_again_is_compared_all_the_same(few, make_rig, lack):
    """There the host waits."""
    rig = make_rig()
    array = rig.array(1.0)
    taken = take(rig, array)
    pair = taken, take(rig, array)
    pending = [rig.device.compare([pair]) for _ in range(2 if lack == "of a flag" else 0)]
    for number in (1.0, 2.0, 1.0):
        other = rig.array(number)
        rig.cupy.fail["memcpyAsync"] = [0] if lack == "of a copy" else []
        verdict = rig.device.matches(taken, other.data.mem, 0, UNIT)
        assert verdict == Known(number == 1)
    assert all(one.equal() for one in pending)


def test_a_forked_child_lets_the_flags_alone(rig):
    pair = take(rig, rig.array(1.0)), take(rig, rig.array(1.0))
    assert are_equal(rig, pair)
    rig.device.after_fork()
    assert rig.device.fingerprints._slab.size == 0
