"""What the disk refuses is an error that names the swap file, the storage and the function; no data is lost."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import threading

import numpy as np
import pytest

from chainer_ooc.errors import CorruptCopyError, SwapSpaceError
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.ram import RamDevice
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.storage import State
from chainer_ooc.swap.tiers import swap_file
from chainer_ooc.swap.tiers.swap_file import ALIGNMENT, EXTENT, SwapFile

MIB = 1 << 20


class Rig:
    """A manager whose limit is never reached."""

    def __init__(self, directory, **settings):
        self.directory = str(directory)
        self.device = RamDevice(self.directory)
        self.settings = Settings(limit=1 << 40, min_bytes=1, **settings)
        self.manager = SwapManager(self.device, lambda: self.settings)

    def save(self, value, nbytes=MIB):
        saved = self.manager.save(np.full(nbytes, value, np.uint8), "Tanh")
        self.manager.add_use([saved])
        return saved

    def check(self, error, number, *texts):
        """See that an error tells what it is about."""
        assert error.errno == number
        assert error.filename == self.directory
        message = str(error)
        for text in ("<Storage ", " of Tanh: ", "swap file", self.directory, *texts):
            assert text in message


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.device.close()


@pytest.fixture
def fault(monkeypatch):
    """Replace a function of ``os`` by one that is called with the real one."""

    def replace(name, function):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given: function(real, *given))
        return lambda: monkeypatch.setattr(os, name, real)

    return replace


def raises(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


READS = {
    "broken": (raises(errno.EIO), errno.EIO, "Input/output error"),
    "stale": (raises(errno.ESTALE), errno.ESTALE, "Stale file handle"),
    "no descriptor": (raises(errno.EBADF), errno.EBADF, "Bad file descriptor"),
    "no memory": (raises(errno.ENOMEM), errno.ENOMEM, "Cannot allocate"),
    "the end": (lambda *_: 0, errno.EIO, "ends there"),
    "the end in a page": (lambda *_: 100, errno.EIO, "ends there"),
}


@pytest.mark.parametrize("how", READS)
def test_a_read_that_fails_twice(rig, fault, how):
    function, number, text = READS[how]
    saved = rig.save(7)
    rig.manager.move_all_out()
    again = fault("preadv", function)
    with pytest.raises(OSError) as error:
        saved.get()
    rig.check(error.value, number, text, "could not be read", "twice", "byte 0")
    assert saved.storage.state is State.OUT
    again()
    assert set(saved.get()) == {7}


def test_a_file_that_was_cut_off(rig):
    saved = rig.save(7)
    rig.manager.move_all_out()
    os.truncate(rig.device.file._file.number(), 16 * ALIGNMENT)
    with pytest.raises(OSError) as error:
        saved.get()
    rig.check(error.value, errno.EIO, "ends there")


def test_reads_and_writes_in_small_pieces(rig, fault):
    """Also of less than a page, after which direct I/O could not go on."""

    def write(real, fd, buffer, at):
        return real(fd, buffer[: 3 * ALIGNMENT], at) - 100 * (buffer.nbytes > ALIGNMENT)

    def read(real, fd, buffers, at):
        return real(fd, [buffers[0][: 5 * ALIGNMENT]], at) - (buffers[0].nbytes > ALIGNMENT)

    fault("pwrite", write)
    fault("preadv", read)
    bits = np.random.RandomState(0).bytes(MIB)
    saved = rig.manager.save(np.frombuffer(bits, np.uint8).copy(), "Tanh")
    rig.manager.move_all_out()
    assert saved.get().tobytes() == bits


def test_one_fault_is_overcome(rig, fault):
    calls = []

    def once(real, *given):
        calls.append(given)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        return real(*given)

    for name in ("pwrite", "preadv"):
        calls.clear()
        fault(name, once)
        saved = rig.save(7)
        rig.manager.move_all_out()
        assert set(saved.get()) == {7}
        assert len(calls) >= 2


def test_corrupt_copies_are_told_as_such(tmp_path, fault):
    rig = Rig(tmp_path, verify=True)
    saved = rig.save(7)
    rig.manager.move_all_out()

    def damage(real, fd, buffers, at):
        done = real(fd, buffers, at)
        buffers[0][0] = 1
        return done

    fault("preadv", damage)
    with pytest.raises(CorruptCopyError, match="of Tanh"):
        saved.get()
    rig.device.close()


WRITES = {
    "broken": (raises(errno.EIO), errno.EIO, "Input/output error"),
    "full after all": (raises(errno.ENOSPC), errno.ENOSPC, "No space left"),
    "quota": (raises(errno.EDQUOT), errno.EDQUOT, "quota"),
    "too large": (raises(errno.EFBIG), errno.EFBIG, "too large"),
    "nothing": (lambda *_: 0, errno.EIO, "no more can be written"),
    "less than a page": (lambda *_: 10, errno.EIO, "no more can be written"),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_that_fails_twice(rig, fault, how):
    function, number, text = WRITES[how]
    saved = rig.save(7)
    again = fault("pwrite", function)
    with pytest.raises(SwapSpaceError) as error:
        rig.manager.move_all_out()
    rig.check(error.value, number, text, "could not be written", "no data was lost")
    assert saved.storage.state is State.RESIDENT
    assert rig.device.file.allocated == 0
    again()
    rig.manager.move_all_out()
    assert saved.storage.state is State.OUT
    assert set(saved.get()) == {7}


def test_an_error_holds_no_memory(rig, fault):
    """Of a piece that failed in its middle, too."""
    saved = rig.save(7)

    def half(real, fd, buffer, at):
        if buffer.nbytes < MIB // 2:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffer[: MIB // 2 + ALIGNMENT], at)

    fault("pwrite", half)
    with pytest.raises(SwapSpaceError) as error:
        rig.manager.move_all_out()
    assert error.value.__cause__ is not None
    assert not saved.storage.referenced_externally


SPACE = {
    "full": (errno.ENOSPC, "larger disk"),
    "quota": (errno.EDQUOT, "larger disk"),
    "too large": (errno.EFBIG, "ulimit -f"),
    "broken": (errno.EIO, "Input/output error"),
    "read-only": (errno.EROFS, "Read-only"),
}


@pytest.mark.parametrize("how", SPACE)
def test_there_is_no_space(rig, fault, how):
    number, text = SPACE[how]
    saved = rig.save(7)
    again = fault("posix_fallocate", raises(number))
    with pytest.raises(SwapSpaceError) as error:
        rig.manager.move_all_out()
    rig.check(error.value, number, text, "no data was lost")
    assert set(saved.get()) == {7}
    again()
    rig.manager.move_all_out()
    assert saved.storage.state is State.OUT


OPENS = {
    "missing": (errno.ENOENT, "No such file"),
    "unwritable": (errno.EACCES, "Permission denied"),
    "read-only": (errno.EROFS, "Read-only"),
    "no descriptors": (errno.EMFILE, "Too many open files"),
    "quota": (errno.EDQUOT, "quota"),
}


@pytest.mark.parametrize("how", OPENS)
def test_the_file_cannot_be_made(rig, fault, how):
    number, text = OPENS[how]
    saved = rig.save(7)
    again = fault("open", raises(number))
    try:
        with pytest.raises(SwapSpaceError) as error:
            rig.manager.move_all_out()
    finally:
        again()
    rig.check(error.value, number, text, "swap_dir")
    assert set(saved.get()) == {7}
    rig.manager.move_all_out()
    assert saved.storage.state is State.OUT


# What a limit of the size of files does.


@pytest.mark.parametrize("handler", ["SIG_DFL", "SIG_IGN", "lambda *_: print('signal')"])
def test_a_limit_of_the_size_of_files_is_an_error_and_no_signal(run_python, tmp_path, handler):
    (tmp_path / "main.py").write_text(
        "import resource, signal, numpy as np, chainer, chainer.functions as F, chainer_ooc\n"
        "from signal import SIG_DFL, SIG_IGN\n"
        f"signal.signal(signal.SIGXFSZ, {handler})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, 5 << 20))\n"
        "chainer_ooc.enable(swap_all=True)\n"
        "x = h = chainer.Variable(np.full((1, 1 << 18), 0.5, 'f'))\n"
        "try:\n"
        "    for _ in range(10):\n"
        "        h = F.tanh(h)\n"
        "except chainer_ooc.errors.SwapSpaceError as error:\n"
        "    print(error.errno, error)\n"
        "chainer_ooc.disable()\n"
        "F.sum(h).backward()\n"
        "print(float(x.grad[0, 0]))\n"
    )
    result = run_python(tmp_path / "main.py")
    assert (result.returncode, result.stderr) == (0, "")
    error, gradient = result.stdout.splitlines()
    assert error.startswith(f"{errno.EFBIG} [Errno {errno.EFBIG}] <Storage ")
    assert "of Tanh" in error and "ulimit -f" in error
    assert float(gradient) > 0


def test_what_fits_under_a_limit_of_the_size_of_files_is_used(tmp_path, monkeypatch):
    file = SwapFile(str(tmp_path))
    monkeypatch.setattr(
        swap_file.resource,
        "getrlimit",
        lambda _: (EXTENT + 2 * ALIGNMENT, swap_file.resource.RLIM_INFINITY),
    )
    file.allocate(EXTENT)
    file.allocate(2 * ALIGNMENT)
    with pytest.raises(SwapSpaceError, match="ulimit"):
        file.allocate(1)
    file.close()


def test_signals_do_not_disturb_copies(rig):
    """The system ends slow calls with ``EINTR``: Python begins them again."""
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        saved = [rig.save(n, 4 * MIB) for n in range(10)]
        rig.manager.move_all_out()
        assert [set(one.get()) for one in saved] == [{n} for n in range(10)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen


# The directory changes while it is in use.


def test_the_directory_is_deleted_while_copies_are_in_it(tmp_path):
    directory = tmp_path / "swap"
    directory.mkdir()
    rig = Rig(directory)
    saved = [rig.save(n) for n in range(3)]
    rig.manager.move_all_out()
    shutil.rmtree(directory)
    more = [rig.save(n, EXTENT) for n in range(2)]  # the file grows
    rig.manager.move_all_out()
    assert {one.storage.state for one in saved + more} == {State.OUT}
    assert [one.get()[0] for one in saved + more] == [0, 1, 2, 0, 1]
    rig.device.close()


def test_the_directory_is_deleted_before_it_is_used(tmp_path):
    directory = tmp_path / "swap"
    directory.mkdir()
    rig = Rig(directory)
    saved = rig.save(7)
    shutil.rmtree(directory)
    with pytest.raises(SwapSpaceError) as error:
        rig.manager.move_all_out()
    rig.check(error.value, errno.ENOENT, "cannot be made", "swap_dir")
    assert set(saved.get()) == {7}
    directory.mkdir()
    rig.manager.move_all_out()
    assert saved.storage.state is State.OUT
    rig.device.close()


@pytest.mark.parametrize("way", ["out", "in"])
def test_the_directory_changes_while_copies_are_under_way(tmp_path, monkeypatch, way):
    """What was begun ends in the old file, which is closed with the last copy there."""
    go, real = threading.Event(), getattr(SwapFile, "write" if way == "out" else "read")

    def slow(file, offset, buffer):
        assert go.wait(30)
        real(file, offset, buffer)

    (tmp_path / "other").mkdir()
    rig = Rig(tmp_path)
    saved = [rig.save(n) for n in range(4)]
    first = rig.device.file
    if way == "in":
        rig.manager.move_all_out()
    monkeypatch.setattr(SwapFile, "write" if way == "out" else "read", slow)
    transfers = rig.manager._transfers
    for one in saved:
        (transfers.begin_out if way == "out" else transfers.begin_in)(one.storage)
    rig.device.move_to(str(tmp_path / "other"))
    assert rig.device.file is not first
    rig.device.move_to(str(tmp_path))
    go.set()
    rig.manager.settle()
    rig.manager.move_all_out()
    assert first.allocated
    assert [set(one.get()) for one in saved] == [{n} for n in range(4)]
    saved.clear()
    rig.manager.settle()
    rig.device.used_bytes()  # forgets the copies that have come in
    assert not first.allocated
    del first, one, transfers
    gc.collect()
    assert not [target for target in open_files() if str(tmp_path) in target]
    rig.device.close()


def open_files():
    """Return what this process has open."""
    targets = []
    for name in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return targets
