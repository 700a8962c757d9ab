"""Mortal: what is done when an object dies is done whole, and no error of a signal's handler is lost in it."""

from __future__ import annotations

import collections
import ctypes
import functools
import gc
import os
import random
import signal
import sys
import time
import weakref

import pytest

from chainer_ooc.swap.devices.ram import native

if native.allocator is None:
    pytest.skip("the C extension is not built here", allow_module_level=True)


class Interrupt(BaseException):
    """What the handler raises."""


class Deaths:
    """What has happened so far: handlers that ran, and deaths that began, and ended."""

    def __init__(self):
        self.handled = self.begun = self.ended = 0

    def handle(self, number, frame):
        self.handled += 1
        raise Interrupt(number)


def interrupt():
    os.kill(os.getpid(), signal.SIGUSR1)
    for _ in range(1000):  # bytecodes, between which the handler would run
        pass


@pytest.fixture
def deaths():
    """Count; SIGUSR1 and the alarm clock are handled by raising an error."""
    callbacks, gc.callbacks[:] = gc.callbacks[:], []  # hypothesis has one: an error in it is lost
    counts = Deaths()
    numbers = signal.SIGUSR1, signal.SIGALRM
    before = [signal.signal(number, counts.handle) for number in numbers]
    yield counts
    gc.callbacks[:] = callbacks
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def ignored(monkeypatch):
    """Return the errors that nobody could be told of."""
    errors = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: errors.append(told.exc_value))
    return errors


class Signalling:
    """Sends a signal when it dies, with no bytecode: by a function of C."""

    _raise = ctypes.CDLL(None)["raise"]
    _raise.argtypes = ctypes.c_int, ctypes.py_object

    def __init__(self):
        self.reference = None
        _references.append(weakref.ref(self, functools.partial(self._raise, signal.SIGUSR1)))


_references = []


@pytest.fixture
def dying(deaths):
    """Return a class whose instances count their deaths, and call what they were given."""

    class Dying(native.Mortal):
        action = staticmethod(lambda: None)

        def _die(self):
            deaths.begun += 1
            self.action()
            for _ in range(30):
                pass
            deaths.ended += 1

    return Dying


def dies(one):
    pass


def dies_in_a_cycle(one):
    gc.collect()  # what others have left: a handler may run in their finalizers, too
    one.me = one
    del one
    gc.collect()


def dies_with_another(one):
    one.other = type(one)()


def dies_in_a_finalizer(one):
    class Finalized:
        def __del__(self):
            del self.one

    holder = Finalized()
    holder.one = one


def dies_as_it_is_replaced(one):
    places = {"x": one}
    del one
    places["x"] = None


def holding_in_attributes(both):
    class Holder:
        def clear(self):
            self.__dict__ = {}

    holder = Holder()
    holder.first, holder.last = both
    return holder


WAYS = [dies, dies_in_a_cycle, dies_with_another, dies_in_a_finalizer, dies_as_it_is_replaced]


@pytest.mark.parametrize("way", WAYS)
def test_a_signal_in_a_death_is_handled_after_it(way, dying, deaths, ignored):
    def live():
        one = dying()
        one.action = interrupt
        return one

    with pytest.raises(Interrupt):
        way(live())
        for _ in range(9):
            pass
    assert (deaths.handled, ignored) == (1, [])
    assert deaths.begun == deaths.ended >= 1


@pytest.mark.parametrize("holder", [list, collections.deque, holding_in_attributes])
def test_a_signal_that_came_just_before_a_death_is_handled_before_it(
    holder, dying, deaths, ignored
):
    """No bytecode runs between the two."""
    handled = []
    one = dying()
    one.action = lambda: handled.append(deaths.handled)
    both = [Signalling(), one]
    if holder is list:  # which lets go of its last item first
        both.reverse()
    both = holder(both)
    with pytest.raises(Interrupt):
        del one
        both.clear()
        for _ in range(9):
            pass
    assert (handled, deaths.handled, deaths.begun, deaths.ended, ignored) == ([1], 1, 1, 1, [])


def test_an_error_on_its_way_and_one_of_a_handler_both_arrive(dying, deaths, ignored):
    def one():
        temporary = dying()
        temporary.action = interrupt
        return temporary

    def fail():
        raise KeyError("mine")

    with pytest.raises(Interrupt) as caught:
        try:
            [one(), fail()]
        except KeyError:
            for _ in range(9):
                pass
    assert repr(caught.value.__context__) == repr(KeyError("mine"))
    assert (deaths.handled, deaths.begun, deaths.ended, ignored) == (1, 1, 1, [])


def test_an_error_of_the_death_itself_is_told_and_the_signal_arrives(dying, deaths, ignored):
    def fail():
        interrupt()
        raise ZeroDivisionError

    one = dying()
    one.action = fail
    with pytest.raises(Interrupt):
        del one
        for _ in range(9):
            pass
    assert [type(error) for error in ignored] == [ZeroDivisionError]


# In a finalizer of Python itself what a handler raises is lost.
@pytest.mark.parametrize("way", [way for way in WAYS if way is not dies_in_a_finalizer])
def test_deaths_are_whole_and_no_signal_is_lost_whenever_it_comes(way, dying, deaths, ignored):
    moments = random.Random(0)
    for _ in range(60):
        deaths.handled = 0
        deadline = time.monotonic() + 30
        with pytest.raises(Interrupt):
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-5, 1e-3))
            while not deaths.handled and time.monotonic() < deadline:
                way(dying())
            for _ in range(9):
                pass
        gc.collect(0)
        assert (deaths.handled, deaths.begun, ignored) == (1, deaths.ended, [])
