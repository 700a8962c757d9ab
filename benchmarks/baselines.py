"""Policies of prior art, re-implemented on the simulator, to compare the planner with.

Each does what its paper or source says and falls back to eviction on demand only where that fits memory; what
does not fit shows in :attr:`~chainer_ooc.planning.timeline.Timeline.over_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from chainer_ooc.planning.plan import Choice, Plan
from chainer_ooc.planning.policies import OnDemand, Planned
from chainer_ooc.planning.profile import BACKWARD, FORWARD, Profile
from chainer_ooc.planning.rerun import can_be_made_again
from chainer_ooc.planning.residency import needs_of
from chainer_ooc.planning.simulator import Policy, SimulatedState, Simulator, simulate
from chainer_ooc.planning.system import System
from chainer_ooc.planning.timeline import Timeline

__all__ = ["BASELINES", "compare"]


class _Waits:
    """Makes room by waiting for what is going out."""

    def make_room(self, simulator: Simulator, nbytes: int) -> None:
        missing = simulator.used + nbytes - simulator.system.high_bytes
        if missing > 0:
            simulator.wait_for_leaving(missing)
        if simulator.used + nbytes > simulator.system.high_bytes:
            simulator.wait_for_deferred_frees()

    def evicts_after_recompute(self, simulator: Simulator, i: int) -> bool:
        return False


class SwapAll(_Waits):
    """All goes out after its function; in backward the next function's comes in during this one.

    IBM's out-of-core Chainer: one function ahead.
    """

    def between(self, simulator: Simulator) -> None:
        for i in simulator.settle():
            simulator.release(i)
        profile, step = simulator.profile, simulator.step
        if profile.steps[step].phase == FORWARD:
            for i in simulator.members(SimulatedState.RESIDENT):
                if not simulator.is_held(i):
                    simulator.begin_out(i)
        using = (n for n in range(step, len(profile.steps)) if profile.used[n])
        current = next(using, -1)
        ahead = (current, next(using, -1)) if current == step else (current,)
        for number in ahead:
            for i in profile.used[number] if number >= 0 and step >= _first(profile) else ():
                if simulator.state[i] is SimulatedState.OUT:
                    if number != step:
                        room = simulator.system.high_bytes - simulator.used - simulator.need()
                        if room < simulator.nbytes[i]:
                            continue
                    else:
                        self.make_room(simulator, simulator.nbytes[i])
                    simulator.begin_in(i)


class VdnnConv(_Waits):
    """The inputs of convolutions go out during the convolution, and in during the one before it in backward.

    vDNN's vDNN_conv (arXiv 1602.08124): copies end with the function that they began with.
    """

    def __init__(self) -> None:
        self._begun_out: list[int] = []
        self._begun_in: list[int] = []
        self._left: list[int] = []

    def between(self, simulator: Simulator) -> None:
        profile, step = simulator.profile, simulator.step
        for i in self._begun_out:
            if simulator.state[i] is SimulatedState.GOING_OUT:
                simulator.leaving.remove(i)
                simulator.end_out(i)
                self._left.append(i)
        self._begun_out = []
        for i in self._left.copy():
            if not simulator.is_held(i):
                simulator.release(i)
                self._left.remove(i)
        for i in self._begun_in:
            if simulator.state[i] is SimulatedState.COMING_IN:
                simulator.end_in(i)
        self._begun_in = []
        now = profile.steps[step]
        if now.phase == FORWARD and _is_conv(now.label):
            for i in self._inputs(profile, step):
                if simulator.state[i] is SimulatedState.RESIDENT:
                    simulator.begin_out(i)
                    self._begun_out.append(i)
        if now.phase == BACKWARD:
            for number in range(step + 1, len(profile.steps)):
                if _is_conv(profile.steps[number].label):
                    for i in profile.used[number]:
                        if simulator.state[i] is SimulatedState.OUT:
                            room = simulator.system.high_bytes - simulator.used
                            if room - simulator.need() >= simulator.nbytes[i]:
                                simulator.begin_in(i)
                                self._begun_in.append(i)
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
        profile, system = simulator.profile, simulator.system
        for i in simulator.settle():
            simulator.release(i)
        most = max(s.held_bytes + s.workspace_bytes for s in profile.steps)
        budget = max(0, system.high_bytes - profile.fixed_bytes - most)
        window: set[int] = set()
        nbytes = 0
        for number in range(simulator.step, len(profile.steps)):
            for i in profile.used[number]:
                if i not in window:
                    nbytes += simulator.nbytes[i]
                    window.add(i)
            nbytes += profile.made_bytes[number]
            if nbytes > budget:
                break
            for i in profile.used[number]:
                if simulator.state[i] is SimulatedState.GOING_OUT:
                    simulator.cancel_out(i)
                elif simulator.state[i] is SimulatedState.OUT:
                    room = system.high_bytes - simulator.used - simulator.need()
                    if room >= simulator.nbytes[i]:
                        simulator.begin_in(i)
        for i in simulator.members(SimulatedState.RESIDENT):
            if i not in window and not simulator.is_held(i):
                simulator.begin_out(i)
        for i in simulator.members(SimulatedState.BOTH):
            if i not in window:
                simulator.release(i)


class Lru(_Waits):
    """What was used longest ago goes out when there is no room; what is needed comes in then: no copy ahead.

    As unified memory and torch-LMS do.
    """

    def between(self, simulator: Simulator) -> None:
        """Do nothing ahead of time."""

    def make_room(self, simulator: Simulator, nbytes: int) -> None:
        high = simulator.system.high_bytes
        for state in (SimulatedState.BOTH, SimulatedState.RESIDENT):
            for i in simulator.members(state):
                if simulator.used + nbytes <= high:
                    return
                if not simulator.is_held(i):
                    if state is SimulatedState.RESIDENT:
                        simulator.begin_out(i)
                        simulator.leaving.remove(i)
                        simulator.end_out(i)
                    simulator.release(i)


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
        needs = needs_of(profile, system, dropped)
        choices = [Choice.KEEP] * len(profile.storages)
        for i in dropped:
            choices[i] = Choice.RECOMPUTE
        drop = tuple(sorted((profile.storages[i].free_from, i) for i in dropped))
        plan = Plan(profile.signature, tuple(choices), discard=drop, rerun=tuple(needs.reruns))
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
