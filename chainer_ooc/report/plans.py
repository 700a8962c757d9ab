"""The plans that iterations follow, and what came of them."""

from __future__ import annotations

import dataclasses

from chainer_ooc import state
from chainer_ooc.planning.plan import Choice
from chainer_ooc.planning.plan_cache import PlanEntry

__all__ = ["PlanReport", "plans"]


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """What is planned for one graph, and how its iterations went.

    Attributes:
        device: Where it runs.
        signature: What tells the graph from others.
        steps: How many functions it runs, forward and backward.
        storages_kept: Saved allocations that stay in memory.
        storages_swapped: Those that are copied out and back.
        storages_recomputed: Those that are made again.
        bytes_kept: Their sizes (bytes).
        bytes_swapped: Their sizes (bytes).
        bytes_recomputed: Their sizes (bytes).
        bytes_out: What is copied out in an iteration (bytes).
        bytes_in: What is copied back (bytes).
        compute_seconds: The time of all functions with nothing to wait for.
        seconds: The time of an iteration that the simulation foresees.
        bound_seconds: The time below which no schedule goes.
        peak_bytes: The peak that the simulation foresees.
        on_demand_seconds: How long the iteration took that was recorded, on demand.
        measured_seconds: How long each iteration took that followed the plan.
        measured_peak_bytes: The most memory that was in use in each, between two functions.
        followed: Whether it is followed; it is not when on demand was faster.
    """

    device: str
    signature: str
    steps: int
    storages_kept: int
    storages_swapped: int
    storages_recomputed: int
    bytes_kept: int
    bytes_swapped: int
    bytes_recomputed: int
    bytes_out: int
    bytes_in: int
    compute_seconds: float
    seconds: float
    bound_seconds: float
    peak_bytes: int
    on_demand_seconds: float
    measured_seconds: tuple[float, ...]
    measured_peak_bytes: tuple[int, ...]
    followed: bool


def plans() -> list[PlanReport]:
    """Return the plans there are, the one followed last first."""
    from chainer_ooc.graph.iteration import tracker_of

    return [
        _report(manager.device.name, entry)
        for manager in state.managers()
        for entry in reversed(tracker_of(manager).plan_cache.entries.values())
    ]


def _report(device: str, entry: PlanEntry) -> PlanReport:
    profile, plan = entry.profile, entry.plan
    size = [storage.nbytes for storage in profile.storages]
    chosen = {choice: [i for i in profile.saved if plan.choices[i] is choice] for choice in Choice}
    count = {choice: len(of) for choice, of in chosen.items()}
    nbytes = {choice: sum(size[i] for i in of) for choice, of in chosen.items()}
    return PlanReport(
        device=device,
        signature=profile.signature,
        steps=len(profile.steps),
        storages_kept=count[Choice.KEEP],
        storages_swapped=count[Choice.SWAP],
        storages_recomputed=count[Choice.RECOMPUTE],
        bytes_kept=nbytes[Choice.KEEP],
        bytes_swapped=nbytes[Choice.SWAP],
        bytes_recomputed=nbytes[Choice.RECOMPUTE],
        bytes_out=sum(size[i] for _, i in plan.copy_out),
        bytes_in=sum(size[i] for _, i in plan.copy_in),
        compute_seconds=profile.compute_seconds,
        seconds=plan.seconds,
        bound_seconds=plan.bound_seconds,
        peak_bytes=plan.peak_bytes,
        on_demand_seconds=entry.demand_seconds,
        measured_seconds=tuple(entry.seconds),
        measured_peak_bytes=tuple(entry.peak_bytes),
        followed=not entry.disabled,
    )
