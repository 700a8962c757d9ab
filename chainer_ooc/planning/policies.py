"""Policies of the executor: on demand, as in the first iteration, and by a plan."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from chainer_ooc.planning.plan import Plan
from chainer_ooc.planning.timeline import Simulation, State

__all__ = ["OnDemand", "Planned", "Policy"]

#: As in chainer_ooc.swap.manager: the low-water mark as a share of the limit, the most bytes on their way
#: out behind the computation, and how many functions the next one's appetite is guessed from.
LOW_WATER = 0.8
IN_FLIGHT = 256 << 20
REMEMBERED = 16


class Policy(Protocol):
    """What decides in a simulated iteration."""

    def between(self, simulation: Simulation) -> None:
        """Act before a step."""

    def make_room(self, simulation: Simulation, nbytes: int, for_storage: int = -1) -> None:
        """Make room under the limit for ``nbytes`` that are about to be allocated."""

    def passes_by(self, simulation: Simulation, i: int) -> bool:
        """Tell whether a storage is to be given up once the re-runs before the step have read it."""


class OnDemand:
    """What the executor does with no plan.

    Past the low-water mark copies go out behind the computation, the oldest first. Room is made by giving
    up what has a copy and was used, what has a copy, what is going out, what is only in memory, what came
    in early. In backward what a function needs is fetched, and what was saved before it as far ahead as
    memory allows.
    """

    def __init__(self) -> None:
        self._growth: deque[int] = deque([0], REMEMBERED)

    def between(self, simulation: Simulation) -> None:
        """Write behind after the last function; fetch what this one needs, and ahead of it."""
        low = int(simulation.system.limit_bytes * LOW_WATER)
        used = simulation.used
        if used > low:
            self.make_room(simulation, 0)
            self._write_behind(simulation, simulation.used - low)
        group = simulation.profile.used[simulation.step]
        if group:
            simulation.pinned.update(group)
            for i in group:
                if simulation.state[i] is State.OUT:
                    self.make_room(simulation, simulation.nbytes[i])
                    simulation.begin_in(i)
            self._prefetch(simulation)
        self._growth.append(simulation.need())

    def make_room(self, simulation: Simulation, nbytes: int, for_storage: int = -1) -> None:
        """Give up memory until ``nbytes`` fit below the high-water mark, or nothing is left."""
        high = simulation.system.high_bytes
        if simulation.used + nbytes <= high:
            return
        for step in (_release_clean, _release_leaving, _push_out, _release_arrivals):
            missing = simulation.used + nbytes - high
            if missing <= 0:
                return
            step(simulation, missing)
        if simulation.used + nbytes > high:
            simulation.wait_for_graves()

    def passes_by(self, simulation: Simulation, i: int) -> bool:
        """Tell whether only the re-runs before the step need a storage: nothing is dropped on demand."""
        return False

    def _write_behind(self, simulation: Simulation, nbytes: int) -> None:
        simulation.settle()
        size = simulation.nbytes
        going = sum(size[i] for i in simulation.members(State.GOING_OUT))
        both = sum(size[i] for i in simulation.members(State.BOTH))
        for i in simulation.members(State.RESIDENT):
            if both + going >= nbytes or going >= IN_FLIGHT:
                return
            if simulation.uses_left[i] and not simulation.is_held(i):
                simulation.begin_out(i)
                going += size[i]

    def _prefetch(self, simulation: Simulation) -> None:
        room: int | None = None
        for i in simulation.profile.use_order[simulation.profile.use_place[simulation.step] :]:
            if simulation.state[i] is not State.OUT or not simulation.uses_left[i]:
                continue
            nbytes = simulation.nbytes[i]
            if room is None:
                room = simulation.system.high_bytes - simulation.used - max(self._growth)
            if room < nbytes:
                room += _release_clean(simulation, nbytes - room, used_only=True)
            if room < nbytes:
                return
            room -= nbytes
            simulation.begin_in(i)


class Planned:
    """What the executor does by a plan. What the plan did not foresee is done on demand.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._outs = deque(plan.copy_out)
        self._ins = deque(plan.copy_in)
        self._drops = deque(plan.drop)
        self._releases = deque(plan.release)
        self._leaves = {i for _, i in plan.copy_out}
        self._pass_by = set(plan.pass_by)
        self._demand = OnDemand()

    def between(self, simulation: Simulation) -> None:
        """Release what has gone out; begin the copies that are due."""
        step = simulation.step
        if simulation.leaving:
            for i in simulation.settle():
                if i in self._leaves:
                    simulation.release(i)
        while self._releases and self._releases[0][0] <= step:
            simulation.release(self._releases.popleft()[1])
        while self._drops and self._drops[0][0] <= step:
            i = self._drops.popleft()[1]
            if simulation.state[i] in (State.RESIDENT, State.BOTH) and not simulation.is_held(i):
                simulation.drop(i)
        while self._outs and self._outs[0][0] <= step:
            i = self._outs.popleft()[1]
            if simulation.state[i] is State.RESIDENT and not simulation.is_held(i):
                simulation.begin_out(i)
        if self._ins and self._ins[0][0] <= step:
            self._copy_in(simulation, simulation.system.high_bytes - simulation.need())

    def make_room(self, simulation: Simulation, nbytes: int, for_storage: int = -1) -> None:
        """Wait for what is going out; then as on demand."""
        missing = simulation.used + nbytes - simulation.system.high_bytes
        if missing > 0 and simulation.wait_for_leaving(missing) < missing:
            simulation.wait_for_graves()
        self._demand.make_room(simulation, nbytes)

    def passes_by(self, simulation: Simulation, i: int) -> bool:
        """Tell whether only the re-runs before the step need a storage."""
        return (simulation.step, i) in self._pass_by

    def _copy_in(self, simulation: Simulation, most: int) -> None:
        while self._ins and self._ins[0][0] <= simulation.step:
            i = self._ins[0][1]
            if simulation.state[i] is State.OUT:
                if simulation.used + simulation.nbytes[i] > most:
                    return
                simulation.begin_in(i)
            elif simulation.state[i] is State.GOING_OUT:
                return
            self._ins.popleft()


def _release_clean(simulation: Simulation, nbytes: int, used_only: bool = False) -> int:
    simulation.settle()
    freed = 0
    for used in (True,) if used_only else (True, False):
        for i in simulation.members(State.BOTH):
            if freed >= nbytes:
                return freed
            if (not simulation.uses_left[i]) is used:
                freed += simulation.release(i)
    return freed


def _release_leaving(simulation: Simulation, nbytes: int) -> int:
    return simulation.wait_for_leaving(nbytes)


def _push_out(simulation: Simulation, nbytes: int) -> int:
    size = simulation.nbytes
    freed = 0
    going = sum(size[i] for i in simulation.members(State.GOING_OUT))
    for used in (False, True):
        for i in simulation.members(State.RESIDENT):
            if freed + going >= nbytes:
                break
            if (not simulation.uses_left[i]) is used and not simulation.is_held(i):
                simulation.begin_out(i)
                going += size[i]
                if going > IN_FLIGHT:
                    done = simulation.wait_for_leaving(1)
                    freed += done
                    going -= done
    return freed + simulation.wait_for_leaving(nbytes)


def _release_arrivals(simulation: Simulation, nbytes: int) -> int:
    freed = 0
    for i in simulation.members(State.COMING_IN):
        if freed >= nbytes:
            break
        if i not in simulation.pinned:
            simulation.end_in(i)
            freed += simulation.release(i)
    return freed
