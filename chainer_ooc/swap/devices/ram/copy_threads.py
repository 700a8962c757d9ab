"""Threads that run jobs in the order in which they were submitted."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue

from chainer_ooc.swap.system import forks

__all__ = ["CopyThreads"]

_Jobs = SimpleQueue[Callable[[], object] | None]


class CopyThreads:
    """Run jobs that record their own end and raise nothing.

    There are no futures: each has a lock and a condition of its own, a cost for many small copies. The
    threads end before the process forks and begin anew with the next job.

    Args:
        count: The number of threads.
        name: The prefix of their names.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._lock = threading.RLock()
        self._jobs: _Jobs
        self._threads: list[threading.Thread] = []
        self._ending: list[threading.Thread] = []
        self._begin()
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
