"""Find out who refers to the saved arrays that cannot move: the answer to "it has no effect"."""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from chainer_ooc import state
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.storage import Storage
from chainer_ooc.tables import Shown, Table, format_bytes

__all__ = ["Explanation", "HeldStorage", "explain"]


@dataclasses.dataclass(frozen=True)
class HeldStorage:
    """An allocation that cannot move because something besides the graph refers to it.

    Attributes:
        function: The name of the function that saved it.
        nbytes: The size (bytes).
        holders: The names of the objects that refer to it, of those that can be found.
    """

    function: str
    nbytes: int
    holders: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Explanation(Shown):
    """The answer of :func:`explain`. Its text is a table.

    Attributes:
        saved: The number of allocations that are saved now.
        saved_bytes: Their size (bytes).
        resident_bytes: The size of those in memory (bytes).
        held: Those in memory to which something else refers, the largest first.
    """

    saved: int
    saved_bytes: int
    resident_bytes: int
    held: tuple[HeldStorage, ...]

    def _blocks(self) -> Iterator[str | Table]:
        held_bytes = sum(one.nbytes for one in self.held)
        yield (
            f"{self.saved} saved allocations, {format_bytes(self.saved_bytes)}; in memory "
            f"{format_bytes(self.resident_bytes)}, of which {format_bytes(held_bytes)} are held by something besides "
            "the graph"
        )
        rows = [
            (
                format_bytes(one.nbytes),
                one.function,
                ", ".join(one.holders) or "something Python cannot name",
            )
            for one in self.held
        ]
        if rows:
            yield Table(rows, "><<", ("size", "saved by", "held by"))


def explain(model: Any = None) -> Explanation:
    """List the saved arrays that cannot move because something refers to them, and what that is.

    The search visits all objects of the process, which takes about a second. It does not find references
    that only C code has.

    Args:
        model: A :class:`chainer.Link`. Variables that are attributes of its links are named by their path
            in it; otherwise by the class of the link.

    Returns:
        The explanation; print it.
    """
    storages = []
    for manager in state.managers():
        manager.save_pending()
        storages += [(manager, storage) for storage in manager.storages()]
    resident = [(m, s) for m, s in storages if s.owner is not None]
    held = [(m, s) for m, s in resident if s.state.in_memory and s.referenced_externally]
    found = _find_holders(held, _paths(model))
    rows = [HeldStorage(s.label, s.nbytes, tuple(sorted(found.get(id(s), ())))) for _, s in held]
    return Explanation(
        saved=len(storages),
        saved_bytes=sum(s.nbytes for _, s in storages),
        resident_bytes=sum(s.nbytes for _, s in resident),
        held=tuple(sorted(rows, key=lambda row: (-row.nbytes, row.function))),
    )


def _find_holders(
    held: Iterable[tuple[SwapManager, Storage]], paths: dict[int, str]
) -> dict[int, set[str]]:
    """Return the names of the objects that refer to each storage, by the storage's id."""
    owners = {id(storage.owner): storage for _, storage in held}
    found: dict[int, set[str]] = {}
    for array, name in _references(paths) if owners else ():
        manager = state.manager_for(array)
        location = manager.device.locate(array) if manager else None
        storage = owners.get(id(location.owner)) if location else None
        if storage is not None:
            found.setdefault(id(storage), set()).add(_worded(name))
    return found


def _references(paths: dict[int, str]) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Yield every array to which an object or a local variable refers, and a function that names the referrer."""
    objects = gc.get_objects()
    for thing in objects:
        if type(thing) is not Storage and thing is not objects:
            for value in gc.get_referents(thing):
                if state.manager_for(value) is not None:
                    yield value, functools.partial(_name_of_holder, thing, value, paths)
    for frame in sys._current_frames().values():
        step: types.FrameType | None = frame
        while step is not None:
            if step.f_code.co_filename != __file__:
                variables = step.f_locals
                for name, value in list(variables.items()):  # other threads may add variables
                    if state.manager_for(value) is not None:
                        yield value, functools.partial(_name_of_local, name, step.f_code)
                if sys.version_info < (3, 13) and step.f_code.co_flags & inspect.CO_OPTIMIZED:
                    variables.clear()  # the frame keeps this copy, which refers to the arrays
            step = step.f_back
        del frame  # else this frame refers to itself and to everything


def _worded(name: Callable[[], str]) -> str:
    """Return the name, or a remark if the object raises when it is named."""
    try:
        return name()
    except Exception:
        return "something that cannot be looked at"


def _name_of_local(name: str, code: types.CodeType) -> str:
    return f"local variable {name} of {code.co_qualname}"


def _name_of_holder(holder: Any, value: Any, paths: dict[int, str]) -> str:
    import chainer

    if type(holder) is list:
        for referrer in gc.get_referrers(holder):
            for owner in [
                referrer,
                *(gc.get_referrers(referrer) if type(referrer) is dict else ()),
            ]:
                if isinstance(owner, chainer.Variable) and owner._data is holder:
                    return _name_of_variable(owner, paths)
    if type(holder) is dict:
        for owner in gc.get_referrers(holder):
            if getattr(owner, "__dict__", None) is holder:
                return f"{type(owner).__name__}.{_key(holder, value)}"
        return f"a dict's {_key(holder, value)!r}"
    if isinstance(holder, list | tuple):
        return f"a {type(holder).__name__} of {len(holder)}"
    attributes = getattr(holder, "__dict__", {})
    name = _key(attributes, value)
    return f"{type(holder).__name__}.{name}" if name else f"a {type(holder).__name__}"


def _name_of_variable(variable: Any, paths: dict[int, str]) -> str:
    path = paths.get(id(variable))
    if path:
        return path
    for referrer in gc.get_referrers(variable):
        owners = gc.get_referrers(referrer) if type(referrer) is dict else [referrer]
        for owner in owners:
            name = _key(getattr(owner, "__dict__", {}), variable)
            if name:
                return f"{type(owner).__name__}.{name}"
    kind = type(variable).__name__
    return f"{kind} {variable.name!r}" if variable.name else f"a live {kind} {variable.shape}"


def _key(mapping: Any, value: Any) -> Any:
    return next((key for key, other in dict(mapping).items() if other is value), "")


def _paths(model: Any) -> dict[int, str]:
    """Return the path of each variable that is an attribute of a link of ``model``, by its id."""
    if model is None:
        return {}
    paths = {}
    for path, link in model.namedlinks():
        for name, value in vars(link).items():
            paths[id(value)] = f"{path.rstrip('/')}/{name}"
    return paths
