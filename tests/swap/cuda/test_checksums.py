"""Checks of what is saved: who is looked at, when, and what is worth a warning."""

from __future__ import annotations

import numpy as np
import pytest

from chainer_ooc.settings import Settings
from chainer_ooc.swap import checksums
from chainer_ooc.swap.devices.cuda.checksum import checksum_on_host
from tests.swap.cuda.conftest import UNIT

ON = Settings(limit=8 * UNIT, min_bytes=1, verify=True)


@pytest.fixture
def rig(make_rig, caplog):
    """Whoever expects a warning has it before this one looks."""
    yield make_rig()
    assert not caplog.messages


@pytest.fixture
def looks(rig, monkeypatch):
    """The checksums and fingerprints that are taken."""
    taken = []
    for name in ("checksum", "fingerprint"):
        real = getattr(rig.device, name)
        monkeypatch.setattr(
            rig.device, name, lambda *args, real=real: taken.append(found := real(*args)) or found
        )
    return taken


def write(rig, saved):
    rig.manager.read(saved, read_only=False).add(1)


def test_what_nobody_checks_is_never_looked_at(rig, looks):
    saved = rig.save(1.0)
    rig.manager.move_all_out()
    rig.manager.fetch([saved], read_only=True)
    assert looks == []
    assert saved.storage.checksum is None


def test_what_stays_as_it_is_is_worth_no_warning(rig, looks):
    rig.settings = ON
    saved = rig.save(1.0)
    rig.manager.fetch([saved], read_only=True)
    rig.manager.move_all_out()
    rig.manager.fetch([saved], read_only=True)
    assert len(looks) == 4  # when it was saved, when it was used, went out and came back


def test_after_its_last_use_anybody_may_write(rig):
    rig.settings = ON
    saved = rig.save(1.0)
    rig.manager.release_use([saved], drop=False)
    write(rig, saved)
    rig.manager.move_all_out()
    assert float(saved.get().get()[0]) == 2


def test_a_storage_without_a_checksum_gets_none_by_being_checked(rig, looks):
    saved = rig.save(1.0)
    checksums.check_unchanged(rig.device, saved.storage)
    assert looks == [] and saved.storage.checksum is None


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 4096, 4099])
@pytest.mark.parametrize("offset", [0, 3])
def test_checksums_of_the_gpu_are_those_of_the_host(rig, nbytes, offset):
    array = rig.array(0.0)
    data = np.random.RandomState(1).randint(0, 256, UNIT).astype(np.uint8)
    memory = array.view()
    rig.cupy.kernel(
        "a fill", [], [array.span], lambda: memory().view(np.uint8).__setitem__(..., data)
    )
    found = rig.device.checksum(array.data.mem, offset, nbytes)
    assert found == checksum_on_host(data[offset : offset + nbytes])


def test_checksums_are_computed_when_no_memory_is_left(rig):
    arrays = [rig.array(1)]
    found = rig.device.checksum(arrays[0].data.mem, 0, UNIT)
    size = UNIT
    while size >= 512:  # what pools hand out at least
        try:
            arrays.append(rig.array(1, size))
        except rig.cupy.cuda.memory.OutOfMemoryError:
            size //= 2
    assert rig.device.checksum(arrays[0].data.mem, 0, UNIT) == found


def test_checksums_tell_bytes_their_places_and_sizes_apart():
    data = np.random.RandomState(1).randint(0, 256, 200).astype(np.uint8)
    found = {checksum_on_host(data), checksum_on_host(np.zeros(200, np.uint8))}
    found |= {checksum_on_host(data[:n]) for n in range(200)}
    found |= {checksum_on_host(np.zeros(n, np.uint8)) for n in range(1, 200)}
    for place in range(200):
        for bit in (1, 128):
            other = data.copy()
            other[place] ^= bit
            found.add(checksum_on_host(other))
    for place in range(0, 192, 8):
        other = data.copy()
        other[place : place + 8], other[place + 8 : place + 16] = (
            data[place + 8 : place + 16],
            data[place : place + 8],
        )
        found.add(checksum_on_host(other))
    assert len(found) == 2 + 200 + 199 + 400 + 24
    assert all(0 <= one < 1 << 64 for one in found)
