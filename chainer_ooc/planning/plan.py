"""Plan: what becomes of each saved storage, and when its copies start."""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any

__all__ = ["Choice", "Plan"]


class Choice(enum.Enum):
    """What becomes of a saved storage between its last use in forward and its first in backward."""

    KEEP = "keep"
    SWAP = "swap"
    RECOMPUTE = "recompute"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the executor does in an iteration whose graph has this signature.

    Steps and storages are the indexes of the profile that the plan was made from. "At a step" means right
    before it starts; entries of one step are in order.

    Attributes:
        signature: Of the graph.
        choices: For each storage of the profile; ``KEEP`` for those that nobody saved.
        copy_out: (step, storage): begin to copy it out; it is released as soon as that has ended.
        copy_in: (step, storage): begin to copy it in, as soon after that as there is room.
        earliest: For each of ``copy_in`` the first step at which there is room for it until its use.
        release: (step, storage): give it up again, its copy is valid.
        drop: (step, storage): give it up; it is made again by what ``rerun`` says.
        rerun: (step, forward steps): run these again, in this order, before the step.
        evict_after_recompute: (step, storage): only what the step runs again needs it: give it up as soon as that
            has read it, before the step runs.
        need_bytes: For each step what it takes at most beyond what is in use before it: what begins to come in
            then leaves that much free.
        seconds: The step time that the simulation foresees.
        bound_seconds: The lower bound of the step time; no schedule is faster.
        peak_bytes: The peak that the simulation foresees.
    """

    signature: str
    choices: tuple[Choice, ...]
    copy_out: tuple[tuple[int, int], ...] = ()
    copy_in: tuple[tuple[int, int], ...] = ()
    earliest: tuple[int, ...] = ()
    release: tuple[tuple[int, int], ...] = ()
    drop: tuple[tuple[int, int], ...] = ()
    rerun: tuple[tuple[int, tuple[int, ...]], ...] = ()
    evict_after_recompute: tuple[tuple[int, int], ...] = ()
    need_bytes: tuple[int, ...] = ()
    seconds: float = 0.0
    bound_seconds: float = 0.0
    peak_bytes: int = 0

    def chosen(self, choice: Choice) -> tuple[int, ...]:
        """Return the storages (indexes) of one choice."""
        return tuple(i for i, chosen in enumerate(self.choices) if chosen is choice)

    def to_json(self) -> str:
        """Return it as JSON."""
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["choices"] = [choice.value for choice in self.choices]
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return what :meth:`to_json` wrote.

        Raises:
            ValueError: If it is no plan.
        """
        try:
            data = json.loads(text)
            data["choices"] = tuple(Choice(value) for value in data["choices"])
            for name in ("copy_out", "copy_in", "release", "drop", "evict_after_recompute"):
                data[name] = tuple((step, storage) for step, storage in data[name])
            data["rerun"] = tuple((step, tuple(again)) for step, again in data["rerun"])
            for name in ("earliest", "need_bytes"):
                data[name] = tuple(data[name])
            return cls(**data)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no plan as Plan.to_json() gives it: {error}") from error
