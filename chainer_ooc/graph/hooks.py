"""Where functions run, forward and backward: what they keep is saved, and fetched when they need it."""

from __future__ import annotations

import contextlib
import math
import threading
import time
import weakref
from collections import deque
from typing import Any

from numpy import ndarray

from chainer_ooc import state, wording
from chainer_ooc.graph import attributes, nodes, recompute
from chainer_ooc.graph.iteration import IterationTracker, tracker_of
from chainer_ooc.graph.splitting import rules
from chainer_ooc.settings import Settings
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.observed_growth import ObservedGrowth
from chainer_ooc.swap.storage import PackedArray

__all__ = ["describe", "install", "save_pending"]

_RECORD = "_ooc_record"
_USED = "_ooc_used"
#: Of a function that has run backward for a double backward, which will run through it once more.
_TWICE = "_ooc_twice"

#: A function may need this many times the bytes of its inputs and outputs for itself (im2col needs
#: twice the size of its kernel): with less room than that, its allocations are watched.
_EXPANSION = 128

#: Chainer's functions that write in backward to what they keep; F.forget runs its caller's code, with the arrays
#: that it retained.
_WRITERS = frozenset(
    {"chainer.functions.util.forget", "chainer.functions.loss.ctc", "chainer.functions.loss.hinge"}
)

# Functions that have been applied and not been looked at yet, with their ``single_backward``: while memory
# is plenty nobody looks.
_pending: deque[tuple[weakref.ref[Any], bool]] = deque()
_most_pending = 4096
_SEQUENCES = (tuple, list)
_stock: dict[str, Any] = {}
_install_lock = threading.Lock()


class Record:
    """What a function saved.

    Attributes:
        group: All that stands in for its arrays.
        by_manager: The same, by who moves it.
        drop: They are dropped after their last use (``single_backward``).
    """

    __slots__ = ("by_manager", "drop", "group")

    def __init__(self, group: list[PackedArray], drop: bool) -> None:
        self.group = group
        self.by_manager = _by_manager(group)
        self.drop = drop

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        """A deep copy of a function has arrays of its own: none of them is saved."""
        return Record([], self.drop)

    def __reduce__(self) -> Any:
        return Record, ([], self.drop)


def install() -> None:
    """Patch Chainer, once."""
    import chainer
    from chainer import _backprop_utils
    from chainer.functions.normalization import batch_normalization

    with _install_lock:
        if _stock:
            return
        nodes.install(_stand_in, _before_hooks)
        recompute.install()
        rules.install()
        attributes.saved_attributes(batch_normalization.BatchNormalization, ["_impl"])
        attributes.saved_attributes(batch_normalization.BatchNormalizationGrad, ["_impl"])
        _stock["config"] = chainer.config
        _stock["variable"] = chainer.Variable
        _stock["apply"] = chainer.FunctionNode.apply
        _stock["backprop_step"] = _backprop_utils.backprop_step
        _stock["add_hook"] = chainer.FunctionNode.add_hook
        chainer.FunctionNode.apply = _apply
        chainer.FunctionNode.add_hook = _add_hook
        _backprop_utils.backprop_step = _backprop_step


def _config(name: str) -> Any:
    """Return what ``chainer.config`` has, without the failure of the look-up by which that finds it."""
    config = _stock["config"]
    own = config._local.__dict__
    return own[name] if name in own else getattr(config._global, name)


def _apply(self: Any, inputs: Any) -> Any:
    settings = state.current()
    apply = _stock["apply"]
    if settings is None or not isinstance(inputs, _SEQUENCES):  # others can be looked at only once
        return apply(self, inputs)
    inside = state.local.running is not None
    if inside and not settings.verify and not _config("enable_backprop"):
        return _run(self, inputs, None, apply, self, inputs)  # nothing is kept
    manager, plenty = _before(inputs, settings)
    if plenty:
        outputs = apply(self, inputs)
        if self.inputs is not None and manager is not None and not _is_foreign(self):
            _note(self, settings)
        return outputs
    if manager is None or _config("schedule_func") is not None:
        return apply(self, inputs)
    tracker = _tracker(manager, settings)
    if tracker is not None and _keeps_graph(inputs):
        tracker.forward(self, inputs, settings)
    run = _run_verified if settings.verify else _run
    outputs = run(self, inputs, manager, apply, self, inputs)
    if self.inputs is not None and not self._is_chainerx_fallback_mode:
        if tracker is not None and tracker.is_selective and tracker.moves(self):
            with state.local.uninterrupted:
                _save(self, settings.single_backward)
        else:
            _note(self, settings)
        if settings.recompute and manager.has_been_short:
            save_pending()
            # Now, not when it is saved: what it computed from, and what it made, is as it was.
            recompute.offer_recipes(self, inputs, outputs)
    if tracker is not None:
        if not tracker.is_selective:
            save_pending()
        record = self.__dict__.get(_RECORD)
        if record is not None:
            tracker.saved(self, record.group)
        elif not tracker.is_selective:
            tracker.saved(self, ())
        tracker.ran(state.local.peak)
    _after(manager, settings)
    return outputs


def _is_foreign(func: Any) -> bool:
    """Tell whether the arrays of a function are not ours to move: what static_graph runs again writes to them."""
    return func._is_chainerx_fallback_mode or _config("schedule_func") is not None


def _note(func: Any, settings: Settings) -> None:
    """Note a function that has been applied, to be looked at when memory gets short."""
    _pending.append((weakref.ref(func), settings.single_backward))
    if len(_pending) > _most_pending:
        _forget_dead()


def _backprop_step(
    func: Any, target_input_indexes: Any, grad_outputs: Any, grad_inputs: Any, is_debug: Any
) -> None:
    record = func.__dict__.get(_RECORD)
    settings = state.current()
    manager, plenty = (None, True) if settings is None else _before(grad_outputs, settings)
    # The gradients get a graph of their own: a backward through that comes back to this function.
    twice = bool(_config("enable_backprop"))
    if record is None and plenty:
        func.__dict__[_TWICE if twice else _USED] = True
        _stock["backprop_step"](func, target_input_indexes, grad_outputs, grad_inputs, is_debug)
        return
    arguments = (func, target_input_indexes, grad_outputs, grad_inputs, is_debug)
    tracker = None
    if manager is not None and settings is not None:
        tracker = _tracker(manager, settings)
        if tracker is not None:
            tracker.backward(func)
    outer = state.local.read_only
    state.local.read_only = _is_chainers(func)
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
        _after(manager, settings)


def _keep(record: Record) -> None:
    """Note that what a function saved will be used once more, and by functions that did not save it.

    The gradient of max pooling, for one, reads the indexes of the function that it is the gradient of.
    """
    for owner, group in record.by_manager:
        owner.keep(group)
        owner.returned(group)


def _is_watched(func: Any) -> bool:
    """Tell whether hooks may read what a function has used, or others after it: they get what stock gives them."""
    import chainer

    return bool(chainer.get_function_hooks()) or func._n_local_function_hooks > 0


def _add_hook(self: Any, hook: Any, name: Any = None) -> None:
    _stock["add_hook"](self, hook, name)
    # It gets the inputs in backward, also those that only others have saved.
    for node in self.inputs or ():
        if node is not None:
            nodes.keep(node)


def _before_hooks(func: Any) -> None:
    """Fetch what a function needs in backward before hooks measure it."""
    record = func.__dict__.get(_RECORD)
    if record is not None:
        for owner, group in record.by_manager:
            owner.fetch(group, read_only=True)


def _before(inputs: Any, settings: Settings) -> tuple[SwapManager | None, bool]:
    """Return the manager of the inputs' device, and whether memory is plenty and nobody watches.

    If memory is short, the thread's allocations are announced from now on.
    """
    # This runs around each function: few calls, and raw_array is a property.
    variable, closely = _stock["variable"], state.local.hooked or settings.swap_all
    in_ram, manager, nbytes = state.process.managers.get("ram"), None, 0
    for x in inputs:
        array = x._data[0] if isinstance(x, variable) else x
        owner = in_ram if type(array) is ndarray else state.manager_for(array)
        if owner is not None:  # what is no array gets Chainer's own error
            if manager is None:
                if closely:
                    return owner, False
                manager = owner
            nbytes += array.nbytes
    if manager is None:
        return None, True
    if manager.budget.are_far(_EXPANSION * nbytes, settings):
        looks = settings.verify or state.observers
        # While memory has never been short nobody plans or recomputes.
        if not looks and not (manager.has_been_short and (settings.plan or settings.recompute)):
            return manager, True
    if not manager.device.asks_for_room:
        state.hook_allocations()
    return manager, False


def _tracker(manager: SwapManager, settings: Settings) -> IterationTracker | None:
    """Return what follows the iterations; ``None`` inside of a function, which belongs to that one's step.

    While memory has never been short nobody plans.
    """
    inside = state.local.running is not None
    if inside or not settings.plan or not manager.has_been_short or settings.swap_all:
        return None
    return tracker_of(manager)


def _keeps_graph(inputs: Any) -> bool:
    for x in inputs:
        if getattr(x, "requires_grad", False):
            return bool(_config("enable_backprop"))
    return False


def _after(manager: SwapManager, settings: Settings) -> None:
    if state.local.running is not None:
        return
    if settings.swap_all or settings.verify:
        save_pending()  # now: what it computed from is as it was
    if settings.swap_all:
        manager.move_all_out()
    else:
        manager.make_room(0)


def _run(func: Any, inputs: Any, manager: SwapManager | None, call: Any, *args: Any) -> Any:
    """Call a function of the graph; with a manager, note what it takes for itself, and how long."""
    local = state.local
    outer = local.running
    if outer is not None:
        manager = None  # a function inside another one takes part in what that takes
    start, begun = 0, 0.0
    try:  # a signal's handler may raise anywhere
        local.running = (func, inputs)
        if manager is not None:
            local.peak = start = manager.usage_without_offload(manager.budget.last_used)
            if local.hooked:
                state.begin_peak(manager)
            begun = time.perf_counter() if state.observers else 0.0
            if local.growth is not None and not manager.device.asks_for_room:
                return _observed(local.growth, manager, call, *args)
        return call(*args)
    finally:
        local.running = outer
        if manager is not None:
            if local.hooked:
                state.end_peak()
            manager.budget.note_growth(local.peak - start)
            if begun:
                label = wording.label_of(func)
                manager.ran(label, call is not _stock["apply"], (begun, time.perf_counter()))


def _run_verified(func: Any, inputs: Any, manager: SwapManager, call: Any, *args: Any) -> Any:
    """Run a function forward that may write to the arrays it was made with, running statistics say.

    That is no mistake of its caller's, which ``verify`` reports.
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
    """Call a function whose allocations are not announced: room is made for what it was seen to take before."""
    func, inputs = state.local.running
    described = tuple((x.shape, x.dtype) for x in inputs if hasattr(x, "dtype"))
    kind = func._impl_name, call is _stock["apply"], described
    own = sum(math.prod(shape) * dtype.itemsize for shape, dtype in described)
    nbytes = growth.expected(kind, otherwise=own)
    manager.make_room(nbytes)
    used = manager.budget.last_used
    # What can run in pieces finds out for itself how many.
    if used + nbytes > manager.limit and manager.settings().split == "never":
        error = manager.shortage(nbytes, describe(state.local.running))
        if error is not None:
            try:
                raise error
            finally:
                del error  # it would hold this frame, and so those of its callers with their arrays
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
    """Name a function that runs and the shapes of its inputs, ``None`` for those that are not given."""
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


def _by_manager(group: list[PackedArray]) -> list[tuple[SwapManager, list[PackedArray]]]:
    managers: dict[SwapManager, list[PackedArray]] = {}
    for saved in group:
        managers.setdefault(saved.storage.manager, []).append(saved)
    return list(managers.items())


def save_pending() -> None:
    """Save what the functions keep that have been applied since the last time."""
    while True:
        try:
            reference, *how = _pending.popleft()
        except IndexError:  # not asked for beforehand: other threads take from it too
            return
        func = reference()
        if func is not None and func.inputs is not None and _RECORD not in func.__dict__:
            with state.local.uninterrupted:  # all that it keeps is saved, or nothing
                _save(func, *how)


def _save(func: Any, drop: bool) -> None:
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


def _is_chainers(func: Any) -> bool:
    """Tell whether a function is one of Chainer's, which leave what they retain as it is."""
    wrapped = func.__dict__.get("_function")
    module = type(func if wrapped is None else wrapped).__module__
    return module.startswith(("chainer.", "chainermn.")) and module not in _WRITERS


def _stand_in(saved: PackedArray) -> Any:
    """Return an array with no elements of the type and device of what is saved."""
    return saved.storage.manager.device.stand_in


def _forget_dead() -> None:
    """Leave out functions that died; look again when there are twice as many as live."""
    global _most_pending
    with contextlib.suppress(IndexError):  # another thread has saved them all
        for _ in range(len(_pending)):
            entry = _pending.popleft()
            if entry[0]() is not None:
                _pending.append(entry)
    _most_pending = max(4096, 2 * len(_pending))
