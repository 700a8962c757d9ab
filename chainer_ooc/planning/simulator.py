"""Simulator of an iteration: compute, copies in two directions, and memory under the limit.

It goes from step to step as the executor does. Decisions are made where the executor makes them, between
two functions, by a policy (:mod:`chainer_ooc.planning.policies`); what takes time is computed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from chainer_ooc.planning.moves import Moves, SimulatedState
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.rerun import chain
from chainer_ooc.planning.system import System
from chainer_ooc.planning.timeline import Interval, Timeline

if TYPE_CHECKING:
    from chainer_ooc.planning.policies import Policy

__all__ = ["SimulatedState", "Simulator", "simulate"]


class Simulator(Moves):
    """A simulated iteration. Policies read its state, and act through its methods."""

    def run(self) -> Timeline:
        """Run it."""
        profile, policy, held, high = self.profile, self.policy, self._held, self._high
        used, made, made_bytes = profile.used, profile.made, profile.made_bytes
        workspace = profile.workspace
        between, state, uses_left = policy.between, self.state, self.uses_left
        for number, seconds in enumerate(self._seconds or profile.seconds):
            self.step = number
            if self._deferred_frees:
                self._clear_graves()
            between(self)
            if used[number]:
                self.pinned.update(used[number])
                self._bring(used[number])
            need = workspace[number] + made_bytes[number]
            if held[number] + self.resident + need > high:
                policy.make_room(self, need)
            peak = held[number] + self.resident + need
            if peak > self._peak:
                self._peak = peak
            self._starts.append(self.now)
            if self._detailed:
                self._note_step(number, seconds, peak)
            self.now += seconds
            self.resident += made_bytes[number]
            for i in made[number]:
                state[i] = SimulatedState.RESIDENT
            if used[number]:
                self.pinned.clear()
                for i in used[number]:
                    uses_left[i] -= 1
                    if not uses_left[i]:
                        self._finish(i)
        for link in self._links:
            link.advance(self.now)
        return self._result()

    def _bring(self, needed: Iterable[int]) -> None:
        """Have storages in memory: copied in, or made again."""
        dropped = []
        for i in needed:
            state = self.state[i]
            if state is SimulatedState.DROPPED:
                dropped.append(i)
            elif state is SimulatedState.OUT:
                self.policy.make_room(self, self.nbytes[i], for_storage=i)
                self.begin_in(i)
        if dropped:
            self._run_again(dropped)
        for i in needed:
            if self.state[i] is SimulatedState.COMING_IN:
                self.end_in(i)

    def _run_again(self, dropped: Iterable[int]) -> None:
        order, reads = chain(self.profile, dropped, self._is_there)
        self.pinned.update(reads)
        self._bring(reads)
        last = {i: number for number, rerun in order for i in rerun.reads}
        using = self.profile.used[self.step]
        evict_after_recompute = {
            i for i in reads if i not in using and self.policy.evicts_after_recompute(self, i)
        }
        temporary: dict[int, int] = {}
        for number, rerun in order:
            back = []
            for i in rerun.writes:
                keep = self.state[i] is SimulatedState.DROPPED
                if keep and (i in using or not self.policy.evicts_after_recompute(self, i)):
                    back.append(i)
                else:
                    temporary[i] = self.nbytes[i]
            nbytes = sum(self.nbytes[i] for i in back)
            beside = rerun.workspace_bytes + sum(temporary.values())
            self.policy.make_room(self, nbytes + beside)
            for i in back:
                self.state[i] = SimulatedState.RESIDENT
                self.pinned.add(i)
            self._take(nbytes)
            self._note_peak(self.used + beside)
            self._spend("rerun", number, rerun.seconds)
            self._rerun += rerun.seconds
            for i in [i for i in temporary if last.get(i, -1) <= number]:
                del temporary[i]
            for i in [i for i in evict_after_recompute if last[i] <= number]:
                evict_after_recompute.remove(i)
                self.pinned.discard(i)
                self.release(i)
        self.reruns.append((self.step, tuple(number for number, _ in order)))

    def _is_there(self, i: int) -> bool:
        return self.state[i] not in (
            SimulatedState.DROPPED,
            SimulatedState.DEAD,
            SimulatedState.UNMADE,
        )

    def _note_step(self, number: int, seconds: float, peak: int) -> None:
        phase = self.profile.steps[number].phase
        self._intervals.append(Interval(phase, number, self.now, self.now + seconds))
        self._memory += [(self.now, peak), (self.now + seconds, peak)]

    def _result(self) -> Timeline:
        if self._detailed:
            for copy in self._copies:
                if copy.start >= 0:
                    end = copy.end if copy.end >= 0 else self.now
                    kind = "in" if copy.inward else "out"
                    self._intervals.append(Interval(kind, copy.storage, copy.start, end))
        return Timeline(
            self.now,
            self._peak,
            max(0, self._peak - self._high),
            self._bytes[0],
            self._bytes[1],
            self._wait_in,
            self._wait_out,
            self._rerun,
            self._waits,
            self._slack,
            self._starts,
            self.reruns,
            self._intervals,
            self._memory,
            self._unplaced,
        )


def simulate(
    profile: Profile,
    system: System,
    policy: Policy,
    detailed: bool = False,
    seconds: Sequence[float] | None = None,
) -> Timeline:
    """Simulate one iteration.

    Args:
        profile: The iteration.
        system: Memory and links.
        policy: What decides.
        detailed: Note all intervals and the memory curve, to be drawn.
        seconds: The time of each step, where it is not the profile's: noise.
    """
    return Simulator(profile, system, policy, detailed, seconds).run()
