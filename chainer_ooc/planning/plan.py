"""The plan of an iteration: keep, swap or recompute each saved storage, and when its copies begin."""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any

__all__ = ["Choice", "Plan"]


class Choice(enum.Enum):
    """The treatment of a saved storage between its last use in forward and its first in backward."""

    KEEP = "keep"
    SWAP = "swap"
    RECOMPUTE = "recompute"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The moves of the engine in an iteration whose graph has this signature.

    Steps and storages are indexes of the profile that the plan was made from. "At a step" means right
    before it starts. Entries of one step are in order.

    Attributes:
        signature: The signature of the graph.
        choices: The choice for each storage of the profile; ``KEEP`` for storages that are not saved.
        copy_out: (step, storage): begin to copy it out. It is released when the copy has ended.
        copy_in: (step, storage): begin to copy it in, as soon as there is room.
        earliest: For each of ``copy_in`` the first step at which there is room for it until its use.
        release: (step, storage): release it again, its copy is valid.
        discard: (step, storage): discard it. Re-runs make it again when it is needed.
        evict_after_recompute: (step, storage): only the step's re-runs need it. Evict it when they have
            read it, before the step runs.
        need_bytes: The most bytes that each step takes beyond the memory in use before it. Copies that come
            in then leave that much free.
        seconds: The simulated step time.
        bound_seconds: The lower bound of the step time. No schedule is faster.
        peak_bytes: The simulated peak.
    """

    signature: str
    choices: tuple[Choice, ...]
    copy_out: tuple[tuple[int, int], ...] = ()
    copy_in: tuple[tuple[int, int], ...] = ()
    earliest: tuple[int, ...] = ()
    release: tuple[tuple[int, int], ...] = ()
    discard: tuple[tuple[int, int], ...] = ()
    evict_after_recompute: tuple[tuple[int, int], ...] = ()
    need_bytes: tuple[int, ...] = ()
    seconds: float = 0.0
    bound_seconds: float = 0.0
    peak_bytes: int = 0

    def chosen(self, choice: Choice) -> tuple[int, ...]:
        """Return the storages (indexes) with one choice."""
        return tuple(i for i, chosen in enumerate(self.choices) if chosen is choice)

    def to_json(self) -> str:
        """Return the plan as JSON."""
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["choices"] = [choice.value for choice in self.choices]
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is no plan.
        """
        try:
            data = json.loads(text)
            data["choices"] = tuple(Choice(value) for value in data["choices"])
            for name in ("copy_out", "copy_in", "release", "discard", "evict_after_recompute"):
                data[name] = tuple((step, storage) for step, storage in data[name])
            for name in ("earliest", "need_bytes"):
                data[name] = tuple(data[name])
            return cls(**data)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no plan as Plan.to_json() gives it: {error}") from error
