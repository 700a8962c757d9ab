"""Save the arrays of the graph's nodes: ``VariableNode._data`` and ``_retained_output_data``.

Both become properties of their classes before the first array is saved. The value stays in the instance's ``__dict__``
under the same name. If it is a stand-in, readers get the array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chainer_ooc.graph.attributes import PackedTuple
from chainer_ooc.swap.devices.ram import native
from chainer_ooc.swap.recipe import PRIVATE
from chainer_ooc.swap.storage import PackedArray

__all__ = ["install", "keep", "save_inputs", "save_outputs", "watch"]

#: Marks a node whose array may have other readers than the functions that saved it.
_KEPT = "_ooc_kept"

#: What :func:`install` was told, and the getter of Chainer's ``Variable.raw_array``.
_stand_in: Callable[[PackedArray], Any]
_reach: Callable[[Any], None]
_raw_array: Callable[[Any], Any]
_is_watching = False


def _peek(node: Any) -> Any:
    data = node.__dict__.get("_data")
    return _stand_in(data) if type(data) is PackedArray else data


def _get_data(node: Any) -> Any:
    if PRIVATE in node.__dict__:
        _reach(node)
    data = node.__dict__.get("_data")
    return data.get() if type(data) is PackedArray else data


def _set_data(node: Any, data: Any) -> None:
    old = node.__dict__.get("_data")
    if old is not None and data is not (old.alive() if type(old) is PackedArray else old):
        # The functions that saved the old array will read the new one, which they did not count.
        node.__dict__[_KEPT] = True
    node.__dict__["_data"] = data


def _get_raw_array(variable: Any) -> Any:
    if variable._has_chainerx_array:
        return _raw_array(variable)
    node = getattr(variable, "_node", None)  # not yet in its constructor
    if node is not None and PRIVATE in node.__dict__:
        _reach(node)
    return variable._data[0]


def _get_retained(func: Any) -> Any:
    for reference in func.outputs or ():
        node = reference()
        if node is not None and PRIVATE in node.__dict__:
            _reach(node)
    retained = func.__dict__.get("_retained_output_data")
    return retained.get() if type(retained) is PackedTuple else retained


def _set_retained(func: Any, retained: Any) -> None:
    func.__dict__["_retained_output_data"] = retained


def install(
    stand_in: Callable[[PackedArray], Any],
    before_hooks: Callable[[Any], None],
    reach: Callable[[Any], None],
) -> None:
    """Tell what to call, once, before the first :func:`watch`.

    Args:
        stand_in: Returns an empty array with the type and device of a saved one.
        before_hooks: Called with a function before its backward hooks.
        reach: Called with a node whose array is private before code gets that.

    Raises:
        RuntimeError: If Chainer was imported without the import hook.
    """
    from chainer import variable

    if not hasattr(variable, "_peek"):
        raise RuntimeError(
            "Chainer was imported before chainer_ooc's import hook was installed; import chainer_ooc first"
        )
    global _stand_in, _reach, _raw_array
    _stand_in, _reach, _raw_array = stand_in, reach, variable.Variable.raw_array.fget
    variable._before_hooks = before_hooks


def watch() -> None:
    """Make the properties of Chainer's classes, before the first array is saved or private. Later calls do nothing.

    Reading an array is slower then. As long as all fits, it stays as fast as stock Chainer's.
    """
    global _is_watching
    if _is_watching:
        return
    import chainer
    from chainer import variable

    c, doc = native.allocator, chainer.Variable.raw_array.__doc__
    raw, data = property(_get_raw_array, doc=doc), property(_get_data, _set_data)
    if c is not None:
        raw = c.RawArray("_data", PRIVATE, None, _get_raw_array, None, doc)
        data = c.FastProperty("_data", PRIVATE, PackedArray, _get_data, _set_data)
    chainer.Variable.raw_array, variable.VariableNode._data = raw, data
    variable._peek = _peek
    chainer.FunctionNode._retained_output_data = property(_get_retained, _set_retained)
    _is_watching = True


def keep(node: Any) -> None:
    """Note that other readers than the functions that saved a node's array may need it: do not drop it."""
    node.__dict__[_KEPT] = True
    data = node.__dict__.get("_data")
    if type(data) is PackedArray:
        data.storage.manager.keep([data])


def save_inputs(func: Any, save: Callable[[Any], PackedArray | None]) -> list[PackedArray]:
    """Save the arrays of the retained inputs. Leaves (parameters, input data) stay as they are."""
    group = []
    for index in func._input_indexes_to_retain or ():
        node = func.inputs[index]
        if node is not None and node._creator_node is not None:
            group += _save_node(node, save)
    return group


def save_outputs(func: Any, save: Callable[[Any], PackedArray | None]) -> list[PackedArray]:
    """Save the arrays of the retained outputs, both in the outputs' nodes and in the function.

    Returns:
        The stand-ins in the nodes. Those in the function are among its attributes.
    """
    group = []
    for index in func._output_indexes_to_retain or ():
        node = func.outputs[index]()
        if node is not None:
            group += _save_node(node, save)
    retained = func.__dict__.get("_retained_output_data")
    if type(retained) is tuple:
        by_array = {id(one.alive()): one for one in group}  # a node may have the same array
        packed = list(retained)
        for place, array in enumerate(retained):
            if array is not None:
                packed[place] = by_array.get(id(array)) or save(array) or array
        func.__dict__["_retained_output_data"] = PackedTuple(packed)
    return group


def _save_node(node: Any, save: Callable[[Any], PackedArray | None]) -> list[PackedArray]:
    data = node.__dict__.get("_data")
    if data is None:
        return []
    if type(data) is not PackedArray:
        data = save(data)
        if data is None:
            return []
        node.__dict__["_data"] = data
    if _KEPT in node.__dict__:
        data.storage.manager.keep([data])
    return [data]
