"""Stand-ins for what lasts longer than a graph: parameters, their gradients, the state of optimizers.

Nothing but the making of parameters is patched, and no object of Chainer's is touched, before memory is short and
moving what graphs saved does not suffice Then

- the list in ``Variable._data``, which Chainer's own code indexes, becomes a :class:`MovableData`,
- ``Variable._grad`` becomes a property, and a gradient's variable gets a :class:`MovableData`,
- the dictionary ``UpdateRule.state`` becomes a :class:`MovableState`.

All three give every reader the array. What asks for a shape, a dtype, or whether there is an array, fetches nothing.
"""

from __future__ import annotations

import gc
import itertools
import math
import sys
import weakref
from collections.abc import ItemsView, Iterable, Iterator, ValuesView
from types import FrameType
from typing import Any

import numpy as np

from chainer_ooc import references, state
from chainer_ooc.graph import hooks, nodes, recompute
from chainer_ooc.swap.devices.ram import native
from chainer_ooc.swap.lasting import DATA, GRADIENT, SLOTS, STATE, Use
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.storage import PackedArray

__all__ = ["MovableData", "MovableState", "collect", "install"]

#: The most bytes that an element takes while it is initialized: random numbers in double precision, and twice its own.
_INITIALIZED = 32
#: While smaller parameters are made (bytes), allocations do not ask for room.
_LARGE = 8 << 20

_item = list.__getitem__
_stock: dict[str, Any] = {}
_numbers = itertools.count(1)
#: The known parameters by their id: variables cannot be compared.
_known: dict[int, tuple[weakref.ref[Any], int]] = {}


class MovableData(list[Any]):
    """The list in ``Variable._data``, whose array may be outside of memory. Reading it returns the array."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        item = _item(self, index)
        return _read(item) if type(item) is PackedArray else item

    def __iter__(self) -> Iterator[Any]:
        return iter([self[index] for index in range(len(self))])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, (list(iter(self)),)

    def __repr__(self) -> str:
        return repr(list(iter(self)))

    def peek(self) -> Any:
        """Return the array, its stand-in, or ``None``."""
        return _item(self, 0)


class MovableState(dict[str, Any]):
    """The dictionary of an optimizer's state, whose arrays may be outside of memory. Reading it returns the arrays."""

    __slots__ = ()

    def __getitem__(self, name: str) -> Any:
        value = dict.__getitem__(self, name)
        return _read(value) if type(value) is PackedArray else value

    def __setitem__(self, name: str, value: Any) -> None:
        old = dict.get(self, name)
        if type(old) is PackedArray and value is not None and value is old.alive():
            return  # Chainer stores what it has just read
        dict.__setitem__(self, name, value)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value."""
        if name not in self:
            return default
        return self[name]

    def items(self) -> Any:
        """Return a view of names and values."""
        return ItemsView(self)

    def values(self) -> Any:
        """Return a view of the values."""
        return ValuesView(self)

    def pop(self, name: str, *default: Any) -> Any:
        """Remove a value and return it."""
        if name not in self:
            return dict.pop(self, name, *default)
        value = self[name]
        del self[name]
        return value

    def popitem(self) -> Any:
        """Remove the last value, and return its name and it."""
        if not self:
            return dict.popitem(self)
        name = next(reversed(self))
        return name, self.pop(name)

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Return a value, set to ``default`` if there is none."""
        if name not in self:
            self[name] = default
        return self[name]

    def copy(self) -> dict[str, Any]:
        """Return a dictionary of the arrays."""
        return dict(self.items())

    __copy__ = copy

    def __iter__(self) -> Iterator[str]:  # with it, dict() and ** ask for each value
        return dict.__iter__(self)

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __eq__(self, other: object) -> bool:
        return self.copy() == other

    def __ne__(self, other: object) -> bool:
        return self.copy() != other

    __hash__ = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (), None, None, iter(self.items())

    def __repr__(self) -> str:
        return repr(self.copy())


# Whatever reads a stand-in.


def _read(packed: PackedArray) -> Any:
    manager: SwapManager = packed.storage.manager
    return manager.read(packed, _is_read_only(packed))


def _is_read_only(packed: PackedArray) -> bool:
    """Return whether the code that reads never writes to the array."""
    local = state.local
    if local.read_only or packed in local.using:
        return hooks.is_asked_by_a_function()
    key = packed.storage.key
    return key is not None and key % SLOTS == GRADIENT and _is_asked_by_an_update()


def _is_asked_by_an_update() -> bool:
    """Return whether an update rule of Chainer reads a gradient: none of them writes to it."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("chainer.optimizers."):
            return frame.f_code.co_name in ("update_core_cpu", "update_core_gpu")
        if module != "chainer.variable" and not module.startswith("chainer_ooc.graph."):
            return False
        frame = frame.f_back
    return False


def _peek(variable: Any) -> Any:
    """Return a variable's array, its stand-in, or ``None``."""
    data = variable._data
    return data.peek() if type(data) is MovableData else data[0]


def _packed_of(variable: Any) -> PackedArray | None:
    """Return the stand-in of a variable's array, if there is one."""
    data = getattr(variable, "_data", None)
    item = data.peek() if type(data) is MovableData else None
    return item if type(item) is PackedArray else None


# Making stand-ins.


def collect(manager: SwapManager) -> None:
    """Replace the arrays of a device's memory in all parameters, gradients and states by stand-ins."""
    if "update" not in _stock:
        _watch()
    cells: dict[int, tuple[Any, MovableData]] = {}
    for reference, number in tuple(_known.values()):
        parameter = reference()
        if parameter is not None:
            _collect_from(parameter, number, manager, cells)


def _collect_from(
    parameter: Any,
    number: int,
    manager: SwapManager | None = None,
    cells: dict[int, tuple[Any, MovableData]] | None = None,
) -> list[PackedArray]:
    """Replace a parameter's arrays by stand-ins: those of one manager, or of all that move such arrays.

    Returns:
        All its stand-ins.
    """
    members, key = parameter.__dict__, number * SLOTS
    if "_data" not in members or parameter._has_chainerx_array:
        return []
    cells = {} if cells is None else cells
    packed_data = _pack_variable(parameter, key + DATA, "parameter", manager, cells)
    group = [packed_data]
    gradient, kept = members.get("_grad_var"), members.get("_grad")
    if gradient is not None and not gradient._has_chainerx_array:
        packed = _pack_variable(gradient, key + GRADIENT, "gradient", manager, cells)
        group.append(packed)
        if packed is not None and kept is not None and kept is packed.alive():
            members["_grad"] = packed
    elif kept is not None:
        packed = kept
        if type(kept) is not PackedArray:
            packed = _save(kept, "gradient", key + GRADIENT, manager)
            if packed is not None:
                members["_grad"] = packed
        group.append(packed)
    del kept
    if packed_data is not None and (first := members.get("initializer")) is not None:
        if (
            first is packed_data.alive()
        ):  # a parameter that was made from an array keeps it as its initializer
            members["initializer"] = packed_data
        del first
    group += _pack_state(members.get("update_rule"), key, manager)
    return [one for one in group if one is not None]


def _pack_variable(
    variable: Any,
    key: int,
    label: str,
    manager: SwapManager | None,
    cells: dict[int, tuple[Any, MovableData]],
) -> PackedArray | None:
    """Replace a variable's array by a stand-in, also in its node. Return that."""
    members = variable.__dict__
    data = members.get("_data")
    if type(data) is list and len(data) == 1:
        if data[0] is None:
            return None  # not initialized: it stays Chainer's
        # Copies of a variable share the list.
        known = cells.get(id(data))
        cell = MovableData(data) if known is None else known[1]
        cells[id(data)] = data, cell
    elif type(data) is MovableData:
        cell = data
    else:
        return None
    item = cell.peek()
    packed = item if type(item) is PackedArray else None
    if item is not None and packed is None:
        packed = _save(item, label, key, manager)
    if packed is None:
        return None
    if item is not packed:
        cell[0] = packed
    if data is not cell:
        members["_data"] = cell
    node = members.get("_node")
    if node is not None:
        kept = node.__dict__.get("_data")
        if kept is not None and kept is not packed and kept is packed.alive():
            node.__dict__["_data"] = packed
    return packed


def _pack_state(rule: Any, key: int, manager: SwapManager | None) -> Iterator[PackedArray | None]:
    members = getattr(rule, "__dict__", {})
    values = members.get("_state")
    if type(values) is dict and values:
        values = None  # else this variable counts as a reference
        if not references.item_is_referenced_externally(members, "_state"):
            members["_state"] = MovableState(members["_state"])
        values = members["_state"]
    if type(values) is not MovableState:
        return
    for place, name in enumerate(tuple(dict.keys(values))):
        value = dict.__getitem__(values, name)
        packed = value if type(value) is PackedArray else None
        if packed is None and place + STATE < SLOTS:
            packed = _save(value, f"state {name!r}", key + STATE + place, manager)
            if packed is not None:
                dict.__setitem__(values, name, packed)
        yield packed


def _save(array: Any, label: str, key: int, only: SwapManager | None) -> PackedArray | None:
    settings, manager = state.current(), state.manager_for(array)
    if settings is None or settings.parameters == "stay":
        return None
    if manager is None or not manager.lasting.active or (only is not None and manager is not only):
        return None
    return manager.save_lasting(array, label, key)


def _know(parameter: Any) -> None:
    """Remember a parameter as long as it lives."""
    identity = id(parameter)
    if identity in _known and _known[identity][0]() is parameter:
        return
    number = next(_numbers)

    def forget(reference: Any) -> None:
        if identity in _known and _known[identity][0] is reference:
            del _known[identity]
        for manager in state.managers():
            manager.lasting.forget(number)

    _known[identity] = weakref.ref(parameter, forget), number


def _by_manager(group: Iterable[PackedArray]) -> dict[SwapManager, list[PackedArray]]:
    managers: dict[SwapManager, list[PackedArray]] = {}
    for packed in group:
        managers.setdefault(packed.storage.manager, []).append(packed)
    return managers


# What Chainer's classes do from then on.


def _watch() -> None:
    """Patch Chainer, and find its parameters."""
    import chainer
    from chainer import _backprop_utils, variable
    from chainer.variable import Parameter, Variable

    nodes.watch()
    _stock.update(
        apply=chainer.FunctionNode.apply,
        backprop_step=_backprop_utils.backprop_step,
        update=Parameter.update,
        set_grad_var=Variable._set_grad_var_without_check,
        peek=variable._peek_variable,
        parameter=Parameter,
    )
    for name in ("_has_array", "_has_raw_array", "_has_grad"):
        _stock[name] = getattr(Variable, name)
    chainer.FunctionNode.apply = _apply
    _backprop_utils.backprop_step = _backprop_step
    Parameter.update = _update
    Variable._set_grad_var_without_check = _set_grad_var_without_check
    Variable._has_array, Variable._has_raw_array = _has_array, _has_raw_array
    Variable._has_grad = _has_grad
    variable._peek_variable = _peek_variable
    for cls, names in (
        (Variable, ("shape", "ndim", "size", "dtype", "device")),
        (Parameter, ("dtype", "is_initialized")),
    ):
        for name in names:
            setattr(cls, name, _peeking(cls.__dict__[name], name))
    Variable._grad, Parameter.initializer = _property("_grad"), _property("initializer")
    for thing in gc.get_objects():
        if issubclass(type(thing), Parameter):  # isinstance() may run a proxy's code
            _know(thing)


def _peeking(stock: property, name: str) -> property:
    """Return a property of ``Variable`` that asks a stand-in for its layout."""

    def get(self: Any) -> Any:
        packed = _packed_of(self)
        if packed is None or getattr(self, "_layout", None) is not None:
            return stock.__get__(self)
        layout = packed.layout
        if name == "device":
            return self._device if self._device is not None else stock.__get__(self)
        if name == "is_initialized":
            return True
        if name == "ndim":
            return len(layout.shape)
        return math.prod(layout.shape) if name == "size" else getattr(layout, name)

    return property(get, stock.fset, stock.fdel, stock.__doc__)


def _property(name: str) -> Any:
    """Return a property of ``Variable`` whose value in an instance's ``__dict__`` may be a stand-in."""

    def get(variable: Any) -> Any:
        value = variable.__dict__.get(name)
        return _read(value) if type(value) is PackedArray else value

    def put(variable: Any, value: Any) -> None:
        old = variable.__dict__.get(name)
        if type(old) is not PackedArray or value is None or value is not old.alive():
            variable.__dict__[name] = value

    if native.allocator is None:
        return property(get, put)
    return native.allocator.FastProperty(name, None, PackedArray, get, put)


def _set_grad_var_without_check(self: Any, gradient: Any) -> None:
    packed = None if gradient is None else _packed_of(gradient)
    if packed is None or self._has_chainerx_array:
        _stock["set_grad_var"](self, gradient)
        return
    self._grad_var = gradient
    self.__dict__["_grad"] = packed


def _has_raw_array(self: Any) -> bool:
    return _packed_of(self) is not None or bool(_stock["_has_raw_array"](self))


def _has_array(self: Any) -> bool:
    if self._layout is None and _packed_of(self) is not None:
        return True
    return bool(_stock["_has_array"](self))


def _has_grad(self: Any) -> bool:
    if self._layout is None and self._grad_valid and not self._has_chainerx_array:
        if self._grad_var is not None:
            return _packed_of(self._grad_var) is not None or self._grad_var._has_array()
        if type(self.__dict__.get("_grad")) is PackedArray:
            return True
    return bool(_stock["_has_grad"](self))


def _peek_variable(variable: Any) -> Any:
    """Return what has the type, the shape and the dtype of a variable's array."""
    packed = _packed_of(variable)
    if packed is None or type(hooks.stand_in(packed)) is not np.ndarray:
        return _stock["peek"](variable)
    return np.broadcast_to(np.empty((), packed.layout.dtype), packed.layout.shape)


def install() -> None:
    """Have parameters ask for room while they are made. Later calls do nothing."""
    from chainer.variable import Parameter

    if "make" not in _stock:
        _stock.update(make=Parameter.__init__, initialize=Parameter.initialize)
        Parameter.__init__, Parameter.initialize = _make, _initialize


def _make(self: Any, initializer: Any = None, shape: Any = None, *args: Any, **kwargs: Any) -> None:
    if shape is not None:
        _foresee(shape)
    _stock["make"](self, initializer, shape, *args, **kwargs)
    _added(self)


def _initialize(self: Any, shape: Any) -> None:
    _foresee(shape)
    _stock["initialize"](self, shape)
    _added(self)


def _foresee(shape: Any) -> None:
    """Have allocations ask for room if a parameter of this shape may take the memory past the low watermark."""
    settings, manager = state.current(), state.manager_of_ram()
    if settings is None or manager is None or manager.device.asks_for_room:
        return
    try:
        nbytes = _INITIALIZED * math.prod(shape if isinstance(shape, tuple | list) else (shape,))
    except TypeError:  # Chainer itself raises the error for what is no shape
        return
    if nbytes < _LARGE:
        return
    if manager.has_been_short or not manager.budget.are_far(nbytes, settings):
        state.hook_allocations()


def _added(parameter: Any) -> None:
    _know(parameter)
    for manager in state.managers():
        manager.lasting.may_have_changed()


def _apply(self: Any, inputs: Any) -> Any:
    """Run a function forward with its parameters in memory."""
    apply = _stock["apply"]
    if not isinstance(inputs, tuple | list):  # an iterator can be read once
        return apply(self, inputs)
    group = [packed for x in inputs if (packed := _packed_of(x)) is not None]
    if not group:
        return apply(self, inputs)
    local = state.local
    outer, held = local.using, local.held
    read_only = hooks.is_chainers(self) and recompute.is_unwatched(self)
    use = Use.BACKWARD if local.in_backward else Use.FORWARD
    managers = _by_manager(packed for packed in group if packed not in held)
    arrays = []
    try:
        local.held = held.union(group)
        if read_only:
            local.using = outer.union(group)
        for manager, own in managers.items():
            arrays.append(manager.use_lasting(own, use, read_only))
        return apply(self, inputs)
    finally:
        local.using, local.held = outer, held
        arrays.clear()
        for x in inputs:
            if (packed := _packed_of(x)) is not None:
                _retain(x, packed)
        for manager, own in managers.items():
            manager.used_lasting(own, may_leave=state.current() is not None)


def _retain(variable: Any, packed: PackedArray) -> None:
    """Put the stand-in into a variable's node, if a function has retained the array there."""
    node = variable.__dict__.get("_node")
    if node is not None:
        kept = node.__dict__.get("_data")
        if kept is not None and kept is not packed and kept is packed.alive():
            node.__dict__["_data"] = packed


def _backprop_step(
    func: Any, target_input_indexes: Any, grad_outputs: Any, grad_inputs: Any, is_debug: Any
) -> None:
    """Run a function backward with its parameters in memory; what it adds to their gradients may leave."""
    local = state.local
    group = []
    for index in func._input_indexes_to_retain or ():
        node = func.inputs[index]
        data = None if node is None else node.__dict__.get("_data")
        if type(data) is PackedArray and data.storage.key is not None:
            group.append(data)
    read_only, outer, held = hooks.is_chainers(func), local.in_backward, local.held
    group = [packed for packed in group if packed not in held]
    managers = _by_manager(group)
    arrays = []
    local.in_backward = True
    try:
        local.held = held.union(group)
        for manager, own in managers.items():
            arrays.append(manager.use_lasting(own, Use.BACKWARD, read_only))
        _stock["backprop_step"](func, target_input_indexes, grad_outputs, grad_inputs, is_debug)
    finally:
        local.in_backward, local.held = outer, held
        arrays.clear()
        gradients = _pack_gradients(func, target_input_indexes, grad_inputs)
        for manager, own in _by_manager(group + gradients).items():
            manager.used_lasting(own, may_leave=state.current() is not None)


def _pack_gradients(func: Any, indexes: Iterable[int], grad_inputs: Any) -> list[PackedArray]:
    """Replace the gradients of parameters that a function's backward has added to by stand-ins."""
    group = []
    for index in indexes:
        node = func.inputs[index]
        parameter = node._variable()
        known = None if parameter is None else _known.get(id(parameter))
        if known is None or known[0]() is not parameter:
            continue
        for gradient in grad_inputs.get(node) or ():
            if gradient is not None and not gradient._has_chainerx_array:
                key = known[1] * SLOTS + GRADIENT
                packed = _pack_variable(gradient, key, "gradient", None, {})
                if packed is not None:
                    group.append(packed)
    return group


def _update(self: Any) -> None:
    """Update a parameter: it, its gradient and its state come in, and may leave afterwards."""
    _know(self)
    number = _known[id(self)][1]
    parts = [(self, number)]
    master = getattr(self.update_rule, "_fp32_param", None)
    if master is not None:
        _know(master)
        parts.append((master, _known[id(master)][1]))
    group = [packed for part, own in parts for packed in _collect_from(part, own)]
    for manager, members in _by_manager(group).items():
        manager.begin_update(members)
    try:
        _stock["update"](self)
    finally:
        group = [packed for part, own in parts for packed in _collect_from(part, own)]
        for manager, members in _by_manager(group).items():
            manager.used_lasting(members, may_leave=state.current() is not None)
