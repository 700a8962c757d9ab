"""The engine's policy, for the simulator: on demand, as in the first iteration, and by a plan."""

from __future__ import annotations

from collections.abc import Sequence

from chainer_ooc.planning.eviction import Evictor
from chainer_ooc.planning.executor import PlanExecutor
from chainer_ooc.planning.plan import Plan
from chainer_ooc.planning.simulator import SimulatedStorage, Simulator

__all__ = ["OnDemand", "Planned"]


class OnDemand:
    """Call the engine's policy where ``graph/`` and ``swap/`` call it without a plan."""

    _evictor: Evictor[SimulatedStorage]

    def begin(self, simulator: Simulator) -> None:
        """Begin an iteration."""
        self._evictor = Evictor(simulator, simulator)

    def between(self, simulator: Simulator) -> None:
        """Begin copies out behind the next function."""
        if simulator.used_bytes() > simulator.low:
            self._evictor.make_room(0)

    def fetched(self, simulator: Simulator, group: Sequence[SimulatedStorage]) -> None:
        """Prefetch what backward needs next."""
        self._evictor.prefetch(simulator.following(group))

    def make_room(self, simulator: Simulator, nbytes: int) -> None:
        """Make room under the limit for an allocation of ``nbytes``."""
        self._evictor.make_room(nbytes)

    def read_again(self, simulator: Simulator, storage: SimulatedStorage) -> None:
        """Do nothing: without a plan what re-runs have read stays."""


class Planned(OnDemand):
    """Call the engine's policy where ``graph/`` and ``swap/`` call it with a plan.

    Args:
        plan: The plan.
    """

    _executor: PlanExecutor[SimulatedStorage]

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._evict_after_recompute: list[SimulatedStorage] = []

    def begin(self, simulator: Simulator) -> None:
        """Begin an iteration."""
        super().begin(simulator)
        self._evictor.follows_plan = True
        self._executor = PlanExecutor(self._plan, simulator.storages.__getitem__)

    def between(self, simulator: Simulator) -> None:
        """Make the moves of the plan that are due."""
        step, executor = simulator.step, self._executor
        if simulator.used_bytes() > simulator.high:
            self._evictor.make_room(0)
        if not step or not executor.is_idle(step):
            self._evict_after_recompute = executor.evict_after_recompute(step)
            executor.step(step, simulator, self._evictor, simulator.high)

    def fetched(self, simulator: Simulator, group: Sequence[SimulatedStorage]) -> None:
        """Do nothing: the plan decides what comes in ahead of need."""

    def read_again(self, simulator: Simulator, storage: SimulatedStorage) -> None:
        """Evict a storage that only the re-runs before the step need."""
        if storage in self._evict_after_recompute:
            self._evictor.give_up(storage)
