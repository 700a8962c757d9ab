"""Make forks safe: a child never sees half of a change that another thread was making."""

from __future__ import annotations

import _thread
import functools
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["hold", "register"]

#: The longest wait of a fork for other threads' locks (seconds). It is finite, since a finalizer in a thread that
#: holds one may wait for the thread that forks.
PATIENCE = 60.0

_lock: Any = threading.RLock()  # one fork at a time
_held: list[Any] = []
_interrupts: list[int] = []
# Weak: functions given to os.register_at_fork() outlive all modules and would keep their objects alive.
_before: list[weakref.ref[Callable[[], None]]] = []
_in_child: list[weakref.ref[Callable[[], None]]] = []


def register(in_child: Callable[[], None], before: Callable[[], None] | None = None) -> None:
    """Call functions of a module at each fork, for as long as the module exists.

    Args:
        in_child: Called in the child, in the order of registration. It makes new locks: those of other
            threads are useless in the child.
        before: Called before the fork, in the reverse order of registration, and again if Ctrl-C interrupts
            it. It may :func:`hold` locks.
    """
    _in_child.append(weakref.ref(in_child))
    if before is not None:
        _before.insert(0, weakref.ref(before))


def _living(functions: list[weakref.ref[Callable[[], None]]]) -> list[Callable[[], None]]:
    return [function for reference in functions if (function := reference()) is not None]


def hold(locks: Iterable[Any]) -> None:
    """Acquire reentrant locks until the fork is over, in an order that cannot deadlock."""
    left = list(locks)
    deadline = time.monotonic() + PATIENCE
    while left:
        if not left[0].acquire(timeout=max(deadline - time.monotonic(), 0)):
            return
        held = [left[0]]
        for lock in left[1:]:
            if not lock.acquire(blocking=False):
                # Its owner may be waiting for one of ours.
                for other in held:
                    other.release()
                left.remove(lock)
                left.insert(0, lock)
                break
            held.append(lock)
        else:
            _held.extend(held)
            return


def _before_fork() -> None:
    hold([_lock])
    _interrupts.clear()
    for function in _living(_before):
        try:
            function()
        except KeyboardInterrupt:  # Python would print and forget what is raised here
            _interrupts.append(signal.SIGINT)
            function()


def _after_fork_in_parent() -> None:
    held = list(_held)
    _held.clear()  # before another forking thread adds to it
    while held:
        held.pop().release()


def _after_fork_in_child() -> None:
    global _lock
    _after_fork_in_parent()
    _lock = threading.RLock()
    for function in _living(_in_child):
        function()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
# Deliver the interrupts again after all other fork handlers of Python.
os.register_at_fork(after_in_parent=functools.partial(_interrupts.sort, key=_thread.interrupt_main))
