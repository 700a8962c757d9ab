"""The engine's policies, for the simulator: on demand, as in the first iteration, and by a plan."""

from __future__ import annotations

from collections import deque

from chainer_ooc.planning.plan import Plan
from chainer_ooc.planning.simulator import SimulatedState, Simulator
from chainer_ooc.planning.system import IN_FLIGHT, LOW_WATER, REMEMBERED_GROWTH

__all__ = ["OnDemand", "Planned"]


class OnDemand:
    """Decide as the engine does without a plan.

    Past the low watermark copies go out behind the computation, the oldest first. To make room, storages
    leave in this order: used ones with a copy, others with a copy, those on their way out, those only in
    memory, those that came in early. In backward, the needed storages are fetched, and earlier saved ones
    prefetched as far as memory allows.
    """

    def __init__(self) -> None:
        self._growth: deque[int] = deque([0], REMEMBERED_GROWTH)

    def between(self, simulator: Simulator) -> None:
        """Write behind after the last function; fetch this function's storages and prefetch the next."""
        low = int(simulator.system.limit_bytes * LOW_WATER)
        used = simulator.used
        if used > low:
            self.make_room(simulator, 0)
            self._write_behind(simulator, simulator.used - low)
        group = simulator.profile.used[simulator.step]
        if group:
            simulator.pinned.update(group)
            for i in group:
                if simulator.state[i] is SimulatedState.OUT:
                    self.make_room(simulator, simulator.nbytes[i])
                    simulator.begin_in(i)
            self._prefetch(simulator)
        self._growth.append(simulator.need())

    def make_room(self, simulator: Simulator, nbytes: int) -> None:
        """Evict storages until ``nbytes`` fit below the high watermark, or nothing is left."""
        high = simulator.system.high_bytes
        if simulator.used + nbytes <= high:
            return
        for step in (_release_clean, _release_leaving, _push_out, _release_arrivals):
            missing = simulator.used + nbytes - high
            if missing <= 0:
                return
            step(simulator, missing)
        if simulator.used + nbytes > high:
            simulator.wait_for_deferred_frees()

    def evicts_after_recompute(self, simulator: Simulator, i: int) -> bool:
        """Return ``False``: without a plan nothing is dropped."""
        return False

    def _write_behind(self, simulator: Simulator, nbytes: int) -> None:
        simulator.settle()
        size = simulator.nbytes
        going = sum(size[i] for i in simulator.members(SimulatedState.GOING_OUT))
        both = sum(size[i] for i in simulator.members(SimulatedState.BOTH))
        for i in simulator.members(SimulatedState.RESIDENT):
            if both + going >= nbytes or going >= IN_FLIGHT:
                return
            if simulator.uses_left[i] and not simulator.is_held(i):
                simulator.begin_out(i)
                going += size[i]

    def _prefetch(self, simulator: Simulator) -> None:
        room: int | None = None
        for i in simulator.profile.use_order[simulator.profile.use_place[simulator.step] :]:
            if simulator.state[i] is not SimulatedState.OUT or not simulator.uses_left[i]:
                continue
            nbytes = simulator.nbytes[i]
            if room is None:
                room = simulator.system.high_bytes - simulator.used - max(self._growth)
            if room < nbytes:
                room += _release_clean(simulator, nbytes - room, used_only=True)
            if room < nbytes:
                return
            room -= nbytes
            simulator.begin_in(i)


class Planned:
    """Decide as the engine does with a plan, and on demand where the plan does not fit.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._outs = deque(plan.copy_out)
        self._ins = deque(plan.copy_in)
        self._discards = deque(plan.discard)
        self._releases = deque(plan.release)
        self._leaves = {i for _, i in plan.copy_out}
        self._evict_after_recompute = set(plan.evict_after_recompute)
        self._demand = OnDemand()

    def between(self, simulator: Simulator) -> None:
        """Release the storages that have gone out; begin the copies that are due."""
        step = simulator.step
        if simulator.leaving:
            for i in simulator.settle():
                if i in self._leaves:
                    simulator.release(i)
        while self._releases and self._releases[0][0] <= step:
            simulator.release(self._releases.popleft()[1])
        while self._discards and self._discards[0][0] <= step:
            i = self._discards.popleft()[1]
            if simulator.state[i] in (
                SimulatedState.RESIDENT,
                SimulatedState.BOTH,
            ) and not simulator.is_held(i):
                simulator.discard(i)
        while self._outs and self._outs[0][0] <= step:
            i = self._outs.popleft()[1]
            if simulator.state[i] is SimulatedState.RESIDENT and not simulator.is_held(i):
                simulator.begin_out(i)
        if self._ins and self._ins[0][0] <= step:
            self._copy_in(simulator, simulator.system.high_bytes - simulator.need())

    def make_room(self, simulator: Simulator, nbytes: int) -> None:
        """Wait for pending copies out; then make room on demand."""
        missing = simulator.used + nbytes - simulator.system.high_bytes
        if missing > 0 and simulator.wait_for_leaving(missing) < missing:
            simulator.wait_for_deferred_frees()
        self._demand.make_room(simulator, nbytes)

    def evicts_after_recompute(self, simulator: Simulator, i: int) -> bool:
        """Return whether only the re-runs before the step need a storage."""
        return (simulator.step, i) in self._evict_after_recompute

    def _copy_in(self, simulator: Simulator, most: int) -> None:
        while self._ins and self._ins[0][0] <= simulator.step:
            i = self._ins[0][1]
            if simulator.state[i] is SimulatedState.OUT:
                if simulator.used + simulator.nbytes[i] > most:
                    return
                simulator.begin_in(i)
            elif simulator.state[i] is SimulatedState.GOING_OUT:
                return
            self._ins.popleft()


def _release_clean(simulator: Simulator, nbytes: int, used_only: bool = False) -> int:
    simulator.settle()
    freed = 0
    for used in (True,) if used_only else (True, False):
        for i in simulator.members(SimulatedState.BOTH):
            if freed >= nbytes:
                return freed
            if (not simulator.uses_left[i]) is used:
                freed += simulator.release(i)
    return freed


def _release_leaving(simulator: Simulator, nbytes: int) -> int:
    return simulator.wait_for_leaving(nbytes)


def _push_out(simulator: Simulator, nbytes: int) -> int:
    size = simulator.nbytes
    freed = 0
    going = sum(size[i] for i in simulator.members(SimulatedState.GOING_OUT))
    for used in (False, True):
        for i in simulator.members(SimulatedState.RESIDENT):
            if freed + going >= nbytes:
                break
            if (not simulator.uses_left[i]) is used and not simulator.is_held(i):
                simulator.begin_out(i)
                going += size[i]
                if going > IN_FLIGHT:
                    done = simulator.wait_for_leaving(1)
                    freed += done
                    going -= done
    return freed + simulator.wait_for_leaving(nbytes)


def _release_arrivals(simulator: Simulator, nbytes: int) -> int:
    freed = 0
    for i in simulator.members(SimulatedState.COMING_IN):
        if freed >= nbytes:
            break
        if i not in simulator.pinned:
            simulator.end_in(i)
            freed += simulator.release(i)
    return freed
