"""A forked process reads what its parent has saved, whatever the parent does, or gets an error."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from chainer_ooc.errors import SwapSpaceError
from chainer_ooc.swap.devices.copy_threads import CopyThreads
from chainer_ooc.swap.devices.ram import RamDevice
from chainer_ooc.swap.system import forks
from chainer_ooc.swap.tiers.swap_file import ALIGNMENT, EXTENT, SwapFile
from tests.swap import fork_child

# Those of the tests' own threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
MIB = 1 << 20


class Child:
    """A forked process that waits until :meth:`result`, and gives what a function returns then, or its error."""

    def __init__(self, function):
        reading, go = os.pipe()
        self._go = go
        self._reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            signal.alarm(60)
            os.close(go)
            os.read(reading, 1)
            try:
                result = function()
            except BaseException as error:
                result = error
            os.write(writing, pickle.dumps(result))
            os._exit(0)
        os.close(reading)
        os.close(writing)

    def result(self):
        os.write(self._go, b"x")
        os.close(self._go)
        with os.fdopen(self._reading, "rb") as pipe:
            result = pipe.read()
        os.waitpid(self.pid, 0)
        return pickle.loads(result) if result else None


def page(byte, nbytes=ALIGNMENT):
    memory = mmap.mmap(-1, nbytes)
    memory.write(bytes([byte]) * nbytes)
    return memory


def read(file, offset):
    memory = page(0xFF)
    file.read(offset, memoryview(memory))
    return set(memory[:])


@pytest.fixture
def file(tmp_path):
    file = SwapFile(str(tmp_path))
    yield file
    file.close()


def block(file, byte):
    """Allocate and write a page."""
    offset = file.allocate(ALIGNMENT)
    file.write(offset, memoryview(page(byte)))
    return offset


# Programs.


@pytest.mark.parametrize("scenario", [one.__name__ for one in fork_child.SCENARIOS])
def test_each_process_computes_what_it_does_on_stock_chainer(run_python, scenario):
    result = run_python(Path(fork_child.__file__), scenario)
    stock, ours, moved = result.stdout.splitlines()
    assert ours == stock
    assert moved == "True"
    if sys.version_info < (3, 12) or "thread" not in scenario:  # then those are the program's own
        assert result.stderr == ""


def test_python_does_not_warn_of_our_threads_at_a_fork(run_python, tmp_path):
    """Python 3.12 and later look at the kernel's count of threads."""
    (tmp_path / "main.py").write_text(
        "import os, chainer, chainer.functions as F, chainer_ooc, numpy as np\n"
        "chainer_ooc.enable(swap_all=True)\n"
        "for n in range(30):\n"
        "    x = chainer.Variable(np.full((4, 1 << 18), 0.5, 'f'))\n"
        "    y = F.sum(F.tanh(F.tanh(x)))\n"
        "    if os.fork() == 0:\n"
        "        os._exit(len(os.listdir('/proc/self/task')) - 1)\n"
        "    assert os.wait()[1] == 0\n"
        "    y.backward()\n"
    )
    own = "ignore:chainer_ooc has no C extension here"  # Python drops the second of two that are equal
    result = run_python("-W", "always", "-W", own, tmp_path / "main.py")
    assert (result.returncode, result.stderr) == (0, "")


# Copies under way.


@pytest.mark.parametrize("way", ["out", "in"])
def test_a_fork_waits_for_the_copies_under_way(tmp_path, monkeypatch, way):
    device = RamDevice(str(tmp_path))
    owner = np.arange(3 * MIB, dtype=np.uint8)
    expected = owner.copy()
    name = "write" if way == "out" else "read"
    real = getattr(SwapFile, name)

    def slow(file, offset, buffer):
        time.sleep(0.2)
        real(file, offset, buffer)

    if way == "out":
        monkeypatch.setattr(SwapFile, name, slow)
        transfer = device.copy_out(owner, 0, owner.nbytes)
    else:
        out = device.copy_out(owner, 0, owner.nbytes)
        out.join()
        monkeypatch.setattr(SwapFile, name, slow)
        owner, origin, transfer = device.copy_in(out.copy, owner.nbytes, owner.ctypes.data)
        owner = owner[origin : origin + expected.nbytes]

    def look():
        is_done = transfer.done()
        transfer.wait()
        return is_done, np.array_equal(owner, expected)

    assert not transfer.done()
    assert Child(look).result() == (True, True)
    assert transfer.done()
    device.close()


def test_threads_begin_anew_after_a_fork_in_both_processes():
    threads = CopyThreads(2, "copying")

    def run():
        ran = threading.Event()
        threads.submit(ran.set)
        return ran.wait(30)

    assert run()
    child = Child(run)
    assert not [one for one in threading.enumerate() if one.name.startswith("copying")]
    assert run()
    assert child.result() is True
    threads.close()


def test_a_fork_waits_for_a_thread_in_the_midst_of_a_move_but_not_for_ever(monkeypatch):
    lock, ready, release = threading.RLock(), threading.Event(), threading.Event()

    def move():
        with lock:
            ready.set()
            release.wait(30)

    monkeypatch.setattr(forks, "_before", [lambda: forks.hold([threading.RLock(), lock])])
    for patience, is_released in ((30.0, True), (0.1, False)):
        monkeypatch.setattr(forks, "PATIENCE", patience)
        ready.clear()
        release.clear()
        thread = threading.Thread(target=move)
        thread.start()
        assert ready.wait(30)
        timer = threading.Timer(0.3, release.set)
        timer.start()
        child = Child(lambda: None)
        assert release.is_set() is is_released
        timer.join()
        thread.join()
        child.result()
        assert lock.acquire(timeout=0)
        lock.release()
        assert not lock._is_owned()


def test_two_threads_that_take_locks_in_turn_do_not_wait_for_each_other(monkeypatch):
    first, second = threading.RLock(), threading.RLock()
    monkeypatch.setattr(forks, "_before", [lambda: forks.hold([first, second])])
    end = time.monotonic() + 1

    def nest():
        while time.monotonic() < end:
            with second, first:
                pass

    thread = threading.Thread(target=nest)
    thread.start()
    while time.monotonic() < end:
        Child(lambda: None).result()
    thread.join(30)
    assert not thread.is_alive()


def test_ctrl_c_while_a_fork_waits_comes_after_it(run_python, tmp_path):
    (tmp_path / "main.py").write_text(
        "import os, signal, threading, time\n"
        "from chainer_ooc.swap.devices.copy_threads import CopyThreads\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "threads, ended = CopyThreads(1, 'copying'), []\n"
        "threads.submit(lambda: (time.sleep(2), ended.append(1)))\n"
        "timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))\n"
        "timer.start()\n"
        "try:\n"
        "    if os.fork() == 0:\n"
        "        os._exit(bool(ended) + 10)\n"
        "    time.sleep(0)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', os.wait()[1] >> 8)\n"
        "threads.submit(lambda: print('again'))\n"
    )
    result = run_python("-W", "ignore", tmp_path / "main.py")
    assert (result.stdout, result.stderr) == ("interrupted 11\nagain\n", "")


# Blocks.


def test_a_block_is_kept_until_the_last_process_that_can_read_it_has_ended(file):
    mine = block(file, 1)
    first = Child(lambda: read(file, mine))
    second = Child(lambda: read(file, mine))
    file.free(mine, ALIGNMENT)
    assert block(file, 2) != mine
    assert first.result() == {1}
    assert block(file, 3) != mine
    assert second.result() == {1}
    assert block(file, 4) == mine


def test_what_is_free_or_allocated_later_is_used_again_at_once(file):
    early, free = block(file, 1), block(file, 2)
    file.free(free, ALIGNMENT)
    child = Child(lambda: read(file, early))
    assert block(file, 3) == free
    file.free(free, ALIGNMENT)
    assert block(file, 4) == free
    assert child.result() == {1}


@pytest.mark.parametrize("how", ["killed", "another program", "it frees them"])
def test_a_process_that_cannot_read_any_more_keeps_nothing(file, how):
    mine = block(file, 1)

    def end():
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "another program":
            os.execv("/bin/sleep", ["sleep", "30"])
        file.free(mine, ALIGNMENT)
        time.sleep(30)

    reading, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(reading, 1)
        end()
    file.free(mine, ALIGNMENT)
    assert block(file, 2) != mine
    os.write(go, b"x")
    deadline = time.monotonic() + 20
    while (other := block(file, 3)) != mine and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reading)
    os.close(go)
    assert other == mine


def test_workers_that_live_on_do_not_let_the_file_grow(file):
    """Forked early, when there is something, and again and again while there is."""
    early = Child(lambda: file._file is None)
    mine = file.allocate(EXTENT // 4)
    workers = [Child(lambda: None) for _ in range(4)]
    for step in range(50):
        file.free(mine, EXTENT // 4)
        mine = file.allocate(EXTENT // 4)
        if not step % 10:
            subprocess.run(["true"], preexec_fn=lambda: None, check=True)
            Child(lambda: None).result()
    assert file.size <= EXTENT
    assert early.result() is True
    for worker in workers:
        worker.result()


def test_descriptors_are_closed(file):
    def count():
        return len(os.listdir("/proc/self/fd"))

    mine = block(file, 1)

    def fork(times):
        nonlocal mine
        for _ in range(times):
            child = Child(lambda mine=mine: read(file, mine))
            file.free(mine, ALIGNMENT)
            mine = block(file, 1)
            assert child.result() == {1}
        file.free(mine, ALIGNMENT)
        mine = block(file, 1)

    fork(1)  # what other tests have left sees its first fork
    before = count()
    fork(20)
    assert count() == before


def test_a_child_without_anything_to_read_does_not_hold_the_file(file):
    file.free(block(file, 1), ALIGNMENT)
    number = file._file.number()

    def look():
        with pytest.raises(OSError):
            os.fstat(number)
        return read(file, block(file, 5))  # one of its own

    assert Child(look).result() == {5}


def test_on_a_full_disk_the_parents_training_comes_first(file, monkeypatch):
    mine = block(file, 1)
    rest = EXTENT - ALIGNMENT
    file.allocate(rest)
    in_time = Child(lambda: read(file, mine))
    late = Child(lambda: read(file, mine))
    file.free(mine, ALIGNMENT)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert in_time.result() == {1}
    assert block(file, 2) == mine
    error = late.result()
    assert isinstance(error, OSError)
    assert error.errno == errno.ESTALE
    assert "disk became full" in str(error)
    assert read(file, mine) == {2}
    with pytest.raises(SwapSpaceError):
        file.allocate(1)


def test_a_child_that_could_not_be_known_of_gets_an_error(file, monkeypatch):
    mine = block(file, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reading, writing = os.pipe()
    resource.setrlimit(resource.RLIMIT_NOFILE, (writing + 1, hard))
    try:
        pid = os.fork()
        if pid == 0:
            try:
                result = read(file, mine)
            except OSError as error:
                result = error
            os.write(writing, pickle.dumps(result))
            os._exit(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        error = pickle.loads(pipe.read())
    os.waitpid(pid, 0)
    assert isinstance(error, OSError)
    assert "too few file descriptors" in str(error)
    file.free(mine, ALIGNMENT)
    assert block(file, 2) == mine


def test_a_daemon_that_closes_all_descriptors_gets_an_error_and_no_other_file_is_read(file):
    mine = block(file, 1)
    number = file._file.number()

    def run():
        for other in {*range(3, number + 50)} - {back}:
            with contextlib.suppress(OSError):
                os.close(other)
        zeros = [os.open("/dev/zero", os.O_RDWR) for _ in range(number + 20)]
        try:
            return read(file, mine), zeros
        finally:
            file.close()
            assert all(os.read(zero, 1) == b"\0" for zero in zeros)

    out, back = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = run()
        except BaseException as error:
            result = error
        os.write(back, pickle.dumps(result))
        os._exit(0)
    os.close(back)
    with os.fdopen(out, "rb") as pipe:
        error = pickle.loads(pipe.read())
    os.waitpid(child, 0)
    assert isinstance(error, OSError)
    assert error.errno == errno.EBADF
    assert "closed by other code" in str(error)


def test_a_child_writes_nothing_into_its_parents_file(file):
    mine = block(file, 1)

    def change():
        with pytest.raises(OSError, match="parent process"):
            file.write(mine, memoryview(page(9)))
        with pytest.raises(SwapSpaceError, match="parent process"):
            file.allocate(1)
        return True

    assert Child(change).result() is True
    assert read(file, mine) == {1}


def test_the_file_of_before_move_to_is_kept_as_well(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    device = RamDevice(str(tmp_path / "a"))
    owner = np.full(MIB, 7, np.uint8)
    out = device.copy_out(owner, 0, MIB)
    out.join()
    device.move_to(str(tmp_path / "b"))
    file = out.copy._file

    def fetch():
        back, origin, transfer = device.copy_in(out.copy, MIB, owner.ctypes.data)
        transfer.join()
        return set(back[origin : origin + MIB])

    child = Child(fetch)
    out.copy.free()
    offset = file.allocate(MIB)
    file.write(offset, memoryview(page(8, MIB)))
    assert child.result() == {7}
    device.close()
