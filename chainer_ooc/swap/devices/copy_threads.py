"""Threads that copy between memory and the swap file, piece by piece."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from chainer_ooc.swap.devices.protocol import Span
from chainer_ooc.swap.system import forks

__all__ = ["PIECE", "THREADS", "CopyThreads", "FileTransfer"]

#: The threads of a device, and the largest piece of a storage that one copies at a time (bytes).
THREADS, PIECE = 4, 16 << 20

_Jobs = SimpleQueue[Callable[[], object] | None]


class CopyThreads:
    """Run jobs in the order in which they were submitted. They record their own end and raise nothing.

    There are no futures: each has a lock and a condition of its own, a cost for many small copies. The
    threads begin with the first job. They end before the process forks and begin anew with the next job.

    Args:
        count: The number of threads.
        name: The prefix of their names.
    """

    def __init__(self, count: int = THREADS, name: str = "chainer_ooc-copy") -> None:
        self._count = count
        self._name = name
        self._lock = threading.RLock()
        self._jobs: _Jobs
        self._threads: list[threading.Thread] = []
        self._ending: list[threading.Thread] = []
        _alive.add(self)

    def submit(self, job: Callable[[], object]) -> None:
        """Queue ``job`` for the next free thread.

        If no thread can start, as when the interpreter is about to end, the calling thread runs it.
        """
        with self._lock:
            if not self._threads:
                self._begin()
            if self._threads:
                self._jobs.put(job)
                return
        job()

    def close(self) -> None:
        """Wait until all jobs have ended, and end the threads."""
        with self._lock:
            self.__del__()
            self._ending += self._threads
            self._threads = []
        for thread in tuple(self._ending):
            _join(thread)
            with contextlib.suppress(ValueError):  # another thread removed it already
                self._ending.remove(thread)

    def _begin(self) -> None:
        self._jobs = SimpleQueue()
        with contextlib.suppress(RuntimeError):  # the system allows no more threads
            for n in range(0 if _is_over else self._count):
                name = f"{self._name}_{n}"
                thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():
            for _ in self._threads:
                self._jobs.put(None)


_alive: weakref.WeakSet[CopyThreads] = weakref.WeakSet()
_is_over = False


@atexit.register
def _close_all() -> None:
    """End all threads before the interpreter ends, so that none reads into freed memory."""
    global _is_over
    _is_over = True
    for threads in tuple(_alive):
        threads.close()


def _before_fork() -> None:
    """End all threads before a fork. A child would get half of their copies; Python 3.12 warns of threads."""
    everything = tuple(_alive)
    forks.hold([threads._lock for threads in everything])
    for threads in everything:
        threads.close()


def _after_fork() -> None:
    for threads in tuple(_alive):
        threads._lock, threads._threads, threads._ending = threading.RLock(), [], []


forks.register(_after_fork, _before_fork)


class FileTransfer:
    """The pieces of a storage that threads carry to the swap file, or back.

    Args:
        copy: The block that they write or read.
        count: The number of pieces. Each goes to :meth:`run` once.
    """

    def __init__(self, copy: Any, count: int) -> None:
        self.copy = copy
        self._left = count
        self._lock = threading.Lock()
        self._under_way = threading.Lock()  # held until the last piece has ended
        self._begin, self._end = math.inf, 0.0
        self._error: BaseException | None = None
        if count:
            self._under_way.acquire()

    def run(self, piece: Callable[[], Span]) -> None:
        """Write or read one piece, in any thread. Errors are kept for :meth:`join`."""
        begin, end = math.inf, 0.0
        try:
            begin, end = piece()
        except BaseException as error:
            self._error = self._error or error
        with self._lock:
            self._begin, self._end = min(self._begin, begin), max(self._end, end)
            self._left -= 1
            if not self._left:
                self._under_way.release()
        del self  # else its error refers to this frame, and so to itself

    def done(self) -> bool:
        """Return whether all pieces have ended."""
        return not self._left

    def wait(self) -> None:
        """Wait for all pieces. Errors are not raised."""
        with self._under_way:
            pass

    def join(self) -> None:
        """Wait for all pieces and raise the first error."""
        self.wait()
        try:
            if self._error is not None:
                raise self._error
        finally:
            del self  # likewise

    def span(self) -> Span | None:
        """Return when the first piece began and the last one ended."""
        is_over = self._end and not self._left and self._error is None
        return (self._begin, self._end) if is_over else None

    def arrival(self) -> float | None:
        """Return when the last piece ended."""
        span = self.span()
        return span[1] if span else None


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # it may refer to memory until the next job comes


def _join(thread: threading.Thread) -> None:
    if thread is threading.current_thread():  # a finalizer may fork in any thread
        return
    thread.join()
    # Python's warning counts the kernel's threads, which the kernel forgets shortly after a join.
    task, deadline = f"/proc/self/task/{thread.native_id}", time.monotonic() + 1
    while os.path.exists(task) and time.monotonic() < deadline:
        time.sleep(0)
