"""Find out whether anything else refers to an object, by its reference count.

The count includes references of the question itself. Their number depends on the interpreter and on how the
object is passed: a temporary result on the evaluation stack counts one; a local variable that is passed on
counts one more up to Python 3.13, and none from 3.14 on, where the stack borrows it. So these functions
take the place where the object lies, not the object, and fetch it themselves. That always adds the same
number of references. It is measured when this module is imported, on objects to which nothing else refers.

Every reference that keeps an object alive counts: from a local variable of a running or suspended frame, a
container, a traceback, C code. A borrowed reference does not count, but the one from which it is borrowed
does. Weak references and bare addresses do not count. Objects that never die, such as ``None``, always
count as referred to.
"""

from __future__ import annotations

import operator
from sys import getrefcount
from typing import Any

__all__ = ["attribute_is_referenced_externally", "item_is_referenced_externally"]

# The counts when nothing but the attribute, or the container, refers to the object.
_of_attribute = 0
_of_item = 0

#: The number of trials of each shape: the interpreter specializes instructions that run often.
_ROUNDS = 64


def attribute_is_referenced_externally(holder: Any, name: str) -> bool:
    """Return whether anything but an attribute refers to its value.

    A variable of the caller that refers to the value counts, too.

    Args:
        holder: The object that has the attribute, in a slot or in its ``__dict__``.
        name: The attribute's name.

    Raises:
        AttributeError: If there is no such attribute.
    """
    return getrefcount(getattr(holder, name)) > _of_attribute


def item_is_referenced_externally(container: Any, key: Any) -> bool:
    """Return whether anything but a ``dict`` or a ``list`` refers to one of its values.

    A variable of the caller that refers to the value counts, too.

    Args:
        container: The ``dict`` or the ``list``.
        key: The key of the value, or its index.

    Raises:
        LookupError: If there is no such value.
    """
    return getrefcount(container[key]) > _of_item


class _Slot:
    __slots__ = ("thing",)
    thing: object


class _Attribute:
    thing: object


def _calibrate() -> None:
    """Measure the references that the functions above and the object's place add themselves.

    Raises:
        RuntimeError: If the counts of this interpreter do not show whether anything else refers to an
            object.
    """
    global _of_attribute, _of_item

    slot, attribute = _Slot(), _Attribute()
    slot.thing, attribute.thing = object(), object()
    items, values = [object()], {"thing": object()}
    _of_attribute, _of_item = getrefcount(slot.thing), getrefcount(items[0])
    shapes: list[tuple[Any, Any, Any, Any]] = [
        (attribute_is_referenced_externally, getattr, slot, "thing"),
        (attribute_is_referenced_externally, getattr, attribute, "thing"),
        (item_is_referenced_externally, operator.getitem, items, 0),
        (item_is_referenced_externally, operator.getitem, values, "thing"),
    ]
    for _ in range(_ROUNDS):
        for is_referenced, fetch, holder, key in shapes:
            alone = is_referenced(holder, key)
            another = fetch(holder, key)
            shared = is_referenced(holder, key)
            del another
            if alone or not shared:
                raise RuntimeError(
                    "this interpreter's reference counts do not tell whether anything else refers to an object; "
                    "out-of-core mode needs CPython"
                )


_calibrate()
