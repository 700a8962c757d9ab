"""The properties of C do what those of Python do: the same values, errors and calls."""

import gc
import itertools
import sys
import weakref

import pytest

from chainer_ooc.swap.devices.ram import native

pytestmark = pytest.mark.extension


class StandIn:
    pass


class Derived(StandIn):
    pass


def classes():
    """Two classes with the same property, in Python and in C, and the calls that each has made."""
    made = []
    for of_c in (False, True):
        calls = []

        def get(self, calls=calls):
            calls.append("get")
            return "asked", self.__dict__.get("x")

        def put(self, value, calls=calls):
            calls.append("set")
            self.__dict__["x"] = value

        def python(self, get=get):
            told = "ask" in self.__dict__ or type(self.__dict__.get("x", ...)) in (
                StandIn,
                type(...),
            )
            return get(self) if told else self.__dict__["x"]

        def python_put(self, value, put=put):
            if self.__dict__.get("x") is None:
                self.__dict__["x"] = value
            else:
                put(self, value)

        found = (
            native.allocator.FastProperty("x", "ask", StandIn, get, put, "doc")
            if of_c
            else property(python, python_put, doc="doc")
        )
        made.append((type("Holder", (), {"x": found}), calls))
    return made


VALUES = (None, 3, (), StandIn(), Derived(), StandIn)


@pytest.mark.parametrize("first,second", [*itertools.product(VALUES, VALUES)])
def test_both_do_the_same(first, second):
    seen = []
    for cls, calls in classes():
        one, log = cls(), []
        log.append(one.x)
        one.x = first
        log.append(one.x)
        one.x = second
        log.append(one.x)
        one.__dict__["ask"] = None
        log.append(one.x)
        one.x = first
        log.append(one.x)
        one.__dict__.clear()
        log += [one.x, cls.x.__doc__, list(calls)]
        seen.append(log)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("do", ["delete", "get", "set"])
def test_errors_are_pythons(do):
    class Error(Exception):
        pass

    def fail(*args):
        raise Error

    cls = type("Holder", (), {"x": native.allocator.FastProperty("x", None, StandIn, fail, fail)})
    one = cls()
    if do == "delete":
        with pytest.raises(AttributeError, match="x cannot be deleted"):
            del one.x
        return
    one.__dict__["x"] = StandIn()
    with pytest.raises(Error):
        one.x if do == "get" else setattr(one, "x", 1)
    assert type(one.__dict__["x"]) is StandIn


def test_an_object_without_a_dict_is_pythons():
    def get(self):
        return self.y

    class Slotted:
        __slots__ = ("y",)
        x = native.allocator.FastProperty("x", "ask", StandIn, get, lambda self, value: None)

    one = Slotted()
    with pytest.raises(AttributeError):
        _ = one.x
    one.y = 2
    assert one.x == 2
    one.x = 3
    assert one.x == 2


@pytest.mark.parametrize("arguments", [(), ("x",), (1, None, int, int, int), ("x", None)])
def test_wrong_arguments_are_errors(arguments):
    with pytest.raises(TypeError):
        native.allocator.FastProperty(*arguments)


def test_it_keeps_nothing_and_is_collected():
    class Holder:
        pass

    def get(self):
        return None

    Holder.x = native.allocator.FastProperty("x", "ask", StandIn, get, get)
    get.cycle = Holder
    one, value = Holder(), object()
    count = sys.getrefcount(value)
    for _ in range(1000):
        one.__dict__.pop("x", None)
        one.x = value
        assert one.x is value
    assert sys.getrefcount(value) == count + 1
    gone = weakref.ref(Holder)
    del Holder, get, one
    gc.collect()
    assert gone() is None


class Variable:
    def __init__(self, **values):
        self.__dict__.update(values)


class Node:
    pass


@pytest.mark.parametrize(
    "change,asked",
    [
        ({}, False),
        ({"_data": [None]}, False),
        ({"_has_chainerx_array": True}, True),
        ({"_data": []}, True),
        ({"_data": (1,)}, True),
        ({"_node": None}, True),
        ({"_node": "private"}, True),
        ({"_data": ...}, True),
        ({"_node": ...}, True),
    ],
)
def test_the_raw_array_is_pythons_unless_it_is_plain(change, asked):
    calls = []
    Variable.raw_array = native.allocator.RawArray(
        "_data", "private", None, lambda self: calls.append(self) or "asked", None, "doc"
    )
    node = Node()
    values = {"_has_chainerx_array": False, "_node": node, "_data": [5]} | change
    if values["_node"] == "private":
        values["_node"] = node
        node.private = True
    one = Variable(**{name: value for name, value in values.items() if value is not ...})
    assert one.raw_array == ("asked" if asked else values["_data"][0])
    assert bool(calls) == asked
    with pytest.raises(AttributeError, match="_data cannot be set"):
        one.raw_array = 1
