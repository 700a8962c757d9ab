"""Patch the places where Chainer runs functions: save what backward needs, fetch it when backward runs."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
import weakref
from collections import deque
from types import FrameType
from typing import Any

from numpy import ndarray

from chainer_ooc import state, wording
from chainer_ooc.graph import attributes, nodes, recompute
from chainer_ooc.graph.iteration import IterationTracker, tracker_of
from chainer_ooc.graph.splitting import rules
from chainer_ooc.settings import Settings
from chainer_ooc.swap.budget import UNASKED
from chainer_ooc.swap.devices.ram import native
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.observed_growth import ObservedGrowth
from chainer_ooc.swap.storage import PackedArray

__all__ = [
    "describe",
    "install",
    "is_asked_by_a_function",
    "is_chainers",
    "is_read_only",
    "save_pending",
    "stand_in",
]

_RECORD = "_ooc_record"
_USED = "_ooc_used"
#: Marks a function whose backward built a graph: double backward will run through it once more.
_TWICE = "_ooc_twice"

#: A function may need this many times the bytes of its inputs and outputs for itself (im2col needs
#: twice the size of its kernel): with less room than that, its allocations are watched.
_EXPANSION = 128

#: Modules of Chainer whose backward writes to kept arrays; F.forget passes them to its caller's code.
_WRITERS = frozenset(
    {"chainer.functions.util.forget", "chainer.functions.loss.ctc", "chainer.functions.loss.hinge"}
)

# Functions that have run forward and are not saved yet, with their ``single_backward``.
_pending: deque[tuple[weakref.ref[Any], bool]] = deque()
_most_pending = 4096
_SEQUENCES = (tuple, list)
#: Whether the room that :func:`_before` found the last time holds a function with these inputs, too. Only in C.
_covers = getattr(native.allocator, "covers", lambda inputs, settings: False)
_stock: dict[str, Any] = {}
_install_lock = threading.Lock()


class Record:
    """The arrays that a function saved.

    Attributes:
        group: The stand-ins of all its arrays.
        by_manager: The same, grouped by manager.
        drop: The arrays are dropped after their last use (``single_backward``).
    """

    __slots__ = ("by_manager", "drop", "group")

    def __init__(self, group: list[PackedArray], drop: bool) -> None:
        managers: dict[SwapManager, list[PackedArray]] = {}
        for saved in group:
            managers.setdefault(saved.storage.manager, []).append(saved)
        self.group = group
        self.by_manager = list(managers.items())
        self.drop = drop

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        """Return an empty record: a deep copy of a function owns its arrays, and none of them is saved."""
        return Record([], self.drop)

    def __reduce__(self) -> Any:
        return Record, ([], self.drop)


def install() -> None:
    """Patch Chainer. Later calls do nothing."""
    import chainer
    from chainer import _backprop_utils
    from chainer.functions.normalization import batch_normalization

    with _install_lock:
        if _stock:
            return
        nodes.install(stand_in, _before_hooks, _reach)
        recompute.install()
        rules.install()
        attributes.saved_attributes(batch_normalization.BatchNormalization, ["_impl"])
        attributes.saved_attributes(batch_normalization.BatchNormalizationGrad, ["_impl"])
        if native.allocator is not None:
            native.allocator.count_arrays_of(chainer.Variable, ndarray)
        _stock["config"] = chainer.config
        _stock["variable"] = chainer.Variable
        _stock["apply"] = chainer.FunctionNode.apply
        _stock["backprop_step"] = _backprop_utils.backprop_step
        _stock["add_hook"] = chainer.FunctionNode.add_hook
        chainer.FunctionNode.apply = _apply
        chainer.FunctionNode.add_hook = _add_hook
        _backprop_utils.backprop_step = _backprop_step


def _is_scheduled() -> bool:
    """Return whether ``static_graph`` schedules Chainer's functions.

    ``chainer.config`` itself is slower: where only globals have a value, its look-up fails first.
    """
    config = _stock["config"]
    return config._local.__dict__.get("schedule_func", config._global.schedule_func) is not None


def _keeps_graph() -> bool:
    """Return whether Chainer makes graphs."""
    config = _stock["config"]
    return bool(config._local.__dict__.get("enable_backprop", config._global.enable_backprop))


def _trains(inputs: Any) -> bool:
    """Return whether a graph begins or grows, in a thread that has not turned out-of-core mode off."""
    return (
        not state.local.stack
        and _keeps_graph()
        and isinstance(inputs, _SEQUENCES)
        and any(isinstance(x, _stock["variable"]) and x.requires_grad for x in inputs)
    )


def _apply(self: Any, inputs: Any) -> Any:
    settings = state.current()
    apply = _stock["apply"]
    if settings is None and state.process.inherit is not None and _trains(inputs):
        state.process.inherit()
        settings = state.current()
    if settings is None or not isinstance(inputs, _SEQUENCES):  # an iterator can be read once
        return apply(self, inputs)
    manager, plenty = (None, True) if _covers(inputs, settings) else _before(inputs, settings)
    if plenty:
        outputs = apply(self, inputs)
        if self.inputs is not None and not _is_foreign(self):
            _note(self, settings)
        return outputs
    if manager is None or _is_scheduled():
        return apply(self, inputs)
    keeps_graph = _keeps_graph()
    # Whoever gets such an array, or a view of it, is to be noted: also without a plan, or where another mode is on.
    has_private, guards = recompute.are_private(inputs), settings.discard_all
    local, tracker = state.local, None
    if (outer := local.running) is not None:
        if not (keeps_graph or has_private or guards or settings.verify):  # nothing is kept
            local.running = self, inputs
            try:
                return apply(self, inputs)
            finally:
                local.running = outer
    elif (tracker := _tracker(manager, settings)) is not None:
        if keeps_graph and _requires_grad(inputs):
            is_fresh = tracker.has_begun or not any(reference() for reference, _ in tuple(_pending))
            tracker.forward(self, inputs, settings, is_fresh)
        guards = guards or tracker.is_guarding
    is_safe = False
    if has_private or guards:
        is_safe = is_chainers(self) and recompute.is_unwatched(self)
        if not is_safe:
            recompute.expose_inputs(inputs)
    run = _run_verified if settings.verify else _run
    outputs = run(self, inputs, manager, apply, self, inputs)
    if has_private or guards:
        nodes.watch()
        recompute.note_private(self, inputs, outputs, guards and is_safe)
    is_kept = self.inputs is not None and not self._is_chainerx_fallback_mode
    if tracker is None:
        if is_kept:
            _note(self, settings)
            if recompute.discards_all(settings) and manager.has_been_short:
                save_pending()
                recompute.offer_recipes(self, inputs, outputs, recompute.Recipes.GUARDED)
    else:
        _save_tracked(self, inputs, outputs, settings, tracker, is_kept)
    _after(manager, settings, backward=False)
    return outputs


def _save_tracked(
    func: Any,
    inputs: Any,
    outputs: Any,
    settings: Settings,
    tracker: IterationTracker,
    is_kept: bool,
) -> None:
    """Save what the tracked iteration needs of a function that has run forward, and write its recipes."""
    if tracker.is_selective:
        if is_kept and not tracker.moves(func):
            _note(func, settings)
        elif is_kept:
            with state.local.uninterrupted:
                _save(func, settings.single_backward)
    else:
        if is_kept:
            _note(func, settings)
        save_pending()
    if is_kept:
        recipes = tracker.wants_recipes(func, settings)
        if recipes is not None:  # now, while its inputs and outputs are unmodified
            recompute.offer_recipes(func, inputs, outputs, recipes)
    record = func.__dict__.get(_RECORD)
    if record is not None:
        tracker.saved(func, record.group)
    elif not tracker.is_selective:
        tracker.saved(func, ())
    tracker.ran(state.local.peak)


def _is_foreign(func: Any) -> bool:
    """Return whether a function's arrays must not move: ``static_graph``, for one, writes to them."""
    return func._is_chainerx_fallback_mode or _is_scheduled()


def _note(func: Any, settings: Settings) -> None:
    """Note a function that has run forward. Its arrays are saved when memory gets short."""
    _pending.append((weakref.ref(func), settings.single_backward))
    if len(_pending) > _most_pending:
        _forget_dead()


def _backprop_step(
    func: Any, target_input_indexes: Any, grad_outputs: Any, grad_inputs: Any, is_debug: Any
) -> None:
    record = func.__dict__.get(_RECORD)
    settings = state.current()
    manager, plenty = None, True
    if settings is not None and (record is not None or not _covers(grad_outputs, settings)):
        manager, plenty = _before(grad_outputs, settings)
    # The gradients get their own graph, and its backward comes back to this function.
    twice = _keeps_graph()
    if record is None and plenty:
        func.__dict__[_TWICE if twice else _USED] = True
        _stock["backprop_step"](func, target_input_indexes, grad_outputs, grad_inputs, is_debug)
        return
    arguments = (func, target_input_indexes, grad_outputs, grad_inputs, is_debug)
    tracker = None
    if manager is not None and settings is not None:
        if state.local.running is None:
            tracker = _tracker(manager, settings)
        if tracker is not None:
            tracker.backward(func)
    outer = state.local.read_only
    state.local.read_only = is_chainers(func)
    arrays = []
    try:
        if record is not None:
            arrays = _fetch(record, manager)
            if tracker is not None:
                tracker.fetched(record.group)
        if manager is None or plenty:
            _stock["backprop_step"](*arguments)
        else:
            _run(func, func.inputs, manager, _stock["backprop_step"], *arguments)
    finally:
        state.local.read_only = outer
        arrays.clear()
        if record is None:
            func.__dict__[_TWICE if twice else _USED] = True
        elif twice:
            _keep(record)
        else:
            drop = record.drop and not _is_watched(func)
            for owner, group in record.by_manager:
                owner.release_use(group, drop)
    if manager is not None and settings is not None:
        if tracker is not None:
            tracker.ran(state.local.peak)
        _after(manager, settings, backward=True)


def _keep(record: Record) -> None:
    """Note that a function's saved arrays get one more use, and by functions that did not save them.

    The gradient of max pooling, for one, reads the indexes of the function whose gradient it is.
    """
    for owner, group in record.by_manager:
        owner.keep(group)
        owner.returned(group)


def _is_watched(func: Any) -> bool:
    """Return whether hooks may read this function's arrays after it ran: stock Chainer would give them."""
    import chainer

    return bool(chainer.get_function_hooks()) or func._n_local_function_hooks > 0


def _add_hook(self: Any, hook: Any, name: Any = None) -> None:
    _stock["add_hook"](self, hook, name)
    # The hook gets all inputs in backward, also those that only other functions have saved.
    for node in self.inputs or ():
        if node is not None:
            nodes.keep(node)


def _before_hooks(func: Any) -> None:
    """Fetch the arrays that a function's backward needs before hooks measure its time."""
    record = func.__dict__.get(_RECORD)
    if record is not None:
        for owner, group in record.by_manager:
            owner.fetch(group, read_only=True)


def _before(inputs: Any, settings: Settings) -> tuple[SwapManager | None, bool]:
    """Return the manager of the inputs' device, and whether memory is plenty and nothing observes the function.

    If memory is short, the thread's allocations ask for room from now on.
    """
    # Near the limit, on GPUs, and without the extension every function passes here: few calls, and no raw_array.
    variable, local = _stock["variable"], state.local
    in_ram, manager, nbytes = local.manager or state.process.managers.get("ram"), None, 0
    gpus = state.process.gpus
    for x in inputs:
        array = x._data[0] if isinstance(x, variable) else x
        if type(array) is ndarray:
            owner = in_ram
        elif gpus is not None and type(array) is gpus.array_type:
            owner = gpus.managers.get(array.data.device_id) or gpus.manager_for(array)
        else:
            owner = state.manager_for(array)
        if owner is not None:  # Chainer itself raises the error for inputs that are no arrays
            if manager is None:
                if local.hooked or settings.swap_all:
                    return owner, False
                manager = owner
                if manager.has_been_short:  # plans and recipes begin then
                    break
            nbytes += array.nbytes
    if manager is None:
        return None, True
    asks = manager.device.asks_for_room
    if not (settings.verify or state.observers or manager.has_been_short):
        # Where allocations always ask, nothing need be foreseen but whether to record the first iteration.
        is_known = asks and manager.tracker is not None and not manager.tracker.is_first
        if is_known:
            return manager, True
        if manager.budget.are_far(_EXPANSION * nbytes, settings):
            if native.allocator is not None and manager is in_ram and local.manager is None:
                covered = manager.budget.lend_slack() // _EXPANSION
                native.allocator.set_margin(covered, UNASKED, settings)
            return manager, True
    if not asks:
        state.hook_allocations()
    return manager, False


def _tracker(manager: SwapManager, settings: Settings) -> IterationTracker | None:
    """Return the tracker of the iterations that a function begins, or belongs to.

    Iterations are recorded once memory has been short for the first time, and the first one if it may get short.
    """
    if not settings.plan or settings.swap_all:
        if manager.follows_plan:  # of settings that were in force before
            tracker_of(manager).leave_the_plan()
        return None
    tracker = manager.tracker or tracker_of(manager)
    return tracker if manager.has_been_short or tracker.is_first else None


def _requires_grad(inputs: Any) -> bool:
    """Return whether Chainer makes a graph of a function with these inputs, if it makes any."""
    return any(getattr(x, "_requires_grad", False) for x in inputs)  # faster than the property


def _after(manager: SwapManager, settings: Settings, backward: bool) -> None:
    if settings.swap_all:
        save_pending()
        manager.move_all_out()
        if settings.swap_parameters:
            manager.move_lasting_out()
    elif state.local.running is None:
        if settings.verify:
            save_pending()  # now, while its arrays are unmodified
        # Where nothing is measured, allocations that ask have made room themselves.
        if manager.measures_growth or not manager.device.asks_for_room:
            manager.make_room(0)
    if state.local.running is None:
        manager.ended(backward)


def _run(func: Any, inputs: Any, manager: SwapManager | None, call: Any, *args: Any) -> Any:
    """Call a function of the graph; measure the memory that it takes for itself, and its time."""
    local = state.local
    outer = local.running
    if outer is not None:
        manager = None  # an inner function's memory counts for the outer one
    start, begun, measures = 0, 0.0, manager is not None and manager.measures_growth
    try:  # a signal's handler may raise anywhere
        local.running = (func, inputs)
        if manager is not None:
            if measures:
                start = local.peak = manager.usage_without_offload(manager.budget.last_used)
                if local.hooked or manager.device.asks_for_room:
                    state.begin_peak(manager)
            begun = time.perf_counter() if state.observers else 0.0
            if local.growth is not None and not manager.device.asks_for_room:
                return _observed(local.growth, manager, call, *args)
        return call(*args)
    finally:
        local.running = outer
        if manager is not None:
            if measures:
                if local.hooked or manager.device.asks_for_room:
                    state.end_peak(manager)
                manager.budget.note_growth(local.peak - start)
            if begun:
                label = wording.label_of(func)
                manager.ran(label, call is not _stock["apply"], (begun, time.perf_counter()))


def _run_verified(func: Any, inputs: Any, manager: SwapManager, call: Any, *args: Any) -> Any:
    """Run a function forward that may write to the arrays it was made with, such as running statistics.

    Such a write is legitimate; ``verify`` reports only those of the function's caller.
    """
    given = attributes.arrays_of(func, state.array_types())
    owners = [(owner, array) for array in given if (owner := state.manager_for(array))]
    for owner, array in owners:
        owner.check_unchanged(array)
    try:
        return _run(func, inputs, manager, call, *args)
    finally:
        for owner, array in owners:
            owner.accept_changes(array)


def _observed(growth: ObservedGrowth, manager: SwapManager, call: Any, *args: Any) -> Any:
    """Call a function whose allocations cannot be announced, after making room for its usual memory."""
    func, inputs = state.local.running
    described, own = [], 0
    for x in inputs:
        with contextlib.suppress(Exception):  # a variable of the user's may tell nothing
            shape, dtype = tuple(x.shape), x.dtype
            own += math.prod(shape) * dtype.itemsize
            described.append((shape, dtype))
    kind = func._impl_name, call is _stock["apply"], tuple(described)
    nbytes = growth.expected(kind, otherwise=own)
    manager.make_room(nbytes)
    used = manager.budget.last_used
    # With splitting, graph/splitting/ chooses pieces that fit.
    if used + nbytes > manager.limit and manager.settings().split == "never":
        error = manager.shortage(nbytes, describe(state.local.running))
        if error is not None:
            try:
                raise error
            finally:
                del error  # else it refers to this frame, and so to the callers' arrays
    before = manager.usage_without_offload(used)
    start = growth.begin(kind, used)
    try:
        return call(*args)
    finally:
        taken = None
        if start is not None:
            taken = growth.end(kind, start, manager.budget.used_bytes())
        state.note_used(before + (nbytes if taken is None else taken))


def describe(running: tuple[Any, Any] | None) -> str:
    """Return the name of a running function and the shapes of its inputs, ``None`` for missing inputs."""
    if running is None:
        return "what runs between two functions"
    func, inputs = running
    shapes = [wording.shape_of(x) for x in inputs] if isinstance(inputs, tuple | list) else ["?"]
    return f"{wording.label_of(func)}({', '.join(shapes)})"


def _fetch(record: Record, manager: SwapManager | None) -> list[Any]:
    arrays = []
    for owner, group in record.by_manager:
        arrays += owner.fetch(group, state.local.read_only)
        if manager is owner:
            owner.prefetch(group)
    return arrays


def save_pending() -> None:
    """Save the arrays of all functions that were noted since the last call."""
    while True:
        try:
            reference, *how = _pending.popleft()
        except IndexError:  # no test beforehand: other threads empty it, too
            return
        func = reference()
        if func is not None and func.inputs is not None and _RECORD not in func.__dict__:
            with state.local.uninterrupted:  # save all of its arrays or none
                _save(func, *how)


def _save(func: Any, drop: bool) -> None:
    nodes.watch()
    label = func._impl_name
    in_ram = state.process.managers.get("ram")

    def save(array: Any) -> PackedArray | None:
        manager = in_ram if type(array) is ndarray else state.manager_for(array)
        return None if manager is None else manager.save(array, label)

    if func._n_local_function_hooks:
        for node in func.inputs:
            nodes.keep(node)
    group = nodes.save_inputs(func, save) + nodes.save_outputs(func, save)
    group += attributes.save_attributes(func, save, state.array_types())
    if not group:
        return
    func.__dict__[_RECORD] = record = Record(group, drop)
    used, twice = func.__dict__.pop(_USED, False), func.__dict__.pop(_TWICE, False)
    for owner, saved in record.by_manager:
        owner.add_use(saved, func.rank)
        if twice:
            owner.keep(saved)
        if used:
            owner.release_use(saved, drop and not _is_watched(func))


def is_chainers(func: Any) -> bool:
    """Return whether Chainer defines the function and its backward leaves retained arrays unmodified."""
    wrapped = func.__dict__.get("_function")
    module = type(func if wrapped is None else wrapped).__module__
    return module.startswith(("chainer.", "chainermn.")) and module not in _WRITERS


#: The code that calls a function of the graph, forward or backward.
_OF_A_FUNCTION = (_run.__code__, _apply.__code__, _backprop_step.__code__)
#: The beginnings of the names of modules that write to no array which a function of Chainer has made.
_CHAINERS = ("chainer.", "chainermn.", "chainer_ooc.")


def _reach(node: Any) -> None:
    """Note that code has asked for a node's array, unless a function of Chainer has."""
    running = state.local.running
    is_expected = state.local.read_only or (running is not None and is_chainers(running[0]))
    if not (is_expected and _is_asked_by_the_function()):
        recompute.expose(node)


def is_read_only() -> bool:
    """Return whether the thread runs a function's backward that never writes to the arrays it reads."""
    return state.local.read_only and _is_asked_by_the_function()


def is_asked_by_a_function() -> bool:
    """Return whether only Chainer's code has run since the function was called that the thread runs."""
    return _is_asked_by_the_function()


def _is_asked_by_the_function() -> bool:
    """Return whether only Chainer's code has run since the running function was called.

    While it runs, hooks, handlers of signals, finalizers, and callbacks of NumPy may call other code.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code not in _OF_A_FUNCTION:
        if not frame.f_globals.get("__name__", "").startswith(_CHAINERS):
            return False
        frame = frame.f_back
    return True


def stand_in(saved: PackedArray) -> Any:
    """Return an empty array with the type and device of a saved array."""
    return saved.storage.manager.device.stand_in


def _forget_dead() -> None:
    """Remove dead functions from the pending ones; next time at twice the number of living ones."""
    global _most_pending
    with contextlib.suppress(IndexError):  # another thread emptied it
        for _ in range(len(_pending)):
            entry = _pending.popleft()
            if entry[0]() is not None:
                _pending.append(entry)
    _most_pending = max(4096, 2 * len(_pending))
