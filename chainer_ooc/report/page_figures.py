"""Compute the report's figures: moved and kept arrays, waits by cause, estimates against measurements."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

from chainer_ooc.report.page_data import Run, Traced

__all__ = ["FunctionRow", "compared", "headline", "stalls", "storages"]

#: The causes of waits: meaning and remedy.
CAUSES = {
    "fetch": (
        "an array was fetched when it was asked for",
        "a higher limit leaves room to fetch ahead",
    ),
    "late": (
        "an array was fetched ahead, but not early enough",
        "a faster swap_dir, or a higher limit",
    ),
    "room": ("memory was full until copies out had ended", "a higher limit, or a faster swap_dir"),
    "trim": ("freed memory was given back to the system", "a higher limit"),
}


@dataclasses.dataclass
class FunctionRow:
    """What happened in one iteration to the arrays that functions of one name saved.

    Attributes:
        name: The function's label.
        calls: The number of forward calls.
        out: Allocations copied out.
        bytes_out: Their size (bytes).
        back: Allocations copied back.
        bytes_in: Their size (bytes).
        remade: Calls that ran again instead.
        stall_seconds: The waits during the calls and before them (seconds).
        fate: ``kept``, ``swapped``, ``recomputed``, or several of them.
        why: The reason, in words.
    """

    name: str
    calls: int = 0
    out: int = 0
    bytes_out: int = 0
    back: int = 0
    bytes_in: int = 0
    remade: int = 0
    stall_seconds: float = 0.0
    fate: str = ""
    why: str = ""


def headline(run: Run) -> list[tuple[str, str, str]]:
    """Return (name, value, remark) of the most important figures."""
    found: list[tuple[str, str, str]] = []
    trace = run.traces[0] if run.traces else None
    last = run.log[-1] if run.log else {}
    limit = trace.limit_bytes if trace else last.get("ooc/limit_bytes")
    peak = trace.peak_bytes if trace else last.get("ooc/peak_bytes")
    if peak:
        share = f"{peak / limit:.1%} of the limit" if limit else ""
        found.append(("peak memory", size(peak), share))
    if limit:
        found.append(("limit", size(limit), ""))
    if trace and trace.iterations:
        start, end = trace.iterations[trace.drawn_iteration()]
        stalled = sum(s.end - s.start for s in trace.between(start, end) if s.category == "stall")
        found.append(("iteration", seconds(end - start), f"number {trace.drawn_iteration() + 1} of "
                      f"{len(trace.iterations)}"))  # fmt: skip
        found.append(("waiting", f"{stalled / max(end - start, 1e-9):.1%}", seconds(stalled)))
        for name, category in (("moved out", "copy out"), ("moved back", "copy in")):
            nbytes = sum(
                s.args.get("bytes", 0) for s in trace.between(start, end) if s.category == category
            )
            found.append((name, size(nbytes), "in this iteration"))
    elif last:
        for name, key in (("moved out", "ooc/bytes_out"), ("moved back", "ooc/bytes_in")):
            if key in last:
                found.append((name, size(last[key]), "per iteration"))
        if "ooc/stall_seconds" in last:
            found.append(("waiting", seconds(last["ooc/stall_seconds"]), "per iteration"))
    overlap = last.get("ooc/overlap_percent")
    if overlap is not None:
        found.append(("hidden copies", f"{overlap:.0f} %", "of their time"))
    return found


def storages(trace: Traced) -> list[FunctionRow]:
    """Return a row for each function of the drawn iteration, the one with most moved bytes first."""
    start, end = trace.iterations[trace.drawn_iteration()]
    rows: dict[str, FunctionRow] = {}

    def row(name: str) -> FunctionRow:
        return rows.setdefault(name, FunctionRow(name))

    for span in trace.between(start, end):
        nbytes = span.args.get("bytes", 0)
        if span.category == "forward":
            row(span.name).calls += 1
        elif span.category == "copy out":
            one = row(span.name)
            one.out, one.bytes_out = one.out + 1, one.bytes_out + nbytes
        elif span.category == "copy in":
            one = row(span.name)
            one.back, one.bytes_in = one.back + 1, one.bytes_in + nbytes
        elif span.category in ("recompute", "rerun"):
            row(span.name).remade += 1
    for one in rows.values():
        one.fate, one.why = _fate(one)
    return sorted(rows.values(), key=lambda r: (-r.bytes_out - r.bytes_in, -r.calls, r.name))


def _fate(row: FunctionRow) -> tuple[str, str]:
    fates, reasons = [], []
    if row.back:
        fates.append("swapped")
        reasons.append("it was saved early and is needed late: memory was needed in between")
    if row.out > row.back:
        fates.append("written")
        reasons.append(
            f"{row.out - row.back} copied out ahead and used before the memory had to be given up"
        )
    if row.remade:
        fates.append("recomputed")
        reasons.append("running it again costs less than moving what it made")
    if not fates:
        fates.append("kept")
        reasons.append("it fits, is small, is held by something else, or saves nothing")
    return " + ".join(fates), "; ".join(reasons)


def stalls(run: Run) -> list[tuple[str, float, str, str]]:
    """Return (cause, seconds per iteration, meaning, remedy), the longest first."""
    found: dict[str, float] = defaultdict(float)
    if run.traces and run.traces[0].iterations:
        trace = run.traces[0]
        for span in trace.spans:
            if span.category == "stall":
                found[span.name] += (span.end - span.start) / len(trace.iterations)
    else:
        for entry in run.log:
            for cause in CAUSES:
                found[cause] += entry.get(f"ooc/stall_{cause}_seconds", 0.0) / len(run.log)
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return [(cause, time, *CAUSES.get(cause, ("", ""))) for cause, time in ordered]


def compared(run: Run) -> list[tuple[str, str, str, str]]:
    """Return (figure, estimate, measurement, measurement over estimate)."""
    foreseen = _foreseen(run)
    measured: dict[str, float] = {}
    if run.traces and run.traces[0].iterations:
        trace = run.traces[0]
        start, end = trace.iterations[trace.drawn_iteration()]
        measured["step_seconds"] = end - start
        spans = trace.between(start, end)
        for key, category in (("bytes_out", "copy out"), ("bytes_in", "copy in")):
            measured[key] = sum(s.args.get("bytes", 0) for s in spans if s.category == category)
        if trace.peak_bytes:
            measured["peak_bytes"] = trace.peak_bytes
    elif run.log:
        for key in ("peak_bytes", "bytes_out", "bytes_in"):
            if f"ooc/{key}" in run.log[-1]:
                measured[key] = run.log[-1][f"ooc/{key}"]
    if run.summary.get("in_core_peak_bytes"):
        measured["peak_in_core_bytes"] = run.summary["in_core_peak_bytes"]
    rows = []
    for key, name in (
        ("peak_bytes", "peak memory"),
        ("peak_in_core_bytes", "peak in core"),
        ("bytes_out", "moved out per iteration"),
        ("bytes_in", "moved back per iteration"),
        ("step_seconds", "iteration"),
    ):
        if key in foreseen and key in measured:
            form = seconds if key == "step_seconds" else size
            ratio = f"{measured[key] / foreseen[key]:.2f}" if foreseen[key] else "-"
            rows.append((name, form(foreseen[key]), form(measured[key]), ratio))
    return rows


def _foreseen(run: Run) -> dict[str, float]:
    if run.estimate:
        return {k: v for k, v in run.estimate.items() if isinstance(v, int | float)}
    plan: Any = run.traces[0].facts.get("plan") if run.traces else None
    if isinstance(plan, dict):
        names = {"seconds": "step_seconds"} | {
            k: k for k in ("peak_bytes", "bytes_out", "bytes_in")
        }
        return {name: plan[k] for k, name in names.items() if isinstance(plan.get(k), int | float)}
    return {}


def size(nbytes: float) -> str:
    """Return a number of bytes as text."""
    for unit, one in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= one:
            return f"{nbytes / one:.1f} {unit}"
    return f"{nbytes:.0f} B"


def seconds(time: float) -> str:
    """Return a time as text."""
    return f"{time:.2f} s" if time >= 1 else f"{time * 1e3:.1f} ms"
