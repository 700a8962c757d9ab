"""Whoever keeps an object alive counts, on every interpreter; who does not, does not."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import copy
import ctypes
import functools
import itertools
import operator
import queue
import sys
import threading
import types
import weakref

import numpy as np
import pytest

import chainer_ooc  # noqa: F401
from chainer_ooc import references
from chainer_ooc.swap.storage import Storage

HOLDERS = {}
NO_HOLDERS = {}


def holds(case):
    """Register a case that keeps what it takes out of a box alive: while it runs, or by what it returns."""
    HOLDERS[case.__name__.replace("_", " ")] = case
    return case


def does_not_hold(case):
    NO_HOLDERS[case.__name__.replace("_", " ")] = case
    return case


# Local variables and arguments. From Python 3.14 on an argument may be borrowed from the caller's variable.


@holds
def a_local_variable(box, check):
    thing = box.pop()
    check()
    del thing


@holds
def an_argument(box, check):
    def called(thing):
        check()

    called(box.pop())


@holds
def an_argument_that_is_borrowed(box, check):
    def called(thing):
        check()

    thing = box.pop()
    called(thing)


@holds
def an_argument_that_is_borrowed_through_many_calls(box, check):
    def called(thing, depth):
        if depth:
            called(thing, depth - 1)
        check()

    thing = box.pop()
    called(thing, 30)


@holds
def an_argument_that_its_function_has_deleted(box, check):
    def called(thing):
        del thing
        check()

    thing = box.pop()
    called(thing)


@holds
def a_copy_of_a_borrowed_argument(box, check):
    def called(thing):
        other = thing
        thing = None
        check()
        return other is thing

    thing = box.pop()
    called(thing)


@holds
def a_keyword_argument(box, check):
    def called(*, thing):
        check()

    called(thing=box.pop())


@holds
def arguments_in_a_tuple_and_in_a_dict(box, check):
    def called(*args, **kwargs):
        kwargs.clear()
        check()

    thing = box.pop()
    both = {"thing": thing}
    del thing
    called(*both.values(), **both)


@holds
def an_argument_of_a_function_called_from_c(box, check):
    return list(map(lambda thing: check(), [box.pop()]))


@holds
def a_borrowed_argument_of_a_function_called_from_c(box, check):
    thing = box.pop()
    functools.partial(lambda one, other: check(), thing)(thing)
    functools.reduce(lambda one, other: check(), [0], thing)


@holds
def the_evaluation_stack(box, check):
    return (box.pop(), check())[1]


@holds
def the_evaluation_stack_below_a_call(box, check):
    return (lambda one, other: None)(box.pop(), check())


@holds
def a_borrowed_reference_on_the_evaluation_stack(box, check):
    thing = box.pop()
    return (thing, check(), thing)[1]


@holds
def what_a_method_is_called_on(box, check):
    class Thing:
        def method(self):
            check()

    carrier = Thing()
    carrier.thing = box.pop()
    carrier.method()


@holds
def the_subject_of_a_loop(box, check):
    for _ in [box.pop()]:
        check()


@holds
def the_context_of_a_with(box, check):
    with contextlib.nullcontext(box.pop()):
        check()


@holds
def a_variable_overwritten_by_way_of_its_frame(box, check):
    def called(thing):
        sys._getframe(1).f_locals["thing"] = None
        check()
        return thing

    thing = box.pop()
    called(thing)
    return thing


@holds
def a_closure(box, check):
    thing = box.pop()
    return lambda: thing


@holds
def a_closure_over_a_borrowed_argument(box, check):
    def called(thing):
        return lambda: thing

    thing = box.pop()
    return called(thing)


@holds
def a_cell(box, check):
    return types.CellType(box.pop())


@holds
def a_default_argument(box, check):
    def called(thing=None):
        pass

    called.__defaults__ = (box.pop(),)
    return called


@holds
def a_global_variable(box, check):
    space = {"box": box}
    exec("thing = box.pop()", space)
    return space


# Frames that are not running, or run elsewhere.


@holds
def a_suspended_generator(box, check):
    def generator():
        thing = box.pop()
        yield
        del thing

    suspended = generator()
    next(suspended)
    return suspended


@holds
def a_generator_that_has_not_begun_with_a_borrowed_argument(box, check):
    def generator(thing):
        yield

    thing = box.pop()
    return generator(thing)


@holds
def a_suspended_generator_with_a_borrowed_argument(box, check):
    def generator(thing):
        yield

    thing = box.pop()
    suspended = generator(thing)
    next(suspended)
    return suspended


@holds
def a_running_generator(box, check):
    def generator():
        thing = box.pop()
        yield check()
        del thing

    next(generator())


@holds
def what_a_generator_was_sent(box, check):
    def generator():
        thing = yield
        yield
        del thing

    suspended = generator()
    next(suspended)
    suspended.send(box.pop())
    return suspended


@holds
def what_is_yielded(box, check):
    def generator():
        yield box.pop()

    for _ in generator():
        check()


@holds
def a_generator_expression(box, check):
    return (None for _ in [box.pop()])


@holds
def a_running_generator_expression(box, check):
    thing = box.pop()
    return [one for one in ((thing, check())[1] for _ in range(1)) if one]


@holds
def a_suspended_coroutine(box, check):
    async def coroutine(thing):
        await event.wait()

    async def main():
        task = asyncio.ensure_future(coroutine(box.pop()))
        await asyncio.sleep(0)
        check()
        event.set()
        await task

    event = asyncio.Event()
    asyncio.run(main())


@holds
def a_variable_of_another_thread(box, check):
    ready, done = threading.Event(), threading.Event()

    def run():
        thing = box.pop()
        ready.set()
        done.wait()
        del thing

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        check()
    finally:
        done.set()
        thread.join()


@holds
def a_borrowed_argument_in_another_thread(box, check):
    ready, done = threading.Event(), threading.Event()

    def called(thing):
        ready.set()
        done.wait()

    def run():
        thing = box.pop()
        called(thing)

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        check()
    finally:
        done.set()
        thread.join()


@holds
def a_traceback(box, check):
    def called():
        thing = box.pop()
        raise ValueError(thing is None)

    try:
        called()
    except ValueError as error:
        return error


@holds
def a_traceback_through_a_borrowed_argument(box, check):
    def called(thing):
        raise ValueError

    def calls():
        thing = box.pop()
        called(thing)

    try:
        calls()
    except ValueError as error:
        error.__traceback__ = (
            error.__traceback__.tb_next.tb_next
        )  # that of the called function alone
        return error


@holds
def the_frame_of_a_function_that_has_returned(box, check):
    def called():
        thing = box.pop()
        return sys._getframe(), thing is None

    return called()


@holds
def the_frame_of_a_function_with_a_borrowed_argument(box, check):
    def called(thing):
        return sys._getframe()

    thing = box.pop()
    return called(thing)


@holds
def an_exception_under_way(box, check):
    def called(thing):
        try:
            raise ValueError
        finally:
            check()

    with contextlib.suppress(ValueError):
        called(box.pop())


@holds
def an_argument_of_an_exception(box, check):
    return ValueError(box.pop())


# Containers and attributes.


@holds
def a_list(box, check):
    return [box.pop()]


@holds
def a_tuple_in_a_tuple(box, check):
    return ((box.pop(),),)


@holds
def a_value_of_a_dict(box, check):
    return {0: box.pop()}


@holds
def an_attribute(box, check):
    return types.SimpleNamespace(thing=box.pop())


@holds
def an_attribute_of_a_class(box, check):
    class Holder:
        thing = box.pop()

    check()
    del Holder.thing  # a class is part of a cycle


@holds
def a_cycle(box, check):
    cycle = [box.pop()]
    cycle.append(cycle)
    check()
    cycle.clear()


@holds
def a_queue(box, check):
    held = queue.SimpleQueue()
    held.put(box.pop())
    return held


@holds
def a_future(box, check):
    future = concurrent.futures.Future()
    future.set_result(box.pop())
    return future


@holds
def a_context_variable(box, check):
    context = contextvars.copy_context()
    context.run(contextvars.ContextVar("thing").set, box.pop())
    return context


# What is implemented in C.


@holds
def a_bound_method(box, check):
    return box.pop().sum


@holds
def a_partial(box, check):
    return functools.partial(print, box.pop())


@holds
def an_iterator(box, check):
    return iter(box.pop())


@holds
def an_iterator_of_itertools(box, check):
    return itertools.cycle([box.pop()])


@holds
def a_memoryview(box, check):
    return memoryview(box.pop())


@holds
def a_slice_of_a_memoryview(box, check):
    return memoryview(box.pop())[1:]


@holds
def a_view(box, check):
    return box.pop()[1:]


@holds
def a_view_of_a_view(box, check):
    return box.pop().reshape(2, -1).T[1:]


@holds
def an_array_of_a_buffer(box, check):
    return np.frombuffer(box.pop(), np.uint8)


@holds
def an_array_of_windows(box, check):
    return np.lib.stride_tricks.sliding_window_view(box.pop(), 2)


@holds
def an_array_of_objects(box, check):
    array = np.empty(1, object)
    array[0] = box.pop()
    return array


@holds
def a_flat_iterator(box, check):
    return box.pop().flat


@holds
def a_broadcast(box, check):
    return np.broadcast(box.pop(), 1)


@holds
def an_nditer(box, check):
    return np.nditer(box.pop())


@holds
def a_capsule_of_dlpack(box, check):
    return box.pop().__dlpack__()


@holds
def an_object_of_ctypes(box, check):
    return (ctypes.c_char * 8).from_buffer(box.pop())


@holds
def the_ctypes_of_an_array(box, check):
    return box.pop().ctypes


@holds
def a_pointer_of_ctypes(box, check):
    return ctypes.py_object(box.pop())


@holds
def a_function_of_numpy_that_runs(box, check):
    np.frompyfunc(lambda x: check(), 1, 1)(box.pop())


@holds
def a_function_of_numpy_that_runs_on_a_borrowed_argument(box, check):
    thing = box.pop()
    np.frompyfunc(lambda x: check(), 1, 1)(thing)


@holds
def a_sort_under_way(box, check):
    [box.pop()].sort(key=lambda thing: check())


@holds
def a_copy_under_way(box, check):
    class Copied:
        def __deepcopy__(self, memo):
            check()

    copy.deepcopy([box.pop(), Copied()])


# Nobody.


@does_not_hold
def nobody(box, check):
    box.clear()


@does_not_hold
def a_weak_reference(box, check):
    return weakref.ref(box.pop())


@does_not_hold
def a_weak_dictionary(box, check):
    held = weakref.WeakValueDictionary()
    held[0] = box.pop()
    return held


@does_not_hold
def an_address(box, check):
    thing = box.pop()
    return id(thing), thing.__array_interface__, thing.ctypes.data


@does_not_hold
def a_copy(box, check):
    return box.pop().copy()


@does_not_hold
def a_variable_that_was_deleted(box, check):
    thing = box.pop()
    del thing
    check()


@does_not_hold
def a_variable_that_got_another_value(box, check):
    for thing in (box.pop(), None):  # noqa: B007
        pass
    check()


@does_not_hold
def an_argument_of_a_call_that_is_over(box, check):
    def called(thing):
        return thing.shape

    thing = box.pop()
    shape = called(thing)
    del thing
    check()
    return shape


@does_not_hold
def an_argument_that_was_passed_on_and_deleted(box, check):
    def called(thing):
        del thing
        check()

    called(box.pop())


@does_not_hold
def a_generator_that_is_over(box, check):
    def generator(thing):
        yield

    thing = box.pop()
    done = generator(thing)
    list(done)
    return done


@does_not_hold
def an_exception_that_was_handled(box, check):
    def called(thing):
        raise ValueError

    with contextlib.suppress(ValueError):
        called(box.pop())
    check()


class _Slot:
    __slots__ = ("thing",)


class _Attribute:
    pass


class _Place:
    """Where an object lies, as each function is told it."""

    def __init__(self, ask, holder, key, put, get):
        self.ask, self.holder, self.key, self._put, self._get = ask, holder, key, put, get
        self.put(np.arange(16))

    def put(self, thing):
        self._put(self.holder, self.key, thing)

    def fetch(self):
        return self._get(self.holder, self.key)

    def is_held(self):
        return self.ask(self.holder, self.key)

    def is_kept_alive(self):
        """Tell whether the object would live on if it did not lie here: if anybody else holds it."""
        reference = weakref.ref(self.fetch())
        self.put(None)
        alive = reference() is not None
        self.put(reference() if alive else np.arange(16))
        return alive


class _Manager:
    def defer_free(self, storage):
        pass


def _storage():
    storage = Storage(_Manager(), 1, None, 128, 0, "F.test")
    return _Place(
        lambda holder, key: holder.referenced_externally, storage, "owner", setattr, getattr
    )


attribute = references.attribute_is_referenced_externally
item = references.item_is_referenced_externally
PLACES = {
    "slot": lambda: _Place(attribute, _Slot(), "thing", setattr, getattr),
    "attribute": lambda: _Place(attribute, _Attribute(), "thing", setattr, getattr),
    "dict": lambda: _Place(item, {}, "thing", operator.setitem, operator.getitem),
    "list": lambda: _Place(item, [None], 0, operator.setitem, operator.getitem),
    "storage": _storage,
}


def try_out(case, place, expected):
    """Run a case once. Its object is held as expected, and that is true: it would live, or die."""
    checks = []

    def check():
        checks.append((place.is_held(), place.is_kept_alive()))

    assert not place.is_held()
    box = [place.fetch()]
    kept = case(box, check)
    assert not box
    if not checks:
        check()
    assert set(checks) == {(expected, expected)}
    del kept
    assert not place.is_held()


# Often: the interpreter exchanges instructions of what runs often, and compiles what runs very often.
@pytest.mark.parametrize("rounds", [1, 50])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", HOLDERS)
def test_whoever_keeps_it_alive_holds_it(name, place, rounds):
    for _ in range(rounds):
        try_out(HOLDERS[name], PLACES[place](), True)


@pytest.mark.parametrize("rounds", [1, 50])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NO_HOLDERS)
def test_whoever_does_not_keep_it_alive_does_not_hold_it(name, place, rounds):
    for _ in range(rounds):
        try_out(NO_HOLDERS[name], PLACES[place](), False)


@pytest.mark.parametrize("place", PLACES)
def test_it_is_so_however_often_it_is_asked(place):
    place = PLACES[place]()
    for _ in range(20_000):
        assert not place.is_held()
    another = place.fetch()
    for _ in range(20_000):
        assert place.is_held()
    del another
    assert not place.is_held()


@pytest.mark.parametrize("start", [sys.settrace, sys.setprofile])
def test_it_is_so_while_a_debugger_or_profiler_watches(start):
    def watch(frame, event, arg):
        return watch

    before = sys.gettrace(), sys.getprofile()
    start(watch)
    try:
        for place in PLACES.values():
            for name in ("a local variable", "an argument that is borrowed", "a view"):
                try_out(HOLDERS[name], place(), True)
            try_out(NO_HOLDERS["nobody"], place(), False)
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])


@pytest.mark.parametrize("immortal", [None, True, 1, "interned", ()])
def test_what_never_dies_is_held(immortal):
    place = PLACES["slot"]()
    place.put(immortal)
    assert place.is_held()
    assert item([immortal], 0)


def test_what_is_not_there_is_an_error():
    with pytest.raises(AttributeError):
        attribute(_Slot(), "thing")
    with pytest.raises(KeyError):
        item({}, "thing")
    with pytest.raises(IndexError):
        item([], 0)


@pytest.mark.parametrize(
    "count",
    [lambda thing: 2, lambda thing: next(rising), lambda thing: -sys.getrefcount(thing)],
    ids=["constant", "rising", "falling"],
)
def test_counts_that_tell_nothing_are_found_out(monkeypatch, count):
    for name in ("getrefcount", "_of_attribute", "_of_item"):
        monkeypatch.setattr(references, name, getattr(references, name))
    monkeypatch.setattr(references, "getrefcount", count)
    with pytest.raises(RuntimeError, match="out-of-core mode needs CPython"):
        references._calibrate()


rising = itertools.count()
