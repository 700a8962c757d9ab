"""A folder of results belongs to one living run, whatever the file system knows of locks."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import folder_lock
import psutil
import pytest
from errors import InputError
from folder_lock import FILE, FolderLock
from imagenet_cli import IMAGENET

HOLDER = f"""
import fcntl, sys, time
sys.path.insert(0, {str(IMAGENET)!r})
from pathlib import Path
from errors import InputError
from folder_lock import FolderLock
if sys.argv[2] == "False":
    def flock(*args):
        raise OSError(37, "No locks available")
    fcntl.flock = flock
try:
    FolderLock(Path(sys.argv[1])).acquire()
    print("has it", flush=True)
except InputError as e:
    print(e, flush=True)
time.sleep(600)
"""


@pytest.fixture(params=[True, False], ids=["flock", "no flock"])
def flocks(request, monkeypatch):
    """Whether the file system has locks."""
    if not request.param:

        def flock(*args):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


@pytest.fixture
def start(tmp_path, flocks):
    """Starts processes that want the lock, and returns them with what they say."""
    processes = []

    def start(n=1):
        command = [sys.executable, "-c", HOLDER, str(tmp_path), str(flocks)]
        new = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(n)]
        processes.extend(new)
        return [(process, process.stdout.readline()) for process in new]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def write(folder, host, pid, started):
    (folder / FILE).write_text(json.dumps([host, pid, started]))


def refusal(folder):
    with pytest.raises(InputError) as caught:
        FolderLock(folder).acquire()
    return str(caught.value)


def test_the_second_is_refused_with_host_and_pid_until_the_first_is_killed(tmp_path, start):
    [(process, said)] = start()
    assert said == "has it\n"
    assert refusal(tmp_path) == (
        f"--out {tmp_path}: a run on host {socket.gethostname()} with pid {process.pid} is writing "
        f"there; wait for its end, or choose another folder"
    )
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.release()
    assert os.listdir(tmp_path) == []


def test_of_several_that_start_together_one_gets_it(start):
    said = sorted(line for _, line in start(4))
    assert said[-1] == "has it\n"
    assert all("is writing there" in line for line in said[:-1])


def test_it_can_be_taken_again_after_its_release(tmp_path, flocks):
    for _ in range(3):
        lock = FolderLock(tmp_path)
        lock.acquire()
        assert "with pid" in refusal(tmp_path)
        lock.release()
        lock.release()


def test_another_process_with_the_pid_of_a_dead_run_does_not_have_it(tmp_path, flocks):
    alive = psutil.Process(os.getppid())
    write(tmp_path, socket.gethostname(), alive.pid, alive.create_time() - 1000)
    FolderLock(tmp_path).acquire()


def test_a_living_run_keeps_it_where_the_kernel_does_not_know_its_lock(tmp_path, flocks):
    alive = psutil.Process(os.getppid())
    write(tmp_path, socket.gethostname(), alive.pid, alive.create_time())
    assert f"with pid {alive.pid} is writing" in refusal(tmp_path)


def test_of_a_run_on_another_host_the_lock_decides_or_the_user(tmp_path, flocks):
    write(tmp_path, "far-away", 12, 1e9)
    if flocks:
        FolderLock(tmp_path).acquire()
        return
    assert refusal(tmp_path) == (
        f"--out {tmp_path}: belongs to a run on host far-away with pid 12, and this file system does "
        f"not tell whether that still runs; if it does not, remove {tmp_path / FILE}, else choose "
        f"another folder"
    )
    (tmp_path / FILE).unlink()
    FolderLock(tmp_path).acquire()


@pytest.mark.parametrize("text", ["", "[1]", "{}", '["a", "b", 3]', "\x00\x00"])
def test_a_damaged_file_is_nobodys(tmp_path, flocks, text):
    (tmp_path / FILE).write_text(text)
    FolderLock(tmp_path).acquire()


def test_a_run_that_is_just_ending_is_waited_for(tmp_path, monkeypatch):
    write(tmp_path, socket.gethostname(), 2**22 + 1, 0.0)  # no such process can be
    with open(tmp_path / FILE) as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # of what is left of it
        monkeypatch.setattr(
            folder_lock.time, "sleep", lambda seconds: fcntl.flock(f, fcntl.LOCK_UN)
        )
        FolderLock(tmp_path).acquire()


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / FILE).mkdir()
    assert refusal(tmp_path).startswith(f"--out {tmp_path}: cannot lock {tmp_path / FILE} (")


def test_waiting_for_one_that_does_not_let_go_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_DYING", 0.3)
    with open(tmp_path / FILE, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        begin = time.monotonic()
        assert "another run is writing there" in refusal(tmp_path)
    assert time.monotonic() - begin < 5
