"""Record an iteration while it runs, as a profile."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from chainer_ooc.planning.profile import BACKWARD, Profile, Rerun, SavedTensor, Step

__all__ = ["Recorder"]


@dataclasses.dataclass
class _Step:
    label: str
    phase: str
    inputs: tuple[str, ...]
    function: int
    time: float
    used_bytes: int
    peak_bytes: int = 0
    saved: tuple[int, ...] = ()
    rerun: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    by: tuple[int, ...] = ()  # the steps to run again
    checked: bool = False  # fingerprints tell whether the re-run gives the same bits


@dataclasses.dataclass
class _Storage:
    nbytes: int
    producer: int
    label: str
    free_from: int | None = None


class Recorder:
    """Record one iteration. Storages are numbers that :meth:`made` returns, not arrays."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._storages: list[_Storage] = []
        self._guard_bandwidth = math.inf

    @property
    def step(self) -> int:
        """The running or last step (index), -1 before the first."""
        return len(self._steps) - 1

    def begin(
        self,
        label: str,
        phase: str,
        time: float,
        used_bytes: int,
        inputs: tuple[str, ...] = (),
        function: int = -1,
    ) -> int:
        """Begin a step and end the time of the one before. Return its index.

        Args:
            label: The name of the function.
            phase: ``FORWARD``, ``BACKWARD`` or ``OTHER``.
            time: The present time (seconds) of any clock.
            used_bytes: The memory that would be in use now if nothing had ever left.
            inputs: Descriptions by :func:`~chainer_ooc.planning.profile.describe_input`.
            function: For backward, the index of the function's forward step.
        """
        self._steps.append(_Step(label, phase, inputs, function, time, used_bytes))
        return self.step

    def end(self, peak_bytes: int) -> None:
        """Record the highest memory while the step ran (bytes)."""
        self._steps[-1].peak_bytes = peak_bytes

    def made(self, nbytes: int, producer: int = -1) -> int:
        """Record a new storage. Return its index.

        Args:
            nbytes: The size (bytes).
            producer: The step that made it (index), -1 for the one that runs.
        """
        step = self.step if producer < 0 else producer
        self._storages.append(_Storage(nbytes, step, self._steps[step].label))
        return len(self._storages) - 1

    def producer(self, storage: int) -> int:
        """Return the step that made a storage."""
        return self._storages[storage].producer

    def saved(self, storages: Sequence[int]) -> None:
        """Record the storages that the running step keeps for backward."""
        self._steps[-1].saved = tuple(sorted(set(storages)))

    def can_remake(
        self, storage: int, reads: Sequence[int], steps: Sequence[int], checked: bool = False
    ) -> None:
        """Record that running some steps again makes a storage from other storages.

        Args:
            storage: The storage that is made.
            reads: The storages that are read.
            steps: The steps that run. They take the workspace that they took together, without the storage.
            checked: Fingerprints tell whether the result has the same bits.
        """
        maker = self._steps[self.producer(storage)]
        if maker.rerun is None:
            maker.rerun, maker.by = (tuple(sorted(set(reads))), (storage,)), tuple(steps)
            maker.checked = checked
        elif maker.by == tuple(steps):  # another result of the same steps
            known, writes = maker.rerun
            maker.rerun = tuple(sorted({*known, *reads})), tuple(sorted({*writes, storage}))

    def freed(self, storage: int) -> None:
        """Record that only the graph refers to a storage from the running or next step on."""
        self._storages[storage].free_from = max(self.step, self.producer(storage) + 1)

    def seconds(self, time: float) -> list[float]:
        """Return the time of each step; the last one ends at ``time``. Negative differences count as 0."""
        starts = [step.time for step in self._steps]
        return [max(b - a, 0.0) for a, b in zip(starts, [*starts[1:], time], strict=True)]

    def profile(
        self,
        name: str,
        device: str,
        seconds: Sequence[float],
        guard_bandwidth: float = math.inf,
    ) -> Profile:
        """Return the profile of the recorded iteration.

        Args:
            name: The name of the network.
            device: The device.
            seconds: The time of each step: from :meth:`seconds`, or the least of several iterations.
            guard_bandwidth: The bytes per second of which fingerprints are taken, for what is run again.
        """
        self._guard_bandwidth = guard_bandwidth
        count = len(self._steps)
        uses: list[list[int]] = [[] for _ in self._storages]
        for number, step in enumerate(self._steps):
            if step.phase == BACKWARD and step.function >= 0:
                for i in self._steps[step.function].saved:
                    uses[i].append(number)
        storages = tuple(
            SavedTensor(
                s.nbytes,
                s.producer,
                count if s.free_from is None else s.free_from,
                tuple(used),
                s.label,
            )
            for s, used in zip(self._storages, uses, strict=True)
        )
        made = [0] * count
        for storage in storages:
            if storage.uses:
                made[storage.producer] += storage.nbytes
        beside = []
        saved = 0
        for step, nbytes in zip(self._steps, made, strict=True):
            beside.append(step.used_bytes - saved)
            saved += nbytes
        fixed = max(0, min(beside, default=0))
        steps = tuple(
            self._step(number, storages, made[number], max(0, beside[number] - fixed), seconds)
            for number in range(count)
        )
        return Profile(name, device, False, fixed, steps, storages)

    def _step(
        self,
        number: int,
        storages: Sequence[SavedTensor],
        made: int,
        held: int,
        seconds: Sequence[float],
    ) -> Step:
        step = self._steps[number]
        workspace = max(0, step.peak_bytes - step.used_bytes - made)
        rerun = None
        if step.rerun:
            reads, writes = step.rerun
            again = [self._steps[n] for n in step.by]
            taken = sum(max(0, one.peak_bytes - one.used_bytes) for one in again)
            made = sum(storages[i].nbytes for i in writes)
            # A result that is checked gets a fingerprint before it is discarded and after the re-run.
            guard = 2 * made / self._guard_bandwidth if step.checked else 0.0
            spent = sum(seconds[n] for n in step.by) + guard
            rerun = Rerun(spent, max(0, taken - made), reads, writes, step.by, guard)
        return Step(
            step.label,
            step.phase,
            seconds[number],
            workspace,
            held,
            step.inputs,
            step.function,
            rerun,
        )
