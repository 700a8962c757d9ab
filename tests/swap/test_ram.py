"""NumPy arrays on their way out and back: the same bits, layout and place in a page."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chainer_ooc.references import attribute_is_referenced_externally
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.copy_threads import PIECE
from chainer_ooc.swap.devices.ram import RamDevice
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.storage import State
from chainer_ooc.swap.tiers.swap_file import ALIGNMENT


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    device = RamDevice(str(tmp_path_factory.mktemp("swap")))
    settings = Settings(limit=1 << 40, min_bytes=1)
    manager = SwapManager(device, lambda: settings)
    yield manager
    device.close()


DTYPES = ["?", "b", "u1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16", "M8[s]", "g"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nbytes", [64, ALIGNMENT, 3 * ALIGNMENT + 64, PIECE + 2 * ALIGNMENT])
def test_every_dtype_and_size(manager, dtype, nbytes):
    dtype = np.dtype(dtype)
    content = np.random.RandomState(0).bytes(nbytes // dtype.itemsize * dtype.itemsize)
    array = np.frombuffer(content, "u1").view(dtype).copy()
    expected, address = array.tobytes(), array.__array_interface__["data"][0]
    saved = manager.save(array, "test")
    del array
    manager.move_all_out()
    assert saved.storage.state is State.OUT
    back = saved.get()
    assert back.dtype == dtype
    assert back.tobytes() == expected
    assert back.__array_interface__["data"][0] % ALIGNMENT == address % ALIGNMENT


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    data=st.data(),
)
@hypothesis_settings(max_examples=150, deadline=None)
def test_every_layout(manager, shape, order, data):
    axes = list(range(len(shape)))
    order.shuffle(axes)
    owner = np.random.RandomState(1).randn(*shape).transpose(axes).copy(order="K")
    views = [owner]
    kind = data.draw(
        st.sampled_from(["same", "step", "reverse", "broadcast", "transpose", "scalar"])
    )
    if kind == "step":
        views.append(owner[tuple(slice(None, None, 2) for _ in shape)])
    elif kind == "reverse":
        views.append(owner[::-1])
    elif kind == "broadcast":
        views.append(np.broadcast_to(owner[:1], (5, *owner[:1].shape)))
    elif kind == "transpose":
        views.append(owner.T)
    elif kind == "scalar":
        views.append(owner[(*[0] * len(shape), ...)])
    layouts = [(v.tobytes(), v.shape, v.strides, v.flags.writeable) for v in views]
    saved = [manager.save(view, "test") for view in views]
    del owner, views
    manager.move_all_out()
    assert {s.storage.state for s in saved} == {State.OUT}
    for one, (content, shape_, strides, writeable) in zip(saved, layouts, strict=True):
        array = one.get()
        assert array.tobytes() == content
        assert array.shape == shape_
        assert array.strides == strides
        assert array.flags.writeable == writeable


def test_views_share_one_storage_and_one_copy(manager):
    owner = np.arange(4096.0)
    views = [owner[:100], owner[::2], owner.reshape(64, 64).T]
    saved = [manager.save(view, "test") for view in views]
    assert len({s.storage for s in saved}) == 1
    before = manager.counters.bytes_out
    del owner, views
    manager.move_all_out()
    assert manager.counters.bytes_out - before == 4096 * 8
    arrays = [s.get() for s in saved]
    assert np.shares_memory(arrays[0], arrays[1])
    again = manager.save(arrays[2][5], "test")
    assert again.storage is saved[0].storage
    expected = arrays[2][5].copy()
    del arrays
    manager.move_all_out()
    assert saved[0].storage.state is State.OUT
    np.testing.assert_array_equal(again.get(), expected)


@pytest.mark.parametrize(
    "array",
    [
        np.array([object()]),
        np.frombuffer(b"12345678", "u1"),
        np.empty((0, 3)),
        np.ma.masked_array([1.0]),
    ],
    ids=lambda array: type(array).__name__ + str(array.dtype),
)
def test_what_stays(manager, array):
    assert manager.save(array, "test") is None


def test_the_same_object_while_it_lives(manager):
    array = np.ones(1000)
    saved = manager.save(array, "test")
    assert saved.get() is array


def test_small_arrays_stay(tmp_path):
    settings = Settings(limit=1 << 40, min_bytes=1000)
    manager = SwapManager(RamDevice(str(tmp_path)), lambda: settings)
    assert manager.save(np.ones(124), "test") is None
    assert manager.save(np.ones(125), "test") is not None


def test_freed_memory_is_asked_back_ever_less_often_but_when_nothing_else_is_left(
    tmp_path, monkeypatch
):
    calls = []
    device = RamDevice(str(tmp_path))
    monkeypatch.setattr("chainer_ooc.swap.system.memory.trim", lambda: calls.append("trim"))
    monkeypatch.setattr(device, "used_bytes", lambda: 1 << 30)  # nothing comes back
    tried = []
    for _ in range(40):
        before = len(calls)
        device.trim()
        tried.append(len(calls) > before)
    assert [n for n, yes in enumerate(tried) if yes] == [0, 2, 6, 14, 30]
    before = len(calls)
    device.trim(desperate=True)
    assert len(calls) == before + 1
    device.trim(desperate=True)
    assert len(calls) == before + 1
    used = iter([1 << 30, 1 << 20])
    monkeypatch.setattr(device, "used_bytes", lambda: next(used))
    device.trim(desperate=True)  # 1 GiB comes back
    monkeypatch.setattr(device, "used_bytes", lambda: 1 << 30)
    before = len(calls)
    device.trim()
    assert len(calls) == before + 1
    device.close()


def test_what_broadcast_arrays_returns_is_saved_without_its_warning(manager):
    one, _ = np.broadcast_arrays(np.arange(3.0)[:, None], np.ones((1, 4)))
    expected = one.copy()
    with warnings.catch_warnings(action="error"):
        saved = manager.save(one, "test")
        del one
        manager.move_all_out()
        assert saved.storage.state is State.OUT
        assert (saved.get() == expected).all()
    assert saved.layout.writeable
    fixed = np.broadcast_to(np.arange(3.0), (2, 3))
    assert not manager.save(fixed, "test").layout.writeable


def test_a_failed_write_or_read_holds_no_memory(tmp_path, monkeypatch):
    device = RamDevice(str(tmp_path))
    memory = SimpleNamespace(owner=np.ones(2 * PIECE, np.uint8))
    nbytes = memory.owner.nbytes

    def fail(offset, buffer):
        raise OSError(5, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(device.file, "write", fail)
        transfer = device.copy_out(memory.owner, 0, nbytes)
        with pytest.raises(OSError, match="broken"):
            transfer.join()
    assert not attribute_is_referenced_externally(memory, "owner")
    transfer = device.copy_out(memory.owner, 0, nbytes)
    transfer.join()
    with monkeypatch.context() as patch:
        patch.setattr(device.file, "read", fail)
        _, _, arriving = device.copy_in(transfer.copy, nbytes, 0)
        with pytest.raises(OSError, match="broken"):
            arriving.join()
    device.close()
