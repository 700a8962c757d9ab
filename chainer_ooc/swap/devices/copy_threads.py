"""CopyThreads: run what is given to them, in the order in which it is given."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["CopyThreads"]

_Jobs = SimpleQueue[Callable[[], object] | None]


class CopyThreads:
    """Threads for jobs that tell by themselves that they have ended, and raise nothing.

    They do without futures: each has a lock and a condition of its own, which many small copies pay for.

    Args:
        count: How many.
        name: Their names begin with it.
    """

    def __init__(self, count: int, name: str) -> None:
        self._jobs: _Jobs = SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._jobs,), name=f"{name}_{n}", daemon=True)
            for n in range(count)
        ]
        for thread in self._threads:
            thread.start()
        _alive.add(self)

    def submit(self, job: Callable[[], object]) -> None:
        """Have a thread run ``job`` after all that were given before have begun."""
        self._jobs.put(job)

    def close(self) -> None:
        """Wait until all jobs have ended, and end the threads."""
        self.__del__()
        for thread in self._threads:
            thread.join()

    def __del__(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)


_alive: weakref.WeakSet[CopyThreads] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before the interpreter ends: no thread reads into memory any more."""
    for threads in tuple(_alive):
        threads.close()


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # it may refer to memory, and the next one may come late
