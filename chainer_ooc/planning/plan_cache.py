"""PlanCache: which plan the iteration that runs follows, found out as it runs, and what comes of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections import OrderedDict, deque
from collections.abc import Sequence

from chainer_ooc.planning.plan import Plan
from chainer_ooc.planning.prefetch_tuner import IterationTimes, PrefetchTuner
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.search import make_plan
from chainer_ooc.planning.steps import Step
from chainer_ooc.planning.system import System

__all__ = ["PlanCache", "PlanEntry"]

#: So many plans are kept; the one not followed for longest is forgotten.
_MOST = 32
#: So many graphs are known by their signature.
_MOST_SEEN = 1024
#: After so many iterations a plan is made again from their times: the recorded iteration, one of the first, is slow.
_TRIED = 3
#: After so many iterations the begins of its copies stay as they are.
_SETTLED = 16
#: A plan that is slower than on demand by this share after that is not followed any more.
_WORSE = 1.02


class PlanEntry:
    """One graph: its profile, its plan, and how the iterations went.

    Attributes:
        profile: The recorded iteration.
        pacer: Has the plan, and corrects it.
        demand_seconds: How long the recorded iteration took.
        iterations: How many have followed the plan.
        seconds: How long the last of them took.
        peak_bytes: The most memory that was in use in each.
        saved: The storages (indexes) that each step saves, in the order in which it does.
    """

    def __init__(self, profile: Profile, plan: Plan, demand_seconds: float) -> None:
        self.profile = profile
        self.demand_seconds = demand_seconds
        self.iterations = 0
        self.seconds: deque[float] = deque(maxlen=64)
        self.peak_bytes: deque[int] = deque(maxlen=64)
        self.keys = [step.key for step in profile.steps]
        self.saved: dict[int, tuple[int, ...]] = {}
        self.pacer = PrefetchTuner(plan)
        # The least time of each step, and of all steps of one iteration.
        self._least = list(profile.seconds)
        self._least_sum = math.fsum(self._least)
        # What others have decided, until the next iteration begins, and from then on.
        self._proposed: tuple[Plan | None] | None = None
        self._given_up: bool | None = None

    @property
    def plan(self) -> Plan:
        """The plan as it is now."""
        return self.pacer.plan

    @property
    def disabled(self) -> bool:
        """Whether it is not followed: on demand was faster, here or for those who decide for all."""
        return self.slower_than_on_demand if self._given_up is None else self._given_up

    @property
    def slower_than_on_demand(self) -> bool:
        """Whether on demand was faster here."""
        return self.iterations >= _TRIED and min(self.seconds) > _WORSE * self.demand_seconds

    @functools.cached_property
    def identity(self) -> str:
        """What a plan of it takes for granted (hexadecimal): the graph, and the storages by number."""
        storages = [(s.nbytes, s.producer, s.uses) for s in self.profile.storages]
        text = repr((self.profile.signature, self.keys, storages))
        return hashlib.sha256(text.encode()).hexdigest()

    def propose(self, plan: Plan | None) -> None:
        """Follow another plan from the next iteration on; ``None``: none, all is on demand."""
        self._proposed = (plan,)

    def take_proposed(self) -> None:
        """Follow from now on what was proposed."""
        if self._proposed is not None:
            (plan,) = self._proposed
            self._proposed = None
            self._given_up = plan is None
            if plan is not None and plan != self.plan:
                self.pacer = PrefetchTuner(plan)

    def finish(
        self, measured: IterationTimes, peak_bytes: int, step_seconds: Sequence[float]
    ) -> None:
        """Take note of an iteration that has followed the plan."""
        self.iterations += 1
        self.seconds.append(measured.seconds)
        self.peak_bytes.append(peak_bytes)
        self.pacer.update(measured)
        if len(step_seconds) == len(self._least):
            self._least = [min(pair) for pair in zip(self._least, step_seconds, strict=True)]
            self._least_sum = min(self._least_sum, math.fsum(step_seconds))

    def plan_again(self, system: System) -> None:
        """Plan from the least times of all iterations so far.

        In no iteration is each step as fast as it can be: the times are such that all steps take as long as they did
        in the fastest.
        """
        slower = self._least_sum / (math.fsum(self._least) or 1.0)
        steps_now = tuple(
            dataclasses.replace(step, seconds=least * slower)
            for step, least in zip(self.profile.steps, self._least, strict=True)
        )
        self.profile = dataclasses.replace(self.profile, steps=steps_now)
        self.pacer = PrefetchTuner(make_plan(self.profile, system))


class PlanCache:
    """Keeps the plans of several graphs side by side and follows the one that fits.

    The executor tells each step's key before the step runs. As long as an iteration is the beginning of one that has
    a plan, :meth:`advance` gives that plan; the step that differs ends it, and what comes until :meth:`begin` is
    served on demand. Where two graphs begin alike, the plan followed last is taken until they differ.

    Attributes:
        entries: The graphs that have plans, by signature.
    """

    def __init__(self) -> None:
        self.entries: OrderedDict[str, PlanEntry] = OrderedDict()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._fitting: list[str] = []
        self._position = -1

    def __len__(self) -> int:
        """The number of plans."""
        return len(self.entries)

    @property
    def is_settling(self) -> bool:
        """Whether what the next iterations measure is still of use."""
        return any(
            entry.iterations < _SETTLED and not entry.disabled for entry in self.entries.values()
        )

    def wants(self, signature: str) -> bool:
        """Tell whether a graph that has been recorded, and has no plan, is to be planned.

        The first one is, then those that come a second time: graphs that never come again are not worth a plan, nor
        those for which on demand was faster.
        """
        wanted = not self._seen or signature in self._seen
        self._seen[signature] = None
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return wanted and signature not in self.entries

    def add(self, profile: Profile, plan: Plan, demand_seconds: float = float("inf")) -> None:
        """Keep the plan of a graph in place of an earlier one.

        Args:
            profile: The recorded iteration.
            plan: Made from it.
            demand_seconds: How long that iteration took.

        Raises:
            ValueError: If the plan is another graph's.
        """
        if plan.signature != profile.signature:
            raise ValueError(
                f"the plan is of graph {plan.signature}, the profile of {profile.signature}; "
                "make a plan from this profile"
            )
        self.entries[profile.signature] = PlanEntry(profile, plan, demand_seconds)
        self.entries.move_to_end(profile.signature)
        while len(self.entries) > _MOST:
            self.entries.popitem(last=False)

    def begin(self) -> None:
        """Begin an iteration."""
        for entry in self.entries.values():
            entry.take_proposed()
        self._fitting = [
            signature for signature, entry in reversed(self.entries.items()) if not entry.disabled
        ]
        self._position = -1

    def advance(self, step: Step | str) -> tuple[Plan, int] | None:
        """Take note of the step that is about to run.

        Args:
            step: The step, or its key.

        Returns:
            The plan that fits all steps so far and the step's number in it, or ``None`` if there is none.
        """
        key = step if isinstance(step, str) else step.key
        position = self._position = self._position + 1
        fitting = self._fitting
        for signature in fitting:
            if not self._fits(signature, position, key):
                fitting = self._fitting = [s for s in fitting if self._fits(s, position, key)]
                break
        return (self.entries[fitting[0]].plan, position) if fitting else None

    def _fits(self, signature: str, position: int, key: str) -> bool:
        entry = self.entries.get(signature)
        return entry is not None and position < len(entry.keys) and entry.keys[position] == key

    def finish(
        self,
        measured: IterationTimes | None = None,
        peak_bytes: int = 0,
        step_seconds: Sequence[float] = (),
        system: System | None = None,
    ) -> str | None:
        """End an iteration; what was measured moves the copies of its plan.

        Args:
            measured: What the executor waited for, and when.
            peak_bytes: The most memory that was in use.
            step_seconds: How long each step took by itself, without waits.
            system: Memory and links as they are now: after a few iterations the plan is made again for it.

        Returns:
            The signature of the plan that was followed to its end, or ``None``: then the iteration is
            to be recorded, and planned.
        """
        done = [s for s in self._fitting if self._position + 1 == len(self.entries[s].keys)]
        self._fitting = []
        if not done:
            return None
        self.entries.move_to_end(done[0])
        if measured is not None:
            entry = self.entries[done[0]]
            entry.finish(measured, peak_bytes, step_seconds)
            if system is not None and entry.iterations == _TRIED:
                entry.plan_again(system)
        return done[0]
