"""The allocator hook and the managers of several GPUs: limits, reclaim and retry, errors that explain."""

from __future__ import annotations

import pickle
import warnings

import pytest

from chainer_ooc import errors
from chainer_ooc.settings import Settings
from chainer_ooc.swap.cupy_allocator import SMALL, out_of_memory_class
from chainer_ooc.swap.devices.cuda.device import new_slab
from chainer_ooc.swap.gpus import Gpus
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.storage import State
from chainer_ooc.swap.system import memory
from tests.doubles.simulated_cuda import OutOfMemoryError, SimulatedCuda
from tests.swap.cuda.conftest import UNIT, on_pool

MIB = 1 << 20


@pytest.fixture
def hooked(rig):
    rig.allocator.install()
    return rig


def states(saved):
    return [one.storage.state for one in saved]


def test_room_is_made_before_the_pool_would_fail(hooked):
    before = hooked.cupy.calls["malloc"]
    saved = [hooked.save(float(i)) for i in range(12)]
    assert hooked.cupy.calls["malloc"] - before == 12  # none failed
    assert hooked.pool.total_bytes() <= 8 * UNIT
    assert states(saved).count(State.OUT) >= 4
    assert [set(s.get().get()) for s in saved] == [{float(i)} for i in range(12)]
    assert hooked.device.peak_bytes() <= 8 * UNIT


def test_nothing_moves_while_all_fits(hooked):
    saved = [hooked.save(float(i)) for i in range(6)]
    assert set(states(saved)) == {State.RESIDENT}
    assert hooked.cupy.calls["memcpyAsync"] == 0
    assert hooked.manager.counters.bytes_out == 0


def test_memory_in_pieces_is_given_up_until_it_fits(hooked):
    small = [hooked.save(float(i), UNIT // 2) for i in range(14)]
    held = [one.get() for one in small[::2]]  # every other block stays
    assert hooked.pool.used_bytes() == 7 * UNIT
    for one in small[1::2]:
        hooked.manager.release_use([one], drop=True)
    del held[::2]
    array = hooked.array(5.0, 2 * UNIT)  # 3.5 MiB are free, in halves
    assert set(array.get()) == {5.0}


@on_pool
def test_a_failed_allocation_is_tried_again(hooked):
    hooked.cupy.fail["malloc"] = [0]  # nothing can be given up
    saved = hooked.save(1.0)
    hooked.cupy.fail["malloc"] = [0]
    array = hooked.array(2.0)
    assert set(array.get()) == {2.0}
    assert saved.storage.state is State.OUT
    assert set(saved.get().get()) == {1.0}


def test_what_cannot_fit_says_why(make_rig):
    hooked = make_rig(unit=MIB)
    hooked.allocator.install()
    held = [hooked.array(float(i)) for i in range(3)]
    saved = [hooked.save(float(i)) for i in range(5)]
    keep = saved[0].get()
    with pytest.raises(OutOfMemoryError) as raised:
        hooked.array(0.0, 6 * MIB)
    error = raised.value
    assert isinstance(error, errors.OutOfMemoryError)
    assert str(error).startswith(
        "the test needs 6 MiB more, and 4 MiB of the limit of 8 MiB are in"
    )
    assert "1 MiB by saved arrays that something else holds" in str(error)
    assert "3 MiB by parameters" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.OutOfMemoryError and str(again) == str(error)
    assert out_of_memory_class(hooked.cupy) is type(error)
    del raised, error
    # Nothing is lost, and smaller things go on.
    held.clear()
    assert set(hooked.array(3.0, 5 * MIB).get()) == {3.0}
    assert [set(s.get().get()) for s in saved] == [{float(i)} for i in range(5)]
    assert set(keep.get()) == {0.0}


def test_small_allocations_ask_for_room_when_they_fail(hooked):
    saved = [hooked.save(float(i)) for i in range(7)]
    rest = hooked.manager.budget.high - hooked.pool.used_bytes()
    small = [hooked.array(0.0, SMALL // 2) for _ in range(rest // (SMALL // 2) + 6)]
    assert hooked.pool.total_bytes() <= 8 * UNIT
    assert State.OUT in states(saved)
    assert len(small) > 6


def test_a_full_host_and_disk_is_an_error_and_nothing_is_lost(make_rig, monkeypatch):
    rig = make_rig(host_limit=0)
    rig.allocator.install()

    def full(extent):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rig.device.disk.file, "_reserve", full)
    saved = []
    with pytest.raises(errors.SwapSpaceError):
        for i in range(20):
            saved.append(rig.save(float(i)))
    assert len(saved) == 7
    assert [set(s.get().get()) for s in saved] == [{float(i)} for i in range(7)]


@on_pool
def test_it_is_put_back(rig):
    stock = rig.cupy.cuda.get_allocator()
    with warnings.catch_warnings(action="error"):
        rig.allocator.install()
        rig.allocator.install()
    rig.allocator.uninstall()
    assert rig.cupy.cuda.get_allocator() is stock
    rig.allocator.install()
    rig.cupy.cuda.set_allocator(len)  # the user's
    rig.allocator.uninstall()
    assert rig.cupy.cuda.get_allocator() is len
    rig.cupy.cuda.set_allocator(stock)


class Mode:
    """Out-of-core mode on two simulated GPUs."""

    def __init__(self, directory):
        self.cupy = SimulatedCuda(total=32 * UNIT, devices=2)
        self.on = None
        self.directory = str(directory)
        self.noted = []
        self.gpus = Gpus(
            self.cupy, self.make, lambda: self.on, lambda: "the test", self.noted.append
        )

    def make(self, device):
        return SwapManager(device, lambda: self.on or self.last, is_read_only=lambda: True)

    def enable(self, limit, host_limit=8 * UNIT):
        self.on = self.last = Settings(
            limit=limit, min_bytes=1, host_limit=host_limit, swap_dir=self.directory
        )
        self.gpus.enable(self.on)

    def disable(self):
        self.on = None
        self.gpus.disable()

    def save(self, value, device_id):
        with self.cupy.cuda.Device(device_id):
            array = self.cupy.ndarray((UNIT // 4,), "f4")
            array.fill(value)
            return self.gpus.manager_for(array).save(array, "f")


@pytest.fixture
def mode(tmp_path):
    mode = Mode(tmp_path)
    yield mode
    for manager in mode.gpus.managers.values():
        manager.settle()
    mode.cupy.check()


def test_each_gpu_has_a_manager_and_a_limit(mode):
    mode.enable(4 * UNIT)
    saved = [mode.save(float(i), i % 2) for i in range(12)]
    assert sorted(mode.gpus.managers) == [0, 1]
    for device_id in (0, 1):
        with mode.cupy.cuda.Device(device_id):
            pool = mode.cupy.get_default_memory_pool()
            assert pool.get_limit() == 4 * UNIT
            assert pool.total_bytes() <= 4 * UNIT
    for i, one in enumerate(saved):
        array = one.get()
        assert array.data.device_id == i % 2
        with mode.cupy.cuda.Device(i % 2):
            assert set(array.get()) == {float(i)}
    # What six of them took of each, whatever has gone out meanwhile.
    assert max(mode.noted) == 6 * UNIT


def test_the_limit_follows_the_mode(mode):
    pool = mode.cupy.get_default_memory_pool()
    pool.set_limit(20 * UNIT)  # the user's own
    mode.enable(0.25)
    first = mode.save(1.0, 0)
    assert pool.get_limit() == 8 * UNIT
    mode.enable(6 * UNIT)
    assert pool.get_limit() == 6 * UNIT
    mode.enable(None)
    assert pool.get_limit() == 20 * UNIT
    mode.enable(6 * UNIT)
    mode.disable()
    assert pool.get_limit() == 20 * UNIT
    pool.set_limit(10 * UNIT)  # another
    mode.enable(6 * UNIT)
    assert pool.get_limit() == 6 * UNIT
    mode.disable()
    assert pool.get_limit() == 10 * UNIT
    mode.enable(6 * UNIT)
    pool.set_limit(5 * UNIT)  # and meanwhile
    mode.disable()
    assert pool.get_limit() == 5 * UNIT
    assert set(first.get().get()) == {1.0}
    array = mode.cupy.ndarray((4,), "f4")
    assert mode.gpus.manager_for(array) is first.storage.manager


def test_the_limit_of_each_gpu_is_kept_whichever_is_current(mode):
    pool = mode.cupy.get_default_memory_pool()
    limits = {0: 20 * UNIT, 1: 25 * UNIT}
    for device_id, limit in limits.items():
        with mode.cupy.cuda.Device(device_id):
            pool.set_limit(limit)
    mode.enable(6 * UNIT)
    saved = [mode.save(1.0, device_id) for device_id in limits]

    def seen():
        found = {}
        for device_id in limits:
            with mode.cupy.cuda.Device(device_id):
                found[device_id] = pool.get_limit()
        return found

    with mode.cupy.cuda.Device(1):
        mode.enable(7 * UNIT)
        assert seen() == {0: 7 * UNIT, 1: 7 * UNIT}
        mode.disable()
        assert seen() == limits
        mode.enable(7 * UNIT)
    pool.set_limit(9 * UNIT)
    with mode.cupy.cuda.Device(1):
        mode.disable()
    assert seen() == {**limits, 0: 9 * UNIT}
    del saved


def test_nothing_is_made_while_the_mode_is_off(mode):
    array = mode.cupy.ndarray((4,), "f4")
    assert mode.gpus.manager_for(array) is None
    assert mode.gpus.managers == {}


def test_allocations_are_stock_while_the_mode_is_off(mode):
    mode.enable(4 * UNIT)
    saved = [mode.save(float(i), 0) for i in range(3)]
    mode.on = None  # in this thread
    saved.append(mode.save(3.0, 0))
    with pytest.raises(OutOfMemoryError):
        mode.save(4.0, 0)
    assert all(one.storage.state.in_memory for one in saved)
    mode.on = mode.last
    saved.append(mode.save(4.0, 0))
    assert [set(one.get().get()) for one in saved] == [{float(i)} for i in range(5)]


def test_memory_of_a_pool_of_the_users_is_held_to_the_limit(mode):
    own = mode.cupy.cuda.MemoryPool()
    mode.cupy.cuda.set_allocator(own.malloc)
    own.set_limit(20 * UNIT)
    mode.enable(4 * UNIT)
    saved = [mode.save(float(i), 0) for i in range(8)]
    assert own.get_limit() == 4 * UNIT
    assert own.total_bytes() <= 4 * UNIT
    assert mode.cupy.get_default_memory_pool().get_limit() == 0
    device = saved[0].storage.manager.device
    assert device.peak_bytes() == own.total_bytes()
    assert device.used_bytes() == own.used_bytes() > 0
    assert [set(one.get().get()) for one in saved] == [{float(i)} for i in range(8)]
    mode.disable()
    assert own.get_limit() == 20 * UNIT


def test_an_allocator_with_no_pool_is_warned_of(mode):
    stock = mode.cupy.cuda.get_allocator()
    mode.cupy.cuda.set_allocator(lambda nbytes: stock(nbytes))
    with pytest.warns(RuntimeWarning, match=r"not of a cupy.cuda.MemoryPool.*set_allocator"):
        mode.enable(4 * UNIT)
    assert set(mode.save(1.0, 0).get().get()) == {1.0}


def test_inside_using_allocator(mode):
    own = mode.cupy.cuda.MemoryPool()
    with (
        mode.cupy.cuda.using_allocator(own.malloc),
        pytest.raises(errors.SettingError, match="before, or use"),
    ):
        mode.enable(4 * UNIT)
    mode.enable(4 * UNIT)
    with mode.cupy.cuda.using_allocator(own.malloc):
        mode.enable(5 * UNIT)  # again
        mode.disable()
    mode.disable()
    with (
        mode.cupy.cuda.using_allocator(own.malloc),
        pytest.raises(errors.SettingError, match="before, or use"),
    ):
        mode.enable(4 * UNIT)
    mode.enable(4 * UNIT)
    saved = [mode.save(float(i), 0) for i in range(8)]
    assert 0 < mode.cupy.get_default_memory_pool().total_bytes() <= 4 * UNIT
    assert own.total_bytes() == 0
    assert [set(one.get().get()) for one in saved] == [{float(i)} for i in range(8)]


def test_all_gpus_share_the_host_limit(mode, monkeypatch):
    available = iter(range(1 << 30, 1 << 31, 1 << 20))  # another amount each time
    monkeypatch.setattr(memory, "available_bytes", lambda: next(available))
    mode.enable(1 * UNIT)
    saved = [mode.save(float(i), i % 2) for i in range(24)]
    for one in saved:
        one.storage.manager.move_all_out()
    assert 4 * UNIT <= sum(mode.cupy.pinned.values()) <= 8 * UNIT
    slab = mode.gpus.managers[0].device.host.slab
    assert slab is mode.gpus.managers[1].device.host.slab
    staging = [manager.device.staging_bytes for manager in mode.gpus.managers.values()]
    assert slab.limit == 8 * UNIT - sum(staging)
    # Lowered, it takes no more; what is out stays.
    mode.on = mode.last = Settings(
        limit=UNIT, min_bytes=1, host_limit=4 * UNIT, swap_dir=mode.directory
    )
    mode.gpus.enable(mode.on)
    assert slab.limit == max(4 * UNIT - sum(staging), 0)
    mode.on = mode.last = Settings(limit=UNIT, min_bytes=1, swap_dir=mode.directory)
    mode.gpus.enable(mode.on)
    assert slab.limit > 64 * UNIT
    limit = slab.limit
    mode.gpus.enable(mode.on)
    assert slab.limit == limit
    for i, one in enumerate(saved):
        array = one.get()
        with mode.cupy.cuda.Device(i % 2):
            assert set(array.get()) == {float(i)}
        del array
        one.storage.manager.release_use([one], drop=True)
    # One is closed: what the other has outside stays.
    kept = mode.save(5.0, 1)
    manager = mode.gpus.managers[1]
    manager.move_all_out()
    mode.gpus.managers[0].settle()
    mode.gpus.managers[0].device.close()
    with mode.cupy.cuda.Device(1):
        assert set(kept.get().get()) == {5.0}


def test_memory_that_is_locked_already_is_part_of_a_given_limit_and_beside_what_is_free(
    mode, monkeypatch
):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 30)
    mode.enable(UNIT)
    saved = mode.save(1.0, 0)
    manager = saved.storage.manager
    manager.move_all_out()
    slab, staging = manager.device.host.slab, manager.device.staging_bytes
    assert slab.size > 0

    def limit_for(host_limit):
        mode.enable(UNIT, host_limit)
        return slab.limit

    assert limit_for(9 * UNIT) == 9 * UNIT - staging
    assert limit_for(None) == new_slab(mode.cupy, None).limit + slab.size - staging


@pytest.fixture
def asked(hooked, monkeypatch):
    """What the manager and the device are asked by the allocator."""
    asked = []
    for owner, name in (
        (hooked.manager, "make_room"),
        (hooked.device, "used_bytes"),
        (hooked.allocator, "_note"),
    ):
        monkeypatch.setattr(owner, name, noting(getattr(owner, name), name, asked))
    return asked


def noting(real, name, calls):
    def call(*args):
        calls.append(name)
        return real(*args)

    return call


@on_pool
def test_nothing_is_asked_while_memory_is_plenty(hooked, asked):
    held = [hooked.array(0.0) for _ in range(6)]
    assert asked == []
    held.append(hooked.array(0.0))  # past the low-water mark, below the high one
    assert asked == ["used_bytes", "used_bytes", "_note"]
    held.pop()
    asked.clear()
    held.append(hooked.array(0.0, SMALL // 2))
    held.append(hooked.array(0.0, SMALL // 2))
    assert asked == []
    hooked.save(1.0)
    assert "make_room" in asked


def test_small_allocations_ask_for_nothing_that_fails_not(hooked, asked):
    held = [hooked.array(0.0) for _ in range(7)]
    asked.clear()
    held.append(hooked.array(0.0, SMALL - 512))  # past the high-water mark
    assert asked == []


def test_what_the_manager_allocates_is_not_asked_for_again(hooked, asked):
    saved = [hooked.save(float(i)) for i in range(4)]
    hooked.manager.move_all_out()
    held = [hooked.array(0.0) for _ in range(7)]
    held.pop()
    asked.clear()
    assert set(saved[0].get().get()) == {0.0}
    assert "make_room" not in asked
    assert "_note" not in asked


def test_the_swap_file_moves_with_the_mode(mode, tmp_path):
    mode.enable(4 * UNIT)
    saved = mode.save(1.0, 0)
    other = tmp_path / "other"
    other.mkdir()
    mode.on = mode.last = Settings(limit=4 * UNIT, min_bytes=1, swap_dir=str(other))
    mode.gpus.enable(mode.on)
    assert saved.storage.manager.device.disk.file.directory == str(other)


def test_each_gpu_has_one_manager(mode):
    mode.enable(4 * UNIT)
    assert mode.gpus._add(0, mode.on) is mode.gpus._add(0, mode.on)


def test_a_forked_child_has_no_gpu(mode):
    mode.enable(4 * UNIT, host_limit=32 * UNIT)
    saved = [mode.save(1.0, device_id) for device_id in (0, 1)]
    for one in saved:
        one.storage.manager.move_all_out()
    pinned = dict(mode.cupy.pinned)
    slab = mode.gpus.managers[0].device.host.slab
    assert slab.allocate(1) is not None
    for manager in mode.gpus.managers.values():
        manager.after_fork()
    assert slab.allocate(1) is None
    saved.clear()
    assert mode.cupy.pinned == pinned
