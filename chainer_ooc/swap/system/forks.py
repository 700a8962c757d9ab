"""What is done about forks: a child must not have half of a change that another thread was making."""

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

#: As long a fork waits for the locks of others (seconds): not for ever, since a finalizer that runs in a thread that
#: holds one may wait for the thread that forks.
PATIENCE = 60.0

_lock: Any = threading.RLock()  # one fork at a time
_held: list[Any] = []
_interrupts: list[int] = []
# Weak: what os.register_at_fork() has outlives all modules, and would keep alive what they hold until the very end.
_before: list[weakref.ref[Callable[[], None]]] = []
_in_child: list[weakref.ref[Callable[[], None]]] = []


def register(in_child: Callable[[], None], before: Callable[[], None] | None = None) -> None:
    """Have functions of a module called at each fork of the process, as long as there is that module.

    Args:
        in_child: Called in the child; those registered first come first. A lock that another thread had is of no
            use there: make new ones.
        before: Called before it, and once more if Ctrl-C interrupts it; those registered last come first. May
            :func:`hold` locks.
    """
    _in_child.append(weakref.ref(in_child))
    if before is not None:
        _before.insert(0, weakref.ref(before))


def _living(functions: list[weakref.ref[Callable[[], None]]]) -> list[Callable[[], None]]:
    return [function for reference in functions if (function := reference()) is not None]


def hold(locks: Iterable[Any]) -> None:
    """Acquire reentrant locks until the fork is over, in an order in which no two threads can wait for each other."""
    left = list(locks)
    deadline = time.monotonic() + PATIENCE
    while left:
        if not left[0].acquire(timeout=max(deadline - time.monotonic(), 0)):
            return
        held = [left[0]]
        for lock in left[1:]:
            if not lock.acquire(blocking=False):
                # Whoever has it may be waiting for one of ours.
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
    _held.clear()  # before another thread that forks may add to it
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
# Once more, when nothing of Python runs any more that is called at a fork.
os.register_at_fork(after_in_parent=functools.partial(_interrupts.sort, key=_thread.interrupt_main))
