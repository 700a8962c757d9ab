"""The profile of a training iteration as data: steps with their times, storages with their users."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import math
import operator
from collections.abc import Collection, Sequence
from typing import Any

from chainer_ooc.planning.steps import (
    BACKWARD,
    FORWARD,
    OTHER,
    PHASES,
    Rerun,
    SavedTensor,
    Step,
    describe_input,
    row_of,
    signature_of,
    step_of,
)

__all__ = [
    "BACKWARD",
    "FORWARD",
    "OTHER",
    "VERSION",
    "Profile",
    "Rerun",
    "SavedTensor",
    "Step",
    "describe_input",
    "signature_of",
]

#: The version of the JSON format.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Profile:
    """One training iteration.

    Attributes:
        name: The name of the network.
        device: The device that ran it, or whose times were modelled.
        modelled: The times come from a model of the device, not from a clock.
        fixed_bytes: The memory in use all the time: parameters, optimizer state, input data and, on the
            CPU, the process itself.
        steps: Forward, then backward, in the order in which they ran.
        storages: The storages that forward makes, in order.
    """

    name: str
    device: str
    modelled: bool
    fixed_bytes: int
    steps: tuple[Step, ...]
    storages: tuple[SavedTensor, ...]

    def __post_init__(self) -> None:
        check(self)

    @functools.cached_property
    def signature(self) -> str:
        """The identity of the graph (hexadecimal): the functions, shapes and dtypes of forward."""
        return signature_of(step.key for step in self.steps if step.phase == FORWARD)

    @functools.cached_property
    def saved(self) -> tuple[int, ...]:
        """The storages that backward uses (indexes)."""
        return tuple(i for i, storage in enumerate(self.storages) if storage.uses)

    @functools.cached_property
    def made(self) -> tuple[tuple[int, ...], ...]:
        """The saved storages that each step makes."""
        return self._by_step(lambda storage: (storage.producer,))

    @functools.cached_property
    def used(self) -> tuple[tuple[int, ...], ...]:
        """The saved storages that each step needs in backward."""
        return self._by_step(lambda storage: storage.uses)

    @functools.cached_property
    def freed(self) -> tuple[tuple[int, ...], ...]:
        """The saved storages to which only the graph refers from each step on."""
        count = len(self.steps)
        return self._by_step(
            lambda storage: (storage.free_from,) if storage.free_from < count else ()
        )

    @functools.cached_property
    def makers(self) -> dict[int, int]:
        """For each storage that a re-run can make, the step to run again."""
        found: dict[int, int] = {}
        for number, step in enumerate(self.steps):
            for storage in step.rerun.writes if step.rerun else ():
                found.setdefault(storage, number)
        return found

    def without_reruns(self, storages: Collection[int]) -> Profile:
        """Return this profile as if nothing could be run again that makes one of these storages."""
        if not any(i in self.makers for i in storages):
            return self
        makers = {self.makers.get(i) for i in storages}
        steps = tuple(
            dataclasses.replace(step, rerun=None) if number in makers else step
            for number, step in enumerate(self.steps)
        )
        return dataclasses.replace(self, steps=steps)

    def at(self, seconds: Sequence[float]) -> Profile:
        """Return this profile with these times of its steps, and of the re-runs of these steps."""
        steps = []
        for number, (step, own) in enumerate(zip(self.steps, seconds, strict=True)):
            rerun = step.rerun
            if rerun is not None:
                again = math.fsum(seconds[n] for n in rerun.steps or (number,))
                rerun = dataclasses.replace(rerun, seconds=again + rerun.guard_seconds)
            steps.append(dataclasses.replace(step, seconds=own, rerun=rerun))
        return dataclasses.replace(self, steps=tuple(steps))

    @functools.cached_property
    def sources(self) -> dict[int, tuple[int, ...]]:
        """For each storage that re-runs can make, the saved storages that they read for it."""
        found: dict[int, tuple[int, ...]] = {}
        for i in sorted(self.makers):  # a re-run reads only earlier storages
            rerun = self.steps[self.makers[i]].rerun
            reads = () if rerun is None else rerun.reads
            if all(self.storages[read].uses or read in found for read in reads):
                saved = ((one,) if self.storages[one].uses else found[one] for one in reads)
                found[i] = tuple(dict.fromkeys(itertools.chain.from_iterable(saved)))
        return found

    @functools.cached_property
    def use_order(self) -> list[int]:
        """The saved storages in the order of their first use in backward."""
        return sorted(self.saved, key=lambda i: (self.storages[i].uses[0], i))

    @functools.cached_property
    def use_place(self) -> list[int]:
        """The number of storages whose first use is at or before each step."""
        firsts = [self.storages[i].uses[0] for i in self.use_order]
        return [bisect.bisect_right(firsts, number) for number in range(len(self.steps))]

    @functools.cached_property
    def held(self) -> list[int]:
        """``held_bytes`` of each step."""
        return [step.held_bytes for step in self.steps]

    @functools.cached_property
    def workspace(self) -> list[int]:
        """``workspace_bytes`` of each step."""
        return [step.workspace_bytes for step in self.steps]

    @functools.cached_property
    def seconds(self) -> list[float]:
        """``seconds`` of each step."""
        return [step.seconds for step in self.steps]

    @functools.cached_property
    def made_bytes(self) -> list[int]:
        """The size of the saved storages that each step makes (bytes)."""
        return [sum(self.storages[i].nbytes for i in made) for made in self.made]

    @functools.cached_property
    def need_bytes(self) -> tuple[int, ...]:
        """The most bytes that each step takes beyond the memory in use before it."""
        return tuple(map(operator.add, self.workspace, self.made_bytes))

    @property
    def compute_seconds(self) -> float:
        """The time of all steps with everything in memory (seconds)."""
        return math.fsum(step.seconds for step in self.steps)

    @property
    def saved_bytes(self) -> int:
        """The size of all saved storages (bytes)."""
        return sum(self.storages[i].nbytes for i in self.saved)

    def resident_peak(self, single_backward: bool) -> int:
        """Return the peak with everything in memory (bytes).

        Args:
            single_backward: Storages are dropped after their last use. Otherwise they stay until the
                iteration ends, as in stock Chainer.
        """
        alive = peak = 0
        for number in range(len(self.steps)):
            alive += self.made_bytes[number]
            peak = max(peak, alive + self.held[number] + self.workspace[number])
            for i in self.used[number] if single_backward else ():
                if self.storages[i].uses[-1] == number:
                    alive -= self.storages[i].nbytes
        return self.fixed_bytes + peak

    @functools.cached_property
    def in_core_bytes(self) -> int:
        """The peak with everything in memory (bytes), if storages stay until the iteration ends."""
        return self.resident_peak(single_backward=False)

    @functools.cached_property
    def floor_bytes(self) -> int:
        """The least limit (bytes) under which each step has the memory it needs: no schedule needs less."""
        return self.fixed_bytes + max(
            (self.pinned(n) + s.held_bytes + s.workspace_bytes for n, s in enumerate(self.steps)),
            default=0,
        )

    def pinned(self, number: int) -> int:
        """Return the size of the saved storages that each step needs in memory (bytes)."""
        return self._pinned[number]

    @functools.cached_property
    def _pinned(self) -> list[int]:
        totals = [0] * (len(self.steps) + 1)
        for i in self.saved:
            storage = self.storages[i]
            totals[storage.producer] += storage.nbytes
            totals[max(storage.free_from, storage.producer + 1)] -= storage.nbytes
        result, total = [], 0
        for number in range(len(self.steps)):
            total += totals[number]
            begun = (i for i in self.used[number] if self.storages[i].free_from <= number)
            result.append(total + sum(self.storages[i].nbytes for i in begun))
        return result

    def _by_step(self, steps_of: Any) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.steps]
        for i in self.saved:
            for number in steps_of(self.storages[i]):
                found[number].append(i)
        return tuple(map(tuple, found))

    def to_json(self) -> str:
        """Return the profile as JSON, with one step or storage per line."""
        lists = {
            "steps": [row_of(step) for step in self.steps],
            "storages": [
                [s.nbytes, s.producer, s.free_from, s.uses, s.label] for s in self.storages
            ],
        }
        head: dict[str, Any] = {"version": VERSION, "signature": self.signature}
        for name in ("name", "device", "modelled", "fixed_bytes"):
            head[name] = getattr(self, name)
        parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        for key, rows in lists.items():
            lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
            parts.append(f'"{key}": [\n{lines}\n]')
        return "{" + ",\n".join(parts) + "}\n"

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Return the profile that :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is no profile, or of another version.
        """
        try:
            data = json.loads(text)
            version = data["version"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                "this is no profile: JSON with a version is expected, as Profile.to_json() gives it"
            ) from error
        if version != VERSION:
            raise ValueError(
                f"a profile of version {version!r} cannot be read, only version {VERSION}; record it again"
            )
        try:
            profile = cls(
                data["name"],
                data["device"],
                data["modelled"],
                data["fixed_bytes"],
                tuple(step_of(row) for row in data["steps"]),
                tuple(
                    SavedTensor(n, p, f, tuple(u), label) for n, p, f, u, label in data["storages"]
                ),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the profile is not complete: {error!r}; record it again") from error
        if profile.signature != data.get("signature"):
            raise ValueError("the profile's steps do not match its signature; record it again")
        return profile


def check(profile: Profile) -> None:
    """Check that a profile is consistent.

    Raises:
        ValueError: If it is not. The message names the inconsistency.
    """
    count = len(profile.steps)
    if profile.fixed_bytes < 0:
        raise ValueError(f"fixed_bytes={profile.fixed_bytes} is negative; bytes are >= 0")
    for number, step in enumerate(profile.steps):
        where = f"step {number} ({step.label})"
        if step.phase not in PHASES:
            raise ValueError(f"{where}: phase={step.phase!r} is not one of {', '.join(PHASES)}")
        if not (math.isfinite(step.seconds) and step.seconds >= 0):
            raise ValueError(f"{where}: seconds={step.seconds!r} is not a time >= 0")
        if min(step.workspace_bytes, step.held_bytes) < 0:
            raise ValueError(f"{where}: its bytes must be >= 0, not {step!r}")
        for i in (*step.rerun.reads, *step.rerun.writes) if step.rerun else ():
            if not 0 <= i < len(profile.storages):
                raise ValueError(f"{where}: its re-run names storage {i!r}, which is not there")
    for i, storage in enumerate(profile.storages):
        where = f"storage {i} ({storage.label})"
        if storage.nbytes < 0:
            raise ValueError(f"{where}: nbytes={storage.nbytes} is negative; bytes are >= 0")
        if not 0 <= storage.producer < count:
            raise ValueError(f"{where}: producer={storage.producer} is not a step")
        if list(storage.uses) != sorted(set(storage.uses)) or not all(
            storage.producer < use < count for use in storage.uses
        ):
            raise ValueError(
                f"{where}: uses={storage.uses} are not steps after its producer in ascending order"
            )
        if not storage.producer < storage.free_from <= count:
            raise ValueError(
                f"{where}: free_from={storage.free_from} is not a step after its producer"
            )
