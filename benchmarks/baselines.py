"""Policies of prior art, re-implemented on the simulator, to compare the planner with.

Each does what its paper or source says and falls back to eviction on demand only where that fits memory; what
does not fit shows in :attr:`~chainer_ooc.planning.timeline.Timeline.over_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from chainer_ooc.planning.plan import Choice, Plan
from chainer_ooc.planning.policies import OnDemand, Planned
from chainer_ooc.planning.profile import BACKWARD, FORWARD, Profile
from chainer_ooc.planning.rerun import can_be_made_again
from chainer_ooc.planning.simulator import Policy, SimulatedStorage, Simulator, simulate
from chainer_ooc.planning.states import State
from chainer_ooc.planning.system import System
from chainer_ooc.planning.timeline import Timeline

__all__ = ["BASELINES", "compare"]


class _Waits:
    """Makes room by waiting for what is going out."""

    def begin(self, simulator: Simulator) -> None:
        """Do nothing."""

    def fetched(self, simulator: Simulator, group: Sequence[SimulatedStorage]) -> None:
        """Do nothing."""

    def make_room(self, simulator: Simulator, nbytes: int) -> None:
        most = simulator.high - nbytes
        while simulator.used_bytes() > most and (storage := simulator.first_leaving()):
            simulator.end_out(storage)
            _release(simulator, storage)
        if simulator.used_bytes() > most:
            simulator.wait_for_dead()

    def read_again(self, simulator: Simulator, storage: SimulatedStorage) -> None:
        """Do nothing."""


def _settle(simulator: Simulator) -> None:
    """Release what has gone out."""
    while storage := simulator.first_left():
        simulator.end_out(storage)
        _release(simulator, storage)


def _release(simulator: Simulator, storage: SimulatedStorage) -> None:
    if storage.state is State.BOTH and not storage.referenced_externally:
        simulator.release(storage)


def _room(simulator: Simulator) -> int:
    """Return the bytes that are free beside what the step needs."""
    return simulator.high - simulator.used_bytes() - simulator.profile.need_bytes[simulator.step]


class SwapAll(_Waits):
    """All goes out after its function; in backward the next function's comes in during this one.

    IBM's out-of-core Chainer: one function ahead.
    """

    def between(self, simulator: Simulator) -> None:
        _settle(simulator)
        profile, step = simulator.profile, simulator.step
        if profile.steps[step].phase == FORWARD:
            for storage in simulator.members(State.RESIDENT):
                if not storage.referenced_externally:
                    simulator.begin_out(storage)
        using = (n for n in range(step, len(profile.steps)) if profile.used[n])
        current = next(using, -1)
        ahead = (current, next(using, -1)) if current == step else (current,)
        for number in ahead:
            for i in profile.used[number] if number >= 0 and step >= _first(profile) else ():
                storage = simulator.storages[i]
                if storage.state is State.OUT:
                    if number != step:
                        if _room(simulator) < storage.nbytes:
                            continue
                    else:
                        self.make_room(simulator, storage.nbytes)
                    simulator.begin_in(storage)


class VdnnConv(_Waits):
    """The inputs of convolutions go out during the convolution, and in during the one before it in backward.

    vDNN's vDNN_conv (arXiv 1602.08124): copies end with the function that they began with.
    """

    def __init__(self) -> None:
        self._begun_out: list[SimulatedStorage] = []
        self._begun_in: list[SimulatedStorage] = []
        self._left: list[SimulatedStorage] = []

    def between(self, simulator: Simulator) -> None:
        profile, step = simulator.profile, simulator.step
        for storage in self._begun_out:
            if storage.state is State.GOING_OUT:
                simulator.end_out(storage)
                self._left.append(storage)
        self._begun_out = []
        for storage in self._left.copy():
            if not storage.referenced_externally:
                _release(simulator, storage)
                self._left.remove(storage)
        for storage in self._begun_in:
            if storage.state is State.COMING_IN:
                simulator.end_in(storage)
        self._begun_in = []
        now = profile.steps[step]
        if now.phase == FORWARD and _is_conv(now.label):
            for i in self._inputs(profile, step):
                storage = simulator.storages[i]
                if storage.state is State.RESIDENT:
                    simulator.begin_out(storage)
                    self._begun_out.append(storage)
        if now.phase == BACKWARD:
            for number in range(step + 1, len(profile.steps)):
                if _is_conv(profile.steps[number].label):
                    for i in profile.used[number]:
                        storage = simulator.storages[i]
                        if storage.state is State.OUT and _room(simulator) >= storage.nbytes:
                            simulator.begin_in(storage)
                            self._begun_in.append(storage)
                    break

    @staticmethod
    def _inputs(profile: Profile, step: int) -> Iterator[int]:
        for number, other in enumerate(profile.steps):
            if other.phase == BACKWARD and other.function == step:
                yield from (i for i in profile.used[number] if profile.storages[i].producer < step)


class Window(_Waits):
    """All goes out but what the next functions need, as many of them as a budget allows.

    NNabla's scheduler (arXiv 2010.14109). A copy out that has not begun is cancelled when its array is
    needed again.
    """

    def between(self, simulator: Simulator) -> None:
        profile = simulator.profile
        _settle(simulator)
        most = max(s.held_bytes + s.workspace_bytes for s in profile.steps)
        budget = max(0, simulator.high - profile.fixed_bytes - most)
        window: set[int] = set()
        nbytes = 0
        for number in range(simulator.step, len(profile.steps)):
            for i in profile.used[number]:
                if i not in window:
                    nbytes += profile.storages[i].nbytes
                    window.add(i)
            nbytes += profile.made_bytes[number]
            if nbytes > budget:
                break
            for storage in (simulator.storages[i] for i in profile.used[number]):
                if storage is None:  # not made yet
                    continue
                if storage.state is State.GOING_OUT:
                    simulator.cancel_out(storage)
                elif storage.state is State.OUT and _room(simulator) >= storage.nbytes:
                    simulator.begin_in(storage)
        for storage in simulator.members(State.RESIDENT):
            if storage.number not in window and not storage.referenced_externally:
                simulator.begin_out(storage)
        for storage in simulator.members(State.BOTH):
            if storage.number not in window:
                _release(simulator, storage)


class Lru(_Waits):
    """What was used longest ago goes out when there is no room; what is needed comes in then: no copy ahead.

    As unified memory and torch-LMS do.
    """

    def between(self, simulator: Simulator) -> None:
        """Do nothing ahead of time."""

    def make_room(self, simulator: Simulator, nbytes: int) -> None:
        for state in (State.BOTH, State.RESIDENT):
            for storage in simulator.members(state):
                if simulator.used_bytes() + nbytes <= simulator.high:
                    return
                if not storage.referenced_externally:
                    if state is State.RESIDENT:
                        simulator.begin_out(storage)
                        simulator.end_out(storage)
                    simulator.release(storage)


class Checkpoints(Planned):
    """Nothing goes out: what lies between checkpoints is made again (sublinear memory, arXiv 1604.06174)."""

    def make_room(self, simulator: Simulator, nbytes: int) -> None:
        """Do nothing: there is no other way."""


def _checkpoints(profile: Profile, system: System) -> Timeline:
    """Return the fastest that fits of all numbers of segments up to twice the square root."""
    able = can_be_made_again(profile)
    most = max(2, 2 * math.isqrt(len(able) + 1))
    found = []
    for count in range(1, most + 1):
        size = math.ceil(len(able) / count)
        # The last segment's backward comes at once: it is kept.
        dropped = [i for n, i in enumerate(able) if n % size and n < len(able) - size]
        choices = [Choice.KEEP] * len(profile.storages)
        for i in dropped:
            choices[i] = Choice.RECOMPUTE
        drop = tuple(sorted((profile.storages[i].free_from, i) for i in dropped))
        plan = Plan(profile.signature, tuple(choices), discard=drop)
        found.append(simulate(profile, system, Checkpoints(plan)))
    return min(found, key=lambda timeline: (timeline.over_bytes, timeline.seconds))


def _first(profile: Profile) -> int:
    return next((n for n, step in enumerate(profile.steps) if step.phase == BACKWARD), 0)


def _is_conv(label: str) -> bool:
    return label.startswith(("Convolution", "Deconvolution"))


#: By name: what makes a policy.
BASELINES: dict[str, Callable[[], Policy]] = {
    "swap-all": SwapAll,
    "vDNN conv": VdnnConv,
    "window": Window,
    "LRU": Lru,
    "on demand": OnDemand,
}


def compare(profile: Profile, system: System) -> dict[str, Timeline]:
    """Return what each policy of prior art, and the executor without a plan, does with an iteration."""
    found = {name: simulate(profile, system, make()) for name, make in BASELINES.items()}
    return {**found, "recompute": _checkpoints(profile, system)}
