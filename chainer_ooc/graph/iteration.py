"""Track training iterations: record one, plan it, and have the engine follow the plan in later ones."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

from chainer_ooc.graph.recompute import STEP, Recipes, discards_all
from chainer_ooc.planning.executor import PlanExecutor
from chainer_ooc.planning.plan_cache import Conditions, PlanCache, PlanEntry, plan_for
from chainer_ooc.planning.profile import Profile, describe_input, signature_of
from chainer_ooc.planning.recorder import Recorder
from chainer_ooc.planning.steps import BACKWARD, FORWARD, OTHER, key_of
from chainer_ooc.planning.system import System, Tier
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.ram import native
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.storage import PackedArray, State, Storage

__all__ = ["IterationTracker", "tracker_of"]

#: The assumed bandwidth of a link before the first copy over it (bytes per second).
ASSUMED_BANDWIDTH = 1e9
#: After this many known iterations the next ones are not recorded, and after this many unknown ones not what could
#: be run again.
WARY = 4
#: The number of functions whose keys are cached.
_MOST_TEXTS = 1 << 14
#: The label of the time after backward: the update, the next batch.
BETWEEN = "between iterations"


@dataclasses.dataclass
class MeasuredTimes:
    """The times of an iteration, for :class:`~chainer_ooc.planning.prefetch_tuner.PrefetchTuner`."""

    seconds: float = 0.0
    waits: dict[int, float] = dataclasses.field(default_factory=dict)
    slack: dict[int, float] = dataclasses.field(default_factory=dict)
    starts: list[float] = dataclasses.field(default_factory=list)


class Guarded(NamedTuple):
    """What a plan with re-runs has to look at while functions run forward.

    Attributes:
        run: The steps that run again: what they read must be unchanged then.
        save: The steps that save what the plan discards: its recipe is written then.
        moves: The steps that save what moves, is discarded, or is read by re-runs.
        make: The steps that run again, or make what is discarded or read by re-runs: it matters who gets that.
    """

    make: frozenset[int] = frozenset()
    run: frozenset[int] = frozenset()
    save: frozenset[int] = frozenset()
    moves: frozenset[int] = frozenset()


_NOTHING = Guarded()


class IterationTracker:
    """Track the iterations of one device.

    An iteration begins with the first function that runs forward after backward, and ends where the next
    one begins. An unknown iteration is recorded, and planned when the next one begins. A function that
    differs from the plan's ends the plan: the rest of the iteration moves on demand.

    The training thread calls the methods where functions run, outside of other functions. An iteration with
    functions of other threads counts as unknown.

    Args:
        manager: The device's manager.

    Attributes:
        plan_cache: The plans of the device's graphs.
        is_selective: Only the arrays that the plan moves are saved now.
        is_guarding: It matters who gets what the present step makes: a plan discards it, runs it again, or reads it for
            that; or it is not known yet what a plan will do.
    """

    def __init__(self, manager: SwapManager) -> None:
        self.manager = manager
        self.plan_cache = PlanCache()
        self._counters = manager.counters
        self._lock = native.EngineLock()
        self._thread = 0
        self._iteration = self._number = -1  # no function of an iteration has run yet
        self._at = (-1, -1)  # the two, one object for each step
        # Whether backward has run: the next function that runs forward begins an iteration.
        self._backward = False
        self._strangers = 0  # the number of last iterations that no plan fitted
        self._to_record = WARY  # the number of iterations still to record, at most
        self._keys: list[str] = []
        self._clocks: list[float] = []
        # The device's marks at the begin and the end of each step; ``None`` while times are not needed.
        self._marks: list[Any] | None = None
        self._asked: Any = None
        self._arrivals: dict[int, tuple[Any, Any]] = {}
        # Storages by number: their order of saving in an iteration that saves everything.
        self._storages: dict[int, weakref.ref[Storage]] = {}
        self._numbers: dict[int, int] = {}  # the numbers by Storage.sequence
        self._saved: dict[int, tuple[int, ...]] = {}  # the numbers that each step has saved
        self._saves_selectively = False  # arrays that the plan keeps in memory are not saved
        self._unsaved: list[weakref.ref[Any]] = []  # functions whose arrays were not saved
        # Cache: keys and input descriptions of functions by label, dtypes, shapes and makers.
        self._texts: dict[Any, tuple[str, tuple[str, ...]]] = {}
        self._recorder: Recorder | None = None
        self._held: list[tuple[weakref.ref[Storage], int]] = []
        self._executor: PlanExecutor[Storage] | None = None
        self._guarded = _NOTHING
        # Asked for every function, so computed when what they depend on changes.
        self.is_selective = self.is_guarding = self._outlines = False
        self._conditions: Conditions
        self._is_late = False  # functions of the first iteration have run untracked
        self._is_open = False  # functions that run now belong to an iteration that is tracked
        self._start = self._ended_clock = 0.0
        self._ended_used = self._peak = self._out_used = 0

    def _follow(self, executor: PlanExecutor[Storage] | None, guarded: Guarded = _NOTHING) -> None:
        """Follow a plan from now on, or none."""
        self._executor, self._guarded = executor, guarded
        self.is_selective = self._saves_selectively and executor is not None
        records = self._recorder is not None or self._marks is not None
        self.manager.measures_growth = executor is None or records
        # For graphs that never come again outlines are in vain. If one does after many others, its next iterations are
        # recorded, and its plan is made again from these.
        self._outlines = self._recorder is not None and (
            self._strangers < WARY or executor is not None
        )
        self.is_guarding = self._outlines or self._number in guarded.make

    @property
    def has_begun(self) -> bool:
        """Whether any iteration has begun."""
        return self._iteration >= 0

    @property
    def is_first(self) -> bool:
        """Whether no iteration has ended yet."""
        return self._iteration < 1

    def forward(
        self, func: Any, inputs: Iterable[Any], settings: Settings, is_fresh: bool = False
    ) -> None:
        """Note that a function is about to run forward.

        Args:
            func: The function.
            inputs: Its inputs.
            settings: The settings in force.
            is_fresh: No earlier function of the graph has run untracked.
        """
        with self._lock:
            if threading.get_ident() != self._thread and not self._is_mine():
                return
            key, described = self._describe(func, inputs)
            is_first = False
            if self._iteration < 0:
                self._is_late |= not is_fresh
                is_first = not self._is_late
            if is_first or self._backward or self._is_over(key):
                self._begin(settings)
            if self._number < 0 and not self._is_open:
                return
            self._step(key, func._impl_name, FORWARD, described)
            func.__dict__[STEP] = self._at

    def moves(self, func: Any) -> bool:
        """Return whether the plan moves or needs any array of the function that has just run forward.

        If not, its arrays need no saving, unless memory gets short all the same or the plan is left.
        """
        with self._lock:
            if self._executor is None or func.__dict__.get(STEP) is not self._at:
                return False
            if self._number in self._guarded.moves:
                return True
            self._unsaved.append(weakref.ref(func))
            return False

    def wants_recipes(self, func: Any, settings: Settings) -> Recipes | None:
        """Return which recipes to write for the function that has just run forward, ``None`` for none."""
        if discards_all(settings) and self.manager.has_been_short:
            return Recipes.GUARDED
        if not self._may_recompute(settings):
            return None
        with self._lock:
            if func.__dict__.get(STEP) is not self._at:
                return None
            if self._number in self._guarded.run:
                return Recipes.GUARDED
            if self._outlines:
                return Recipes.OUTLINED
            return Recipes.OF_SAVED if self._number in self._guarded.save else None

    def saved(self, func: Any, group: Iterable[PackedArray]) -> None:
        """Note the arrays that were saved for the function that has just run forward."""
        with self._lock:
            if func.__dict__.get(STEP) is not self._at:
                return
            group = [saved for saved in group if saved.storage.manager is self.manager]
            if self.is_selective:
                numbers = self._saved.get(self._number, ())
                if len(numbers) == len(group):
                    for number, saved in zip(numbers, group, strict=True):
                        self._take(saved.storage, number)
                return
            makers = {}
            if self._recorder is not None:
                makers = {
                    id(node.__dict__.get("_data")): node._creator_node
                    for node in func.inputs or ()
                    if node is not None
                }
            found = []
            for saved in group:
                storage = saved.storage
                number = self._numbers.get(storage.sequence, -1)
                if number < 0:
                    number = len(self._storages)
                    self._take(storage, number)
                    if self._recorder is not None:
                        maker = self._step_of(makers.get(id(saved)))
                        self._recorder.made(storage.nbytes, maker)
                        self._held.append((self._storages[number], number))
                found.append(number)
            self._saved[self._number] = tuple(found)
            if self._recorder is not None:
                self._recorder.saved(found)
                for saved in group:
                    self._note_recipe(saved.storage)

    def _take(self, storage: Storage, number: int) -> None:
        self._numbers[storage.sequence] = number
        self._storages[number] = weakref.ref(storage)

    def _note_recipe(self, storage: Storage) -> None:
        """Record a storage's recipe, if this iteration's functions and storages suffice for it."""
        recipe, number = storage.recipe, self._numbers.get(storage.sequence)
        if recipe is None or number is None or self._recorder is None:
            return
        reads = [self._numbers.get(one.sequence) for one in recipe.storages()]
        steps = [step[1] for step in recipe.functions if step and step[0] == self._iteration]
        if None not in reads and len(steps) == len(recipe.functions):
            known = [read for read in reads if read is not None]
            closed = set(recipe.storages()).difference(recipe.open_inputs())
            safe = {self._numbers[one.sequence] for one in closed}
            unsafe = [one for one in known if one not in safe]
            self._recorder.can_remake(number, known, steps, unsafe, not recipe.trusted)

    def backward(self, func: Any) -> None:
        """Note that a function is about to run backward."""
        with self._lock:
            if threading.get_ident() != self._thread and not self._is_mine():
                return
            self._backward = True
            if self._number < 0:  # the iteration began before tracking did
                return
            label = func._impl_name
            self._step(key_of(BACKWARD, label, ()), label, BACKWARD, (), self._step_of(func))

    def fetched(self, group: Iterable[PackedArray]) -> None:
        """Note that all arrays for a function's backward are in memory."""
        if self._marks is None:  # times are not needed
            return
        with self._lock:
            if not self._is_mine():
                return
            if self._executor is not None:
                for saved in group:
                    storage = saved.storage
                    number = self._numbers.get(storage.sequence)
                    if number is not None and storage.arrival is not None:
                        self._arrivals.setdefault(number, (self._asked, storage.arrival))
            if self._marks:
                self._marks[-1] = self.manager.device.mark()  # exclude the wait for its arrays

    def ran(self, peak: int) -> None:
        """Note that a function has run.

        Args:
            peak: The highest :meth:`~chainer_ooc.swap.manager.SwapManager.usage_without_offload` during the
                run (bytes).
        """
        with self._lock:
            if threading.get_ident() != self._thread and not self._is_mine():
                return
            self._peak = max(self._peak, self.manager.budget.last_used)
            if self._marks is None:
                return
            self._ended_clock = self._clock()
            if len(self._marks) % 2:
                self._marks.append(self.manager.device.mark())
            if self._recorder is not None:
                used = self.manager.usage_without_offload(self.manager.budget.used_bytes())
                self._recorder.end(max(peak, used))
                self._ended_used = used

    def _is_mine(self) -> bool:
        thread = threading.get_ident()
        if not self._thread:
            self._thread = thread
        if thread == self._thread:
            return True
        self._recorder, self._backward, self._number, self._thread = None, False, -1, thread
        self._at = (self._iteration, -1)
        self.leave_the_plan()
        return False

    def _is_over(self, key: str) -> bool:
        """True if this function starts a new iteration without a backward pass (inference with a graph)."""
        if not self._keys or key != self._keys[0]:
            return False
        return not any(reference() for reference in (*self._storages.values(), *self._unsaved))

    def _begin(self, settings: Settings) -> None:
        """End the present iteration and begin the next."""
        now = time.perf_counter()
        conditions = self._conditions_of(settings)
        if self._number >= 0 and self._backward:
            self._end(now - self._start, conditions)
        self._iteration += 1
        self._number = -1
        self._at = (self._iteration, -1)
        self._backward = False
        self._start, self._peak = time.perf_counter(), 0
        self._out_used = self._counters.bytes_out_used
        self._keys, self._clocks, self._held = [], [], []
        self._storages, self._numbers = {}, {}
        self._saved, self._unsaved = {}, []
        self._arrivals = {}
        self._conditions = conditions
        # Until memory is short only the first iteration is recorded.
        self._is_open = self.manager.has_been_short or self._iteration == 0
        if not self._is_open:
            self._marks = self._recorder = None
            self._follow(None)
            return
        self._marks = [] if self.plan_cache.is_settling or self._to_record else None
        self.plan_cache.begin(conditions)
        self._recorder = Recorder() if self._to_record else None
        # Dropping and checksums need every array to be saved.
        in_full = settings.single_backward or settings.verify or settings.discard_all
        self._saves_selectively = not (in_full or self._to_record)
        self._follow(None)

    def _end(self, seconds: float, now: Conditions) -> None:
        """End an iteration: correct its plan, or make one."""
        self.plan_cache.advance(key_of(OTHER, BETWEEN, ()))
        step_seconds, measured = self._times(seconds)
        record = None
        if (recorder := self._recorder) is not None:
            record = functools.partial(self._profile_for, now, recorder, step_seconds)
        refused = () if self._executor is None else self._executor.refused
        known = self.plan_cache.finish(measured, self._peak, step_seconds, now, refused, record)
        if known is not None:
            self._strangers = 0
            used = self._counters.bytes_out_used - self._out_used
            self.plan_cache.entries[known].bytes_out_used.append(used)
            self._to_record = max(self._to_record - 1, 0)
            if not self._saves_selectively:
                self.plan_cache.entries[known].saved = self._saved
            return
        self._strangers += 1
        signature = signature_of(key for key in self._keys if key.startswith(FORWARD))
        entry = self.plan_cache.entries.get(signature)
        if entry is not None and entry.is_probed:
            entry.note_on_demand(seconds)
        else:
            self._to_record = 0 if entry is not None and entry.disabled else WARY
        if record is not None and self.plan_cache.wants(signature) and (profile := record()).saved:
            plan = plan_for(profile, now)
            # The first iteration is slow: much is loaded, allocated and compiled in it.
            on_demand = math.inf if self._iteration == 0 else seconds
            entry = self.plan_cache.add(profile, plan, on_demand, now)
            entry.saved = self._saved

    def _conditions_of(self, settings: Settings) -> Conditions:
        beside = self.manager.bytes_beside_saved()
        return Conditions(self._system(settings), self._may_recompute(settings), beside)

    def _may_recompute(self, settings: Settings) -> bool:
        """Return whether functions may run again. While parameters move, recipes must not refer to their arrays."""
        return settings.recompute != "never" and not self.manager.lasting.is_moving

    def _times(self, seconds: float) -> tuple[list[float], MeasuredTimes | None]:
        """Return the time of each step without waits, and when the arrays that came in arrived."""
        device, marks = self.manager.device, self._marks
        if not marks or len(marks) != 2 * len(self._keys):
            return [], None
        starts, ends = marks[::2], marks[1::2]
        pairs = list(zip(starts, ends, strict=True))
        if device.runs_behind:  # the host's clock does not time the device
            own = [device.seconds(start, end) for start, end in pairs]
            own.append(max(device.seconds(ends[-1], device.mark()), 0.0))
        else:
            clocks = [*self._clocks, self._ended_clock, self._clock()]
            # Other threads' waits may make a difference negative.
            own = [max(b - a, 0.0) for a, b in itertools.pairwise(clocks)]
        measured = MeasuredTimes(seconds)
        measured.starts = [device.seconds(starts[0], start) for start in (*starts, ends[-1])]
        for number, (asked, arrival) in self._arrivals.items():
            late = device.seconds(asked, arrival)
            measured.waits[number], measured.slack[number] = max(late, 0.0), max(-late, 0.0)
        return own, measured

    def _profile(self, recorder: Recorder, step_seconds: list[float]) -> Profile:
        used = self.manager.usage_without_offload(self.manager.budget.used_bytes())
        recorder.begin(BETWEEN, OTHER, self._ended_clock, max(used, self._ended_used))
        known = len(step_seconds) == recorder.step + 1
        seconds = step_seconds if known else recorder.seconds(self._clock())
        device = self.manager.device
        return recorder.profile("recorded", device.name, seconds, device.fingerprint_bandwidth())

    def _profile_for(
        self, now: Conditions, recorder: Recorder, step_seconds: list[float]
    ) -> Profile:
        """Return the profile of the iteration that ends, with the memory beside saved arrays as it is now.

        What the iteration has allocated for later ones, too, such as the optimizer's state, counts from now on.
        """
        profile = self._profile(recorder, step_seconds)
        more = now.beside_bytes - self._conditions.beside_bytes - self.manager.lasting.bytes_away
        profile = dataclasses.replace(profile, fixed_bytes=max(0, profile.fixed_bytes + more))
        # Where parameters move, what lies beside the saved arrays is no floor.
        moves = self.manager.lasting.is_moving
        self.manager.shortages.note_floor(0 if moves else profile.floor_bytes)
        return profile

    def _system(self, settings: Settings) -> System:
        out, back = self.manager.bandwidths(ASSUMED_BANDWIDTH)
        tiers = tuple(
            Tier(name, out, back, capacity=capacity, one_queue=shared)
            for name, capacity, shared in self.manager.device.tiers()
        )
        limit = max(self.manager.limit, self.manager.budget.raised)
        return System(limit, tiers, settings.single_backward)

    def _step(
        self, key: str, label: str, phase: str, inputs: tuple[str, ...], function: int = -1
    ) -> None:
        """Begin a step: record it, and make the plan's moves that are due."""
        self._keys.append(key)
        self._number += 1
        self._at = (self._iteration, self._number)
        if self._marks is not None:
            self._clocks.append(self._clock())
        found = self.plan_cache.advance(key)
        if found is None:
            if self._executor is not None or self.manager.follows_plan:
                self.leave_the_plan()
        else:
            plan, number = found
            executor = self._executor
            if executor is None or executor.plan is not plan:
                entry = self.plan_cache.entries[plan.signature]
                if entry.adapt(self._conditions):
                    plan = entry.plan
                executor = PlanExecutor(plan, self._find)
                if self._saves_selectively:
                    self._saved = entry.saved
                self._follow(executor, guarded_by(executor, entry))
                self.manager.run_plan(executor, number)
            elif not executor.is_idle(number):
                self.manager.run_plan(executor, number)
            self.is_guarding = self._outlines or number in self._guarded.make
        if self._recorder is not None:
            used = self.manager.usage_without_offload(self.manager.budget.used_bytes())
            clock = self._clock()
            self._recorder.begin(label, phase, clock, used, inputs=inputs, function=function)
            self._note_freed()
        if self._marks is not None:
            self._asked = self.manager.device.mark()
            self._marks.append(self._asked)

    def leave_the_plan(self) -> None:
        """Move on demand for the rest of the iteration."""
        with self._lock:
            self._follow(None)
            self.manager.run_plan(None)

    def _note_freed(self) -> None:
        """Record the storages to which nothing but the graph refers from this step on."""
        held = []
        for reference, number in self._held:
            storage = reference()
            # What is on its way out is not referred to, but by its copy.
            waits = storage is not None and storage.state is State.RESIDENT
            if waits and storage is not None and storage.referenced_externally:
                held.append((reference, number))
            else:
                assert self._recorder is not None
                self._recorder.freed(number)
        self._held = held

    def _clock(self) -> float:
        """Return the time without waits (seconds): the recorded times are those of the work alone."""
        return time.perf_counter() - self._counters.lost_seconds

    def _find(self, number: int) -> Storage | None:
        reference = self._storages.get(number)
        return None if reference is None else reference()

    def _describe(self, func: Any, inputs: Iterable[Any]) -> tuple[str, tuple[str, ...]]:
        """Return the key of a function that runs forward, and the descriptions of its inputs."""
        label = func._impl_name
        try:
            facts = []
            for x in inputs:
                if x is None:
                    continue
                array, step = x, -1
                node = getattr(x, "_node", None)  # faster than the properties node and raw_array
                if node is not None:
                    array = x._data[0]
                    if node._creator_node is not None:
                        step = self._step_of(node._creator_node)
                facts.append((getattr(array, "dtype", None), getattr(array, "shape", ()), step))
            known = (label, *facts)
            found = self._texts.get(known)
            if found is None:
                if len(self._texts) >= _MOST_TEXTS:
                    self._texts.clear()
                described = tuple(describe_input(*one) for one in facts)
                found = self._texts[known] = key_of(FORWARD, label, described), described
            return found
        except Exception:  # Chainer itself raises the error for inputs that are no arrays
            return label, ()

    def _step_of(self, func: Any) -> int:
        step = None if func is None else func.__dict__.get(STEP)
        return step[1] if step is not None and step[0] == self._iteration else -1


def guarded_by(executor: PlanExecutor, entry: PlanEntry) -> Guarded:
    """Return what a plan has to look at while functions run forward."""
    dropped = executor.discarded
    run, noted = set[int](), {*dropped}
    profile = entry.profile
    for i in dropped:
        maker = profile.makers.get(i)
        rerun = None if maker is None else profile.steps[maker].rerun
        if maker is not None and rerun is not None:
            run.update(rerun.steps or (maker,))
            noted.update(rerun.reads)
    make = run.union(profile.storages[i].producer for i in noted)

    def saving(wanted: frozenset[int]) -> frozenset[int]:
        return frozenset(
            step for step, saved in entry.saved.items() if not wanted.isdisjoint(saved)
        )

    return Guarded(frozenset(make), frozenset(run), saving(dropped), saving(executor.moved | noted))


def tracker_of(manager: SwapManager) -> IterationTracker:
    """Return the iteration tracker of a manager, made if need be."""
    if manager.tracker is None:
        manager.tracker = IterationTracker(manager)
    tracker: IterationTracker = manager.tracker
    return tracker
