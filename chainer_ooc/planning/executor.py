"""The executor makes the moves of a plan, between two functions, where they are possible: see ``eviction.py``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Generic

from chainer_ooc.planning.eviction import Evictor, Moves, S
from chainer_ooc.planning.plan import Plan
from chainer_ooc.planning.states import AWAY, State

__all__ = ["PlanExecutor"]


class PlanExecutor(Generic[S]):
    """Follow one plan through one iteration, in the engine or in a simulation. It is not thread-safe.

    A move is left out if the storage is not where the plan expects it, because other code refers to the
    array or wanted it earlier. Such arrays move on demand. So a plan decides about time, never about
    results.

    Args:
        plan: The plan.
        find: Returns the storage with a number of the plan, ``None`` if it does not exist or is dead.

    Attributes:
        moved: The numbers of the storages that leave memory at some time.
        refused: The numbers of those that could not be discarded.
    """

    def __init__(self, plan: Plan, find: Callable[[int], S | None]) -> None:
        self.plan = plan
        self._find = find
        self._out = deque(plan.copy_out)
        self._come = deque(plan.copy_in)
        self._release = deque(plan.release)
        self._discard = deque(plan.discard)
        self._evict_after_recompute: dict[int, list[int]] = {}
        for step, number in plan.evict_after_recompute:
            self._evict_after_recompute.setdefault(step, []).append(number)
        moves = (
            plan.copy_out,
            plan.copy_in,
            plan.release,
            plan.discard,
            plan.evict_after_recompute,
        )
        self.moved = frozenset(number for due in moves for _, number in due)
        self.refused: set[int] = set()
        self._steps = frozenset(step for due in moves for step, _ in due)
        # Numbers, as a graph may die whenever it likes. To copy out or to discard once nothing else refers to them:
        self._waiting: list[int] = []
        self._staying: list[int] = []
        self._checking: list[int] = []
        # To release once their copy is complete: in the order in which this began the copies, and others.
        self._leaving: deque[int] = deque()
        self._left: list[int] = []

    def step(self, step: int, moves: Moves[S], evictor: Evictor[S], high: int) -> None:
        """Make the moves that are due before a step. ``high`` is the high watermark (bytes)."""
        evictor.settle()
        if self._leaving or self._left:
            self._release_left(evictor)
        if self._checking:
            self._note_refused(moves)
        for _, storage in self._due(self._release, step) if self._release else ():
            evictor.release_unless_held(storage)
        staying = self._due(self._discard, step) if self._discard else ()
        if self._staying:
            before, self._staying = self._staying, []
            staying = [*self._living(before), *staying]
        for number, storage in staying:
            if storage.state.in_memory and not storage.used and _is_held(storage, moves):
                self._staying.append(number)
            else:
                evictor.give_up(storage)
                if storage.state is State.CHECKING:
                    self._checking.append(number)
                elif storage.state is State.RESIDENT and not storage.used:
                    self.refused.add(number)
        waiting = self._due(self._out, step) if self._out else ()
        if self._waiting:
            before, self._waiting = self._waiting, []
            waiting = [*self._living(before), *waiting]
        for number, storage in waiting:
            if storage.state is State.RESIDENT and not storage.used:
                if storage.referenced_externally:
                    self._waiting.append(number)
                else:
                    moves.begin_out(storage)
                    self._leaving.append(number)
            elif storage.state in (State.GOING_OUT, State.BOTH):
                self._left.append(number)
        if self._come and self._come[0][0] <= step:
            self._begin_in(step, evictor, high - self.plan.need_bytes[step])

    def is_idle(self, step: int) -> bool:
        """Return whether nothing is due before a step that follows the last one."""
        return not (
            step in self._steps
            or step - 1 in self._evict_after_recompute  # storages evicted in the last step
            or self._leaving
            or self._left
            or self._waiting
            or self._staying
            or self._checking
            or (self._come and self._come[0][0] <= step)
        )

    @property
    def discarded(self) -> frozenset[int]:
        """The numbers of the storages that the plan discards at some time."""
        return frozenset(number for _, number in self.plan.discard)

    def evict_after_recompute(self, step: int) -> list[S]:
        """Return the storages that a step needs only for its re-runs, to be evicted after those."""
        if step not in self._evict_after_recompute:
            return []
        found = map(self._find, self._evict_after_recompute[step])
        return [storage for storage in found if storage is not None]

    def _note_refused(self, moves: Moves[S]) -> None:
        """Note the storages that were to be discarded and are not being checked any more."""
        checking = []
        for number, storage in self._living(self._checking):
            if storage.state is State.CHECKING:
                checking.append(number)
            elif not storage.used and moves.bytes_to_keep(storage) is None:
                self.refused.add(number)
        self._checking = checking

    def _release_left(self, evictor: Evictor[S]) -> None:
        if self._left:
            left, self._left = self._left, []
            for number, storage in self._living(left):
                if storage.state is State.GOING_OUT:
                    self._left.append(number)
                else:
                    evictor.release_unless_held(storage)
        while self._leaving:
            first = self._find(self._leaving[0])
            if first is not None and first.state is State.GOING_OUT:
                return
            self._leaving.popleft()
            if first is not None:
                evictor.release_unless_held(first)

    def _due(self, moves: deque[tuple[int, int]], step: int) -> Sequence[tuple[int, S]]:
        if not moves or moves[0][0] > step:
            return ()
        due = []
        while moves and moves[0][0] <= step:
            due.append(moves.popleft()[1])
        return self._living(due)

    def _living(self, numbers: Iterable[int]) -> list[tuple[int, S]]:
        """Return the storages with these numbers that are alive."""
        living = []
        for number in numbers:
            storage = self._find(number)
            if storage is not None:
                living.append((number, storage))
        return living

    def _begin_in(self, step: int, evictor: Evictor[S], most: int) -> None:
        """Begin the due copies in, in order, until ``most`` bytes would be exceeded."""
        while self._come and self._come[0][0] <= step:
            storage = self._find(self._come[0][1])
            if storage is not None and not storage.used:
                if storage.state is State.GOING_OUT:
                    return
                if storage.state in AWAY and not evictor.begin_ahead(storage, most):
                    return
            self._come.popleft()


def _is_held(storage: S, moves: Moves[S]) -> bool:
    """Return whether code refers to a storage, or to an input of its re-run to which it could write unnoticed."""
    return storage.referenced_externally or any(
        one.state is State.RESIDENT and one.referenced_externally
        for one in moves.open_inputs(storage)
    )
