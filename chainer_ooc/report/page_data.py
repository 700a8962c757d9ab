"""Read the results in a run's folder, for the report."""

from __future__ import annotations

import bisect
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from chainer_ooc.errors import OutOfCoreError
from chainer_ooc.report.trace import HEAD

__all__ = ["Run", "RunError", "Span", "Traced", "read_run"]

#: The names of a run's files.
TRACE, LOG, CONFIG, SUMMARY, ESTIMATE = (
    "ooc*.json",
    "log",
    "config*",
    "summary.json",
    "estimate.json",
)


class RunError(OutOfCoreError, ValueError):
    """A folder has nothing to report. The message says what would be needed."""


class Span(NamedTuple):
    """An event with a duration: its category and name, begin and end (seconds), and details."""

    category: str
    name: str
    start: float
    end: float
    args: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Traced:
    """A trace, read from its file.

    Attributes:
        name: The name of the file.
        spans: Functions (``forward``, ``backward``), copies (``copy out``, ``copy in``) and waits
            (``stall``), in the order of their starts. Functions that ran inside another one are left out.
        memory: (seconds, bytes): the memory in use at some moments.
        facts: The process's ``settings``, ``stats`` and ``advice``.
        iterations: (start, end) of each iteration (seconds).
    """

    name: str
    spans: list[Span]
    memory: list[tuple[float, int]]
    facts: dict[str, Any]
    iterations: list[tuple[float, float]]

    @property
    def limit_bytes(self) -> int | None:
        """The limit that was in force (bytes)."""
        limit = self.facts.get("stats", {}).get("limit_bytes")
        return limit if isinstance(limit, int) else None

    @property
    def peak_bytes(self) -> int | None:
        """The highest memory measured (bytes)."""
        peak = self.facts.get("stats", {}).get("peak_bytes")
        return peak if isinstance(peak, int) else max((m for _, m in self.memory), default=None)

    def drawn_iteration(self) -> int:
        """Return the iteration to draw: the one of median length, without the first and the last."""
        count = len(self.iterations)
        if count < 3:
            return count - 1
        # The last iteration ends with the trace, not where a next one begins.
        numbers = sorted(
            range(1, count - 1), key=lambda n: self.iterations[n][1] - self.iterations[n][0]
        )
        return numbers[len(numbers) // 2]

    def between(self, start: float, end: float) -> list[Span]:
        """Return the spans that overlap an interval."""
        return [span for span in self.spans if span.start < end and span.end > start]

    def memory_between(self, start: float, end: float) -> list[tuple[float, int]]:
        """Return the memory curve in an interval."""
        times = [moment for moment, _ in self.memory]
        first = max(bisect.bisect_right(times, start) - 1, 0)
        return self.memory[first : bisect.bisect_left(times, end) + 1]


@dataclasses.dataclass(frozen=True)
class Run:
    """The results of a run.

    Attributes:
        folder: The folder.
        traces: Its traces, one per rank.
        log: The entries of Chainer's LogReport.
        config: (file name, text) of the run's configuration, or ``None``.
        summary: The trainer's summary.
        estimate: The output of ``python -m chainer_ooc estimate --json``.
    """

    folder: Path
    traces: list[Traced]
    log: list[dict[str, Any]]
    config: tuple[str, str] | None
    summary: dict[str, Any]
    estimate: dict[str, Any]


def read_run(folder: str | Path) -> Run:
    """Read the results of a run.

    Raises:
        RunError: If the folder is missing, has nothing to report, or a file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(
            f"{str(folder)!r} is no folder; give the folder that a run wrote its results to"
        )
    traces = [_read_trace(path) for path in sorted(folder.glob(TRACE))]
    log = _read_json(folder / LOG, list)
    if not traces and not log:
        raise RunError(
            f"{str(folder)!r} has neither a trace ({TRACE}) nor a log; run with "
            f'chainer_ooc.enable(trace="{folder / "ooc.json"}") or CHAINER_OOC_TRACE={folder / "ooc.json"}, and with '
            "LogReport and chainer_ooc's OutOfCoreReport as extensions"
        )
    configs = [path for path in sorted(folder.glob(CONFIG)) if path.is_file()]
    config = (configs[0].name, configs[0].read_text(errors="replace")) if configs else None
    summary, estimate = (_read_json(folder / name, dict) for name in (SUMMARY, ESTIMATE))
    return Run(folder, traces, log, config, summary, estimate)


def _read_json(path: Path, kind: type) -> Any:
    if not path.is_file():
        return kind()
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is no JSON: {error}; remove it, or run again") from error
    if not isinstance(data, kind):
        raise RunError(
            f"{path} holds a JSON {type(data).__name__}, not a {kind.__name__}; remove it"
        )
    return data


def _read_trace(path: Path) -> Traced:
    try:
        document = _read_json(path, dict)
    except RunError:
        document = _salvaged(path)
        if document is None:
            raise
    events = document.get("traceEvents")
    if not isinstance(events, list):
        raise RunError(f"{path} is no trace: it has no list traceEvents; remove it, or run again")
    try:
        spans = [
            Span(
                e.get("cat", ""),
                str(e["name"]),
                e["ts"] / 1e6,
                (e["ts"] + e.get("dur", 0)) / 1e6,
                e.get("args", {}),
            )
            for e in events
            if e["ph"] == "X"
        ]
        memory = sorted(
            (e["ts"] / 1e6, next(iter(e["args"].values()))) for e in events if e["ph"] == "C"
        )
    except (AttributeError, KeyError, TypeError, StopIteration) as error:
        raise RunError(f"{path} has an event that is not complete: {error!r}; run again") from error
    spans.sort(key=lambda span: (span.start, -span.end))
    spans = _outermost(spans)
    facts = document.get("otherData", {})
    if not isinstance(facts, dict) or not isinstance(facts.get("settings", {}), dict):
        raise RunError(f"{path} has otherData, or settings in it, that are no mapping; run again")
    return Traced(path.name, spans, memory, facts, _iterations(spans))


def _salvaged(path: Path) -> dict[str, Any] | None:
    """Return what is whole of a trace whose end is missing; ``None`` if it was not a trace."""
    text = path.read_text(errors="replace")
    if not text.startswith(HEAD):
        return None
    events = []
    for line in text[len(HEAD) :].splitlines():
        try:
            events.append(json.loads(line.removesuffix(",")))
        except ValueError:
            break
    return {"traceEvents": events, "otherData": {"broken": True}}


def _outermost(spans: list[Span]) -> list[Span]:
    """Return the spans of functions that did not run inside another one, such as a gradient's own functions."""
    kept, end = [], float("-inf")
    for span in spans:
        if span.category in ("forward", "backward"):
            if span.start < end:
                continue
            end = span.end
        kept.append(span)
    return kept


def _iterations(spans: list[Span]) -> list[tuple[float, float]]:
    """Return the iterations: each begins with the first function forward after one backward."""
    starts: list[float] = []
    before = "backward"
    last = 0.0
    for span in spans:
        if span.category in ("forward", "backward"):
            if span.category == "forward" and before == "backward":
                starts.append(span.start)
            before = span.category
        last = max(last, span.end)
    return list(zip(starts, [*starts[1:], last], strict=True))
