"""The executor makes the moves of a plan, between two functions, where they are possible."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from chainer_ooc.planning.plan import Plan
from chainer_ooc.swap.storage import AWAY, State, Storage

if TYPE_CHECKING:
    from chainer_ooc.swap.budget import MemoryBudget
    from chainer_ooc.swap.eviction import Evictor
    from chainer_ooc.swap.transfers import Transfers

__all__ = ["PlanExecutor"]


class PlanExecutor:
    """Follow one plan through one iteration. Its caller holds the manager's lock.

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

    def __init__(self, plan: Plan, find: Callable[[int], Storage | None]) -> None:
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
        # To copy out or to discard once nothing else refers to them; to release once their copy is complete.
        self._waiting: list[Storage] = []
        self._staying: list[tuple[int, Storage]] = []
        self._checking: list[tuple[int, Storage]] = []
        self._leaving: list[Storage] = []

    def step(self, step: int, transfers: Transfers, evictor: Evictor, budget: MemoryBudget) -> None:
        """Make the moves that are due before a step."""
        evictor.settle()
        self._leaving = [one for one in self._leaving if not _has_left(one, evictor)]
        for _, storage in self._due(self._release, step):
            evictor.release_unless_held(storage)
        self._note_refused()
        staying, self._staying = self._staying + self._due(self._discard, step), []
        for number, storage in staying:
            if storage.state.in_memory and not storage.used and _is_held(storage):
                self._staying.append((number, storage))
            else:
                evictor.give_up(storage)
                if storage.state is State.CHECKING:
                    self._checking.append((number, storage))
                elif storage.state is State.RESIDENT and not storage.used:
                    self.refused.add(number)
        due = [storage for _, storage in self._due(self._out, step)]
        waiting, self._waiting = self._waiting + due, []
        for storage in waiting:
            if storage.state is State.RESIDENT and not storage.used:
                if storage.referenced_externally:
                    self._waiting.append(storage)
                    continue
                transfers.begin_out(storage)
            if storage.state in (State.GOING_OUT, State.BOTH):
                self._leaving.append(storage)
        if self._come and self._come[0][0] <= step:
            self._begin_in(step, evictor, budget.high - self.plan.need_bytes[step])

    def is_idle(self, step: int) -> bool:
        """Return whether nothing is due before a step that follows the last one."""
        return not (
            step in self._steps
            or step - 1 in self._evict_after_recompute  # storages evicted in the last step
            or self._leaving
            or self._waiting
            or self._staying
            or self._checking
            or (self._come and self._come[0][0] <= step)
        )

    @property
    def discarded(self) -> frozenset[int]:
        """The numbers of the storages that the plan discards at some time."""
        return frozenset(number for _, number in self.plan.discard)

    def evict_after_recompute(self, step: int) -> list[Storage]:
        """Return the storages that a step needs only for its re-runs, to be evicted after those."""
        found = (self._find(number) for number in self._evict_after_recompute.get(step, ()))
        return [storage for storage in found if storage is not None]

    def _note_refused(self) -> None:
        """Note the storages that were to be discarded and are not being checked any more."""
        checking = []
        for number, storage in self._checking:
            if storage.state is State.CHECKING:
                checking.append((number, storage))
            elif storage.recipe is None and not storage.used:
                self.refused.add(number)
        self._checking = checking

    def _due(self, moves: deque[tuple[int, int]], step: int) -> list[tuple[int, Storage]]:
        due = []
        while moves and moves[0][0] <= step:
            number = moves.popleft()[1]
            storage = self._find(number)
            if storage is not None:
                due.append((number, storage))
        return due

    def _begin_in(self, step: int, evictor: Evictor, most: int) -> None:
        """Begin the due copies in, in order, until ``most`` bytes would be exceeded."""
        while self._come and self._come[0][0] <= step:
            storage = self._find(self._come[0][1])
            if storage is not None and not storage.used:
                if storage.state is State.GOING_OUT:
                    return
                if storage.state in AWAY and not evictor.begin_ahead(storage, most):
                    return
            self._come.popleft()


def _is_held(storage: Storage) -> bool:
    """Return whether anything outside the graph refers to a storage or to an input of its recipe."""
    inputs = () if storage.recipe is None else storage.recipe.storages()
    return storage.referenced_externally or any(
        one.state is State.RESIDENT and one.referenced_externally for one in inputs
    )


def _has_left(storage: Storage, evictor: Evictor) -> bool:
    """Release a storage if its copy out is complete. Return whether there is nothing left to wait for."""
    if storage.state is State.GOING_OUT:
        return False
    evictor.release_unless_held(storage)
    return True
