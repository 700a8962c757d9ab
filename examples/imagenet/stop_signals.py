"""Signals that ask a run to end, noticed whatever the main thread is doing.

Python calls handlers between two bytecodes of the main thread. That may be inside MPI, waiting for a rank that never
comes, and then nobody would see a second Ctrl-C. So a thread gets the signals, by way of the pipe into which Python's
handler in C writes their numbers at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType

from launcher import STOP_SIGNALS


def listen(receive: Callable[[int], None]) -> None:
    """Calls ``receive`` with the number of each signal of ``STOP_SIGNALS``, in a thread, from now on.

    A SIGHUP that is ignored, as under nohup, stays ignored.

    Args:
        receive: Called for one signal at a time.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave_to_the_thread)
    threading.Thread(target=_read, args=(reader, receive), name="signals", daemon=True).start()


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Has the processes that start in here, and all that they start, leave ``STOP_SIGNALS`` to this one.

    They inherit that these signals wait for ever. One that this process gets meanwhile itself it handles afterwards.
    """
    start_resource_tracker()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_resource_tracker() -> None:
    """Starts the process in which multiprocessing notes semaphores and shared memory, unless it runs.

    Python starts it when it is needed, on Python 3.14 also for a progress bar or a ``multiprocessing.Queue``. Then
    SIGHUP, SIGUSR1 and SIGUSR2 to all processes of a run would end it, and another one would print tracebacks.
    Started here it leaves ``STOP_SIGNALS`` to this process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()
    finally:  # before Python 3.14 SIGINT and SIGTERM pass again already
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    pass


def _read(reader: int, receive: Callable[[int], None]) -> None:
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number in STOP_SIGNALS:
                receive(number)
