"""SwapFile: blocks do not overlap, come back, and a full disk loses nothing."""

from __future__ import annotations

import errno
import mmap
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainer_ooc.errors import SwapSpaceError
from chainer_ooc.swap.tiers.swap_file import ALIGNMENT, EXTENT, SwapFile


def page(byte: int, nbytes: int = ALIGNMENT) -> mmap.mmap:
    """Return aligned memory filled with ``byte``."""
    memory = mmap.mmap(-1, nbytes)
    memory.write(bytes([byte]) * nbytes)
    return memory


@pytest.fixture
def file(tmp_path):
    file = SwapFile(str(tmp_path))
    yield file
    file.close()


def test_what_is_written_is_read(file):
    offsets = [file.allocate(ALIGNMENT) for _ in range(8)]
    for number, offset in enumerate(offsets):
        file.write(offset, memoryview(page(number)))
    for number, offset in enumerate(offsets):
        memory = page(0xFF)
        file.read(offset, memoryview(memory))
        assert memory[:] == bytes([number]) * ALIGNMENT


def test_nobody_else_can_see_it(file, tmp_path):
    file.allocate(1)
    assert os.listdir(tmp_path) == []
    status = os.fstat(file._file.number())
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_nlink == 0


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(1, 10 * ALIGNMENT), st.integers(0, 100)), max_size=60
    )
)
@settings(max_examples=60, deadline=None)
def test_blocks_never_overlap_and_all_come_back(tmp_path_factory, steps):
    file = SwapFile(str(tmp_path_factory.getbasetemp()))
    blocks: list[tuple[int, int]] = []
    for keep, nbytes, index in steps:
        if keep or not blocks:
            offset = file.allocate(nbytes)
            assert offset % ALIGNMENT == 0
            assert offset + nbytes <= file.size
            for other, size in blocks:
                assert offset + nbytes <= other or other + size <= offset
            blocks.append((offset, nbytes))
        else:
            file.free(*blocks.pop(index % len(blocks)))
    for block in blocks:
        file.free(*block)
    assert file.allocated == 0
    assert file._free.blocks() == ([(0, file.size)] if file.size else [])
    file.close()


def test_space_is_used_again(file):
    for _ in range(100):
        block = file.allocate(EXTENT // 2)
        file.free(block, EXTENT // 2)
    assert file.size == EXTENT


def test_a_full_disk_is_an_error_before_anything_is_written(file, monkeypatch):
    first = file.allocate(ALIGNMENT)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SwapSpaceError, match=r"No space left.*swap_dir") as error:
        file.allocate(2 * EXTENT)
    assert error.value.errno == errno.ENOSPC
    file.allocate(ALIGNMENT)  # what is reserved already is still there
    file.free(first, ALIGNMENT)


def test_the_last_room_of_a_disk_is_used(file, monkeypatch):
    real = os.posix_fallocate
    limit = EXTENT // 2

    def small(fd, offset, length):
        if offset + length > limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", small)
    file.allocate(limit // 2)
    file.allocate(limit // 2)
    with pytest.raises(SwapSpaceError):
        file.allocate(1)


def test_a_file_system_without_direct_io(file, monkeypatch):
    real = os.open

    def refuse(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    offset = file.allocate(ALIGNMENT)
    file.write(offset, memoryview(b"x" * 10))
    buffer = bytearray(10)
    file.read(offset, memoryview(buffer))
    assert buffer == b"x" * 10
