"""Save the arrays that functions keep as attributes: masks, indexes, scales, statistics.

The stand-in replaces the array in the function's ``__dict__``. The function's class gets a data descriptor
of that name, so that every reader (``backward``, a public wrapper, a gradient function, the user) gets the
array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from chainer_ooc import references
from chainer_ooc.swap.storage import PackedArray
from chainer_ooc.wording import repr_of

__all__ = ["PackedTuple", "arrays_of", "save_attributes", "saved_attributes"]

_MISSING = object()

#: Tuples of every function of Chainer that hold no arrays.
_CHAINERS = frozenset({"inputs", "outputs", "_input_layouts", "_output_layouts"})

# Attributes that hold objects with arrays of their own: class -> names.
_nested: dict[type, tuple[str, ...]] = {}


class PackedTuple(tuple):
    """The stand-in for a tuple: its arrays are :class:`~chainer_ooc.swap.storage.PackedArray` here."""

    __slots__ = ()

    def get(self) -> tuple[Any, ...]:
        """Return the tuple with its arrays."""
        return tuple([item.get() if type(item) is PackedArray else item for item in self])


class _SavedAttribute:
    """A data descriptor that reads the instance's ``__dict__`` and unpacks stand-ins."""

    def __init__(self, name: str, default: Any) -> None:
        self.name = name
        self.default = default

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self._default(owner)
        value = instance.__dict__.get(self.name, _MISSING)
        kind = type(value)
        if kind is PackedArray or kind is PackedTuple:
            return value.get()
        if kind is list:
            for index, item in enumerate(value):
                if type(item) is PackedArray:
                    value[index] = item.get()
        elif value is _MISSING:
            return self._default(type(instance))
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = value

    def __delete__(self, instance: Any) -> None:
        try:
            del instance.__dict__[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def _default(self, owner: type | None) -> Any:
        if self.default is _MISSING:
            raise AttributeError(
                f"{owner.__name__ if owner else '?'!r} object has no attribute {self.name!r}"
            )
        return self.default


def saved_attributes(cls: type, names: tuple[str, ...] | list[str]) -> None:
    """Save also the arrays inside objects that functions of class ``cls`` keep as attributes.

    Arrays that are attributes themselves, or in a tuple or list, need no call. This is for functions that
    keep objects which keep arrays.

    Args:
        cls: A subclass of :class:`chainer.FunctionNode` or :class:`chainer.Function`.
        names: The attributes that hold such objects.

    Raises:
        TypeError: If ``cls`` is not such a class or a name is not a string.
    """
    import chainer

    if not (isinstance(cls, type) and issubclass(cls, chainer.FunctionNode | chainer.Function)):
        raise TypeError(
            f"cls={repr_of(cls)} is not a subclass of chainer.FunctionNode or chainer.Function"
        )
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names={repr_of(names)} is not a list of attribute names")
    _nested[cls] = (*_nested.get(cls, ()), *names)


def save_attributes(
    func: Any, save: Callable[[Any], PackedArray | None], arrays: frozenset[type]
) -> list[PackedArray]:
    """Replace the arrays among a function's attributes by stand-ins.

    Args:
        func: A function node that has run forward.
        save: Returns the stand-in for an array, or ``None`` to leave it.
        arrays: The types of arrays.

    Returns:
        The stand-ins.
    """
    group: list[PackedArray] = []
    for holder in _holders(func):
        attributes = holder.__dict__
        cls = type(holder)
        for name in list(attributes):
            value = attributes[name]
            kind = type(value)
            replacement: Any = None
            if kind is PackedArray:
                group.append(value)
            elif kind in arrays:
                replacement = save(value)
                if replacement is not None:
                    group.append(replacement)
            elif kind is tuple:
                if name in _CHAINERS or arrays.isdisjoint(map(type, value)):
                    continue
                items = [(save(item) if type(item) in arrays else None) or item for item in value]
                saved = [item for item in items if type(item) is PackedArray]
                if saved:
                    replacement = PackedTuple(items)
                    group += saved
            elif kind is PackedTuple:
                group += [item for item in value if type(item) is PackedArray]
            elif kind is list and not (arrays | {PackedArray}).isdisjoint(map(type, value)):
                value = None  # else this variable counts as a reference
                # Readers of the attribute get the list's arrays restored; other references to the list would not.
                held = references.item_is_referenced_externally(attributes, name)
                if not held and _descriptor(cls, name):
                    group += _save_list(attributes[name], save, arrays)
            if replacement is not None and _descriptor(cls, name):
                attributes[name] = replacement
            value = None
    return group


def arrays_of(func: Any, arrays: frozenset[type]) -> list[Any]:
    """Return the arrays among a function's attributes, also those in tuples and lists. Nothing is fetched.

    Args:
        func: A function node.
        arrays: The types of arrays.
    """
    values = [value for holder in _holders(func) for value in holder.__dict__.values()]
    items = [item for value in values if type(value) in (tuple, list) for item in value]
    return [item for item in values + items if type(item) in arrays]


def _save_list(
    value: list[Any], save: Callable[[Any], PackedArray | None], arrays: frozenset[type]
) -> Iterator[PackedArray]:
    for index, item in enumerate(value):
        if type(item) in arrays:
            value[index] = save(item) or item
        if type(value[index]) is PackedArray:
            yield value[index]


def _holders(func: Any) -> list[Any]:
    """Return the objects whose attributes are searched: the node, its old-style function, nested objects."""
    holders = [func]
    wrapped = func.__dict__.get("_function")
    if wrapped is not None:
        holders.append(wrapped)
    if _nested:
        for holder in tuple(holders):
            for cls in type(holder).__mro__:
                for name in _nested.get(cls, ()):
                    value = holder.__dict__.get(name)
                    if hasattr(value, "__dict__"):
                        holders.append(value)
    return holders


def _descriptor(cls: type, name: str) -> bool:
    """Set the descriptor on ``cls`` if it has none. Return whether it has one now."""
    found = cls.__dict__.get(name, _MISSING)
    if type(found) is _SavedAttribute:
        return True
    inherited = getattr(cls, name, _MISSING)
    if hasattr(type(inherited), "__get__"):  # a method, a property, a slot: not a plain attribute
        return False
    try:
        setattr(cls, name, _SavedAttribute(name, inherited))
    except (AttributeError, TypeError):  # a class in C, or one that refuses attributes
        return False
    return True
