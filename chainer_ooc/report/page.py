"""Write the report of a run: one self-contained HTML page, and the same as Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from chainer_ooc.report import page_figures as figures
from chainer_ooc.report import page_svg as svg
from chainer_ooc.report.markdown import block, plain
from chainer_ooc.report.page_data import Run, Traced, read_run
from chainer_ooc.report.page_figures import seconds, size
from chainer_ooc.report.page_svg import tag
from chainer_ooc.report.whole import write_whole

__all__ = ["write_report"]

_NO_TRACE = (
    "There is no trace: the timeline, the memory curve and the table of storages need one. Run with "
    'chainer_ooc.enable(trace="ooc.json"), or CHAINER_OOC_TRACE=ooc.json, and put the file into the run\'s folder.'
)
_NO_ESTIMATE = (
    "Nothing was foreseen: write what python -m chainer_ooc estimate NET --limit … --json prints to "
    "estimate.json in the run's folder, and it is compared here."
)


@dataclasses.dataclass(frozen=True)
class _Table:
    """A table of text cells. Columns whose ``right`` is 1 are numbers."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    right: str


@dataclasses.dataclass(frozen=True)
class _Section:
    """A part of the page: text, the file name of a picture, a table."""

    title: str
    text: str = ""
    pictures: tuple[tuple[str, str], ...] = ()
    table: _Table | None = None
    legend: str = ""
    preformatted: str = ""


def write_report(folder: str | Path, out: str | Path | None = None) -> list[Path]:
    """Write the report of a run.

    Args:
        folder: The results of the run: ``log`` of LogReport, ``ooc.json`` of ``enable(trace=…)``, and, if
            they exist, a configuration, ``summary.json`` and ``estimate.json``.
        out: The folder to write to. Default: the same folder.

    Returns:
        The files: ``report.html``, ``report.md`` and the pictures of the latter.

    Raises:
        RunError: If there is nothing to report.
    """
    run = read_run(folder)
    out = Path(folder if out is None else out)
    out.mkdir(parents=True, exist_ok=True)
    sections = _sections(run)
    written = []
    for name, text in (
        ("report.html", _html(run, sections)),
        ("report.md", _markdown(run, sections)),
        *((name, picture) for section in sections for name, picture in section.pictures),
    ):
        path = out / name
        write_whole(path, text)
        written.append(path)
    return written


def _sections(run: Run) -> list[_Section]:
    sections = []
    trace = run.traces[0] if run.traces else None
    if trace is not None and trace.iterations:
        sections += _traced(trace)
    else:
        sections.append(_Section("Timeline", _NO_TRACE))
    if trace is not None and isinstance(advice := trace.facts.get("advice"), str):
        sections.append(_Section("What bound it, and what to change", advice))
    rows = [(c, seconds(time), what, helps) for c, time, what, helps in figures.stalls(run)]
    table = _Table(("cause", "per iteration", "what it means", "what helps"), rows, "0100")
    text = "" if rows else "Nothing waited."
    sections.append(_Section("Waiting, by cause", text, table=table if rows else None))
    comparison = figures.compared(run)
    if comparison:
        table = _Table(("", "foreseen", "measured", "measured / foreseen"), comparison, "0111")
        sections.append(_Section("Foreseen and measured", table=table))
    else:
        sections.append(_Section("Foreseen and measured", _NO_ESTIMATE))
    if len(run.traces) > 1:
        sections.append(_Section("Ranks", table=_ranks(run.traces)))
    if run.log:
        sections.append(_Section("Log", table=_log(run.log)))
    if run.config:
        sections.append(_Section(f"Configuration ({run.config[0]})", preformatted=run.config[1]))
    return sections


def _traced(trace: Traced) -> list[_Section]:
    first, last = trace.iterations[0][0], trace.iterations[-1][1]
    number = trace.drawn_iteration()
    start, end = trace.iterations[number]
    left_out = trace.facts.get("events_left_out")
    note = f" The last {left_out} events were not kept." if left_out else ""
    if trace.facts.get("broken"):
        note += " The end of the trace is missing, and with it the limit and other figures."
    elif trace.facts.get("ended") is False:
        note += " The trace has no end: the process was killed, or still runs."
    rows = figures.storages(trace)
    table = _Table(
        ("function", "calls", "fate", "out", "MiB out", "back", "MiB back", "why"),
        [
            (r.name, str(r.calls), r.fate, str(r.out), _mib(r.bytes_out), str(r.back), _mib(r.bytes_in), r.why)
            for r in rows
        ],
        "01011110",
    )  # fmt: skip
    return [
        _Section(
            "Memory",
            f"Memory in use over the whole run of {len(trace.iterations)} iterations, measured when functions began "
            f"and allocated, and the limit.{note}",
            (("report-memory.svg", svg.memory_curve(trace, first, last)),),
        ),
        _Section(
            "One iteration",
            f"Number {number + 1}, of the median length, {seconds(end - start)}. Copies beside computing cost nothing; "
            "where computation pauses, the second lane tells that it waited.",
            (
                ("report-timeline.svg", svg.timeline(trace, start, end)),
                ("report-iteration.svg", svg.memory_curve(trace, start, end)),
            ),
            legend=svg.legend(),
        ),
        _Section(
            "What became of what was saved",
            "By the function that saved it, in the same iteration. Allocations, not arrays: views of one "
            "allocation move once.",
            table=table,
        ),
    ]


def _ranks(traces: Sequence[Traced]) -> _Table:
    rows = []
    for trace in traces:
        stats = trace.facts.get("stats", {})
        waited = sum(span.end - span.start for span in trace.spans if span.category == "stall")
        rows.append(
            (
                trace.name,
                size(stats.get("peak_bytes") or 0),
                size(stats.get("bytes_out") or 0),
                size(stats.get("bytes_in") or 0),
                seconds(waited),
            )
        )
    return _Table(("trace", "peak", "moved out", "moved back", "waited"), rows, "01111")


def _log(log: Sequence[dict[str, Any]], most: int = 12) -> _Table:
    """Return the log's entries: all, or some at even distances if there are many."""
    count = len(log)
    chosen = (
        sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
        if count > most
        else range(count)
    )
    keys = dict.fromkeys(key for entry in log for key in entry)
    # Leave out figures shown above, and details.
    shown = [k for k in keys if not k.startswith("ooc/") or k in _LOGGED]
    order = ("iteration", "epoch", "elapsed_time")
    shown.sort(key=lambda k: order.index(k) if k in order else len(order))
    rows = [tuple(_cell(key, log[i].get(key)) for key in shown) for i in chosen]
    return _Table(tuple(key.removeprefix("ooc/") for key in shown), rows, "1" * len(shown))


_LOGGED = ("ooc/bytes_out", "ooc/bytes_in", "ooc/peak_bytes", "ooc/stall_seconds")


def _cell(key: str, value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if "bytes" in key:
            return size(value)
        if key.endswith("_seconds"):
            return seconds(value)
        return f"{value:.5g}"
    return "" if value is None else str(value)


def _mib(nbytes: float) -> str:
    return f"{nbytes / (1 << 20):,.1f}" if nbytes else "-"


_STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#57606a;--line:#d8dee4;--bed:#f3f5f7;--paper:#fff;--curve:#4c78a8}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4af;--line:#333b45;--bed:#1b222b;--paper:#0f141a;
--curve:#7fa8d8}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1040px;padding:24px 20px 64px;color:var(--ink);background:var(--paper);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:36px 0 6px}p{margin:4px 0 12px;color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:10px;margin:18px 0}
.tile{background:var(--bed);border-radius:8px;padding:10px 12px}
.tile b{display:block;font-size:18px;font-weight:600;white-space:nowrap}
.tile span{display:block;color:var(--soft);font-size:13px}
.scroll{overflow-x:auto}.scroll svg{min-width:640px;width:100%;height:auto;display:block}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:5px 10px;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600;white-space:nowrap}
td:last-child:not(.n){min-width:260px}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin:0 0 8px;font-size:13px;color:var(--soft)}
.legend i{display:inline-block;width:11px;height:11px;border-radius:2px}
pre{background:var(--bed);border-radius:8px;padding:12px;overflow-x:auto;font-size:13px}
"""


def _html(run: Run, sections: Sequence[_Section]) -> str:
    title = f"Out of core: {run.folder.resolve().name}"
    tiles = [
        tag(
            "div",
            tag("span", escape(name)),
            tag("b", escape(value)),
            tag("span", escape(remark)),
            class_="tile",
        )
        for name, value, remark in figures.headline(run)
    ]
    body = [
        tag("h1", escape(title)),
        tag("p", escape(_subtitle(run))),
        tag("div", *tiles, class_="tiles"),
    ]
    for section in sections:
        body.append(tag("h2", escape(section.title)))
        if section.text:
            body.append(tag("p", escape(section.text)))
        if section.legend:
            body.append(tag("div", section.legend, class_="legend"))
        body += [tag("div", picture, class_="scroll") for _, picture in section.pictures]
        if section.table:
            body.append(tag("div", _html_table(section.table), class_="scroll"))
        if section.preformatted:
            body.append(tag("pre", escape(section.preformatted)))
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        tag("title", escape(title)),
        tag("style", _STYLE),
    ]
    return (
        "<!doctype html>\n" + tag("html", tag("head", *head), tag("body", *body), lang="en") + "\n"
    )


def _html_table(table: _Table) -> str:
    def row(cells: Sequence[str], name: str) -> str:
        marks = [{"class_": "n"} if right == "1" else {} for right in table.right]
        return tag("tr", *(tag(name, escape(c), **m) for c, m in zip(cells, marks, strict=True)))

    rows = [row(cells, "td") for cells in table.rows]
    return tag("table", tag("thead", row(table.header, "th")), tag("tbody", *rows))


def _markdown(run: Run, sections: Sequence[_Section]) -> str:
    lines = [f"# Out of core: {plain(run.folder.resolve().name)}", "", plain(_subtitle(run)), ""]
    for headline in figures.headline(run):
        name, value, remark = map(plain, headline)
        lines.append(f"- {name}: **{value}** {remark}".rstrip())
    for section in sections:
        lines += ["", f"## {plain(section.title)}", ""]
        if section.text:
            lines += [plain(section.text), ""]
        for name, _ in section.pictures:
            lines += [f"![{plain(section.title)}]({name})", ""]
        if section.table:
            lines += _markdown_table(section.table)
        if section.preformatted:
            lines.append(block(section.preformatted))
    return "\n".join(lines).rstrip() + "\n"


def _setting(name: str, value: Any) -> str:
    is_size = "limit" in name or "bytes" in name
    return size(value) if is_size and type(value) is int else str(value)


def _markdown_table(table: _Table) -> list[str]:
    rule = ["--:" if right == "1" else "---" for right in table.right]
    rows = [table.header, rule, *table.rows]
    return ["| " + " | ".join(map(plain, row)) + " |" for row in rows]


def _subtitle(run: Run) -> str:
    parts = []
    if run.traces:
        trace = run.traces[0]
        settings = trace.facts.get("settings", {})
        asked = {k: v for k, v in settings.items() if v not in (None, False) and k != "trace"}
        parts.append(f"{len(run.traces)} trace{'s' if len(run.traces) > 1 else ''}")
        parts.append(", ".join(f"{key}={_setting(key, value)}" for key, value in asked.items()))
    if run.log:
        last = run.log[-1]
        if "elapsed_time" in last:
            parts.append(
                f"{last.get('iteration', '?')} iterations in {seconds(last['elapsed_time'])}"
            )
    return "; ".join(filter(None, parts))
