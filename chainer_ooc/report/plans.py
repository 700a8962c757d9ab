"""Report the plans that iterations follow, and how the iterations went."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from statistics import median

from chainer_ooc import state
from chainer_ooc.planning.plan import Choice
from chainer_ooc.planning.plan_cache import PlanEntry
from chainer_ooc.planning.schedule import bytes_for_second_backward
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.tables import Shown, Table, format_bytes, format_seconds

__all__ = ["PlanReport", "PlanReports", "plans"]

#: The number of plans, the last followed, that the text shows.
_SHOWN = 4


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
        bound_seconds: The lower bound of that time (seconds); ``None`` where no plan fits, as one function needs more
            than the limit.
        peak_bytes: The simulated peak (bytes).
        on_demand_seconds: The time of the recorded iteration, which ran on demand (seconds).
        measured_seconds: The time of each iteration that followed the plan (seconds).
        measured_peak_bytes: The highest memory in use in each, between two functions (bytes).
        followed: The plan is followed. It is not if on demand was faster.
        floor_bytes: The most bytes that one function needs in memory: the least peak of any plan.
        in_core_bytes: The peak with everything in memory (bytes).
        bytes_out_spared: The part of ``bytes_out`` that need not leave with ``single_backward=True``: arrays that
            backward has used do not take its place then.
        measured_bytes_out_used: The bytes copied out in each although backward had used them: for a second
            backward. ``single_backward=True`` spares them.
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
    bound_seconds: float | None
    peak_bytes: int
    on_demand_seconds: float
    measured_seconds: tuple[float, ...]
    measured_peak_bytes: tuple[int, ...]
    followed: bool
    floor_bytes: int = 0
    in_core_bytes: int = 0
    bytes_out_spared: int = 0
    measured_bytes_out_used: tuple[int, ...] = ()


class PlanReports(Shown, list[PlanReport]):
    """The answer of :func:`plans`: a list. Its text is a table with a column for each plan."""

    def _blocks(self) -> Iterator[str | Table]:
        if not self:
            yield "no plans: none was needed so far, or no iteration has been recorded yet"
            return
        columns = [_column(report) for report in self[:_SHOWN]]
        rows = [tuple([name, *(column[name] for column in columns)]) for name in columns[0]]
        yield Table(rows, "<" + ">" * len(columns))
        if len(self) > _SHOWN:
            yield f"and {len(self) - _SHOWN} more graphs, followed earlier"


def _column(report: PlanReport) -> dict[str, str]:
    def storages(count: int, nbytes: int) -> str:
        return f"{count} arrays, {format_bytes(nbytes)}"

    def measured(values: Sequence[float], shown: Callable[[float], str]) -> str:
        return shown(median(values)) if values else "none yet"

    return {
        "graph": f"{report.signature[:8]} on {report.device}",
        "functions": str(report.steps),
        "kept in memory": storages(report.storages_kept, report.bytes_kept),
        "swapped": storages(report.storages_swapped, report.bytes_swapped),
        "made again": storages(report.storages_recomputed, report.bytes_recomputed),
        "copied out in an iteration": format_bytes(report.bytes_out),
        "  need not with single_backward": format_bytes(report.bytes_out_spared),
        "  besides, of used arrays": measured(report.measured_bytes_out_used, format_bytes),
        "copied back": format_bytes(report.bytes_in),
        "time of an iteration": measured(report.measured_seconds, format_seconds),
        "  foreseen": format_seconds(report.seconds),
        "  no schedule is below": "no plan fits"
        if report.bound_seconds is None
        else format_seconds(report.bound_seconds),
        "  functions alone": format_seconds(report.compute_seconds),
        "  on demand": format_seconds(report.on_demand_seconds),
        "peak between functions": measured(report.measured_peak_bytes, format_bytes),
        "  foreseen, within functions": format_bytes(report.peak_bytes),
        "  least of any plan": format_bytes(report.floor_bytes),
        "  with everything in memory": format_bytes(report.in_core_bytes),
        "followed": "yes" if report.followed else "no: on demand was faster",
    }


def plans() -> PlanReports:
    """Return a report of each plan, the one followed last first; print it."""
    from chainer_ooc.graph.iteration import tracker_of

    return PlanReports(
        _report(manager, entry)
        for manager in state.managers()
        for entry in reversed(tracker_of(manager).plan_cache.entries.values())
    )


def _spared(manager: SwapManager, entry: PlanEntry) -> int:
    if manager.settings().single_backward:
        return 0
    return bytes_for_second_backward(entry.profile, entry.plan, manager.limit)


def _report(manager: SwapManager, entry: PlanEntry) -> PlanReport:
    profile, plan = entry.profile, entry.plan
    size = [storage.nbytes for storage in profile.storages]
    chosen = {choice: [i for i in profile.saved if plan.choices[i] is choice] for choice in Choice}
    count = {choice: len(of) for choice, of in chosen.items()}
    nbytes = {choice: sum(size[i] for i in of) for choice, of in chosen.items()}
    return PlanReport(
        device=manager.device.name,
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
        floor_bytes=profile.floor_bytes,
        in_core_bytes=profile.in_core_bytes,
        compute_seconds=profile.compute_seconds,
        seconds=plan.seconds,
        bound_seconds=plan.bound_seconds if profile.floor_bytes <= manager.limit else None,
        peak_bytes=plan.peak_bytes,
        on_demand_seconds=entry.demand_seconds,
        measured_seconds=tuple(entry.seconds),
        measured_peak_bytes=tuple(entry.peak_bytes),
        bytes_out_spared=_spared(manager, entry),
        measured_bytes_out_used=tuple(entry.bytes_out_used),
        followed=not entry.disabled,
    )
