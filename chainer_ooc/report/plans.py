"""Report the plans that iterations follow, and how the iterations went."""

from __future__ import annotations

import dataclasses

from chainer_ooc import state
from chainer_ooc.planning.plan import Choice
from chainer_ooc.planning.plan_cache import PlanEntry

__all__ = ["PlanReport", "plans"]


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """The plan of one graph, and the times of its iterations.

    Attributes:
        device: The device that runs it.
        signature: The identity of the graph (hexadecimal).
        steps: The number of functions, forward and backward.
        storages_kept: The number of saved allocations that stay in memory.
        storages_swapped: The number of those that are copied out and back.
        storages_recomputed: The number of those that are made again.
        bytes_kept: The size of those that stay (bytes).
        bytes_swapped: The size of those that are copied (bytes).
        bytes_recomputed: The size of those that are made again (bytes).
        bytes_out: The bytes copied out in an iteration.
        bytes_in: The bytes copied back in an iteration.
        compute_seconds: The time of all functions without waits (seconds).
        seconds: The simulated time of an iteration (seconds).
        bound_seconds: The lower bound of that time (seconds).
        peak_bytes: The simulated peak (bytes).
        on_demand_seconds: The time of the recorded iteration, which ran on demand (seconds).
        measured_seconds: The time of each iteration that followed the plan (seconds).
        measured_peak_bytes: The highest memory in use in each, between two functions (bytes).
        followed: The plan is followed. It is not if on demand was faster.
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
    """Return a report of each plan, the one followed last first."""
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
