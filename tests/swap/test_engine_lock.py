"""EngineLock: one thread at a time, and no signal handler interrupts what is done under it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from chainer_ooc.swap import native

if native.allocator is None:
    pytest.skip("the C extension is not built here", allow_module_level=True)


class Interrupt(BaseException):
    """What the handler raises."""


@pytest.fixture
def lock():
    return native.EngineLock()


@pytest.fixture
def handled():
    """Handle SIGUSR1, in Python, by taking note of it and raising an error; give the list of notes."""
    notes = []

    def handle(number, frame):
        notes.append(number)
        raise Interrupt(number)

    before = signal.signal(signal.SIGUSR1, handle)
    time.sleep(0.002)  # handlers are looked at once in a millisecond
    yield notes
    signal.signal(signal.SIGUSR1, before)


def interrupt():
    os.kill(os.getpid(), signal.SIGUSR1)
    for _ in range(1000):  # bytecodes, between which the handler would run
        pass


def test_a_signal_waits_until_the_lock_is_free(lock, handled):
    with pytest.raises(Interrupt):
        with lock:
            with lock:
                interrupt()
            interrupt()
            assert not handled
        pytest.fail("the handler has not run when the lock was let go")
    assert handled == [signal.SIGUSR1]  # of the same signals one is left, as the system has it
    with pytest.raises(Interrupt):
        interrupt()


def test_the_lock_is_free_when_the_handler_runs(lock):
    owned = []
    before = signal.signal(signal.SIGUSR1, lambda *_: owned.append(lock._is_owned()))
    time.sleep(0.002)
    with lock:
        interrupt()
        assert not owned
    assert owned == [False]
    signal.signal(signal.SIGUSR1, before)


def test_what_the_program_sees_of_its_handlers_does_not_change(lock, handled):
    handler = signal.getsignal(signal.SIGUSR1)
    of_ctrl_c = signal.getsignal(signal.SIGINT)
    with lock:
        assert signal.getsignal(signal.SIGUSR1) is handler
    assert signal.getsignal(signal.SIGINT) is of_ctrl_c
    assert signal.getsignal(signal.SIGRTMAX) == signal.SIG_DFL


def test_handlers_of_each_kind_are_left_as_they_are(lock):
    for other in (signal.SIG_IGN, signal.SIG_DFL):
        before = signal.signal(signal.SIGURG, other)
        time.sleep(0.002)
        with lock:
            os.kill(os.getpid(), signal.SIGURG)  # it is ignored by default, too
        assert signal.signal(signal.SIGURG, before) == other


def test_a_signal_that_came_before_is_handled_before_the_lock_is_taken(lock, handled):
    for _ in range(50):
        with pytest.raises(Interrupt):
            os.kill(os.getpid(), signal.SIGUSR1)
            with lock:
                pass
        assert not lock._is_owned()


def test_two_signals_are_both_handled(lock, handled):
    more = []
    before = signal.signal(signal.SIGUSR2, lambda *_: more.append(1))
    time.sleep(0.002)
    with pytest.raises(Interrupt), lock:
        os.kill(os.getpid(), signal.SIGUSR2)
        interrupt()
    for _ in range(10):
        pass
    assert (handled, more) == ([signal.SIGUSR1], [1])
    signal.signal(signal.SIGUSR2, before)


def test_an_error_of_what_is_done_under_it_is_not_lost(lock):
    with pytest.raises(KeyError, match="mine"), lock:
        raise KeyError("mine")
    assert not lock._is_owned()


def test_another_thread_that_has_it_holds_no_signal_back(lock, handled):
    taken, over = threading.Event(), threading.Event()

    def work():
        with lock:
            taken.set()
            over.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    taken.wait(30)
    try:
        with pytest.raises(Interrupt):
            interrupt()
    finally:
        over.set()
        thread.join()


def test_one_thread_at_a_time(lock):
    count, inside = [0], []

    def work():
        for _ in range(2000):
            with lock, lock:
                inside.append(1)
                count[0] += len(inside)
                inside.pop()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert count == [8000]


def test_whose_it_is(lock):
    assert not lock._is_owned()
    with lock:
        assert lock._is_owned()
        thread_says = []
        thread = threading.Thread(target=lambda: thread_says.append(lock._is_owned()))
        thread.start()
        thread.join()
        assert thread_says == [False]
    with pytest.raises(RuntimeError, match="cannot release an EngineLock"):
        lock.__exit__(None, None, None)
    with pytest.raises(TypeError, match="takes no arguments"):
        native.EngineLock(1)


def test_it_is_acquired_in_time_or_not_at_all(lock):
    assert lock.acquire() and lock.acquire(blocking=False)
    waited = []

    def work():
        waited.append(lock.acquire(blocking=False))
        begun = time.monotonic()
        waited.append(lock.acquire(timeout=0.2))
        waited.append(time.monotonic() - begun >= 0.2)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert waited == [False, False, True]
    lock.release()
    lock.release()
    assert not lock._is_owned()


@pytest.mark.parametrize("forks_in_main_thread", [True, False])
def test_signals_reach_a_child_that_was_forked_under_the_lock(lock, forks_in_main_thread, handled):
    statuses = []

    def fork():
        with lock:
            child = os.fork()
        if child:
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            return
        own = native.EngineLock()
        try:
            with own:
                interrupt()
            os._exit(1)
        except Interrupt:
            os._exit(0 if handled == [signal.SIGUSR1] else 2)
        finally:
            os._exit(3)

    if forks_in_main_thread:
        fork()
    else:
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    assert statuses == [0]
