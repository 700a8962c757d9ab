"""The report of a run: report.md in its folder of results."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import chainer_ooc
from chainer_ooc.report.markdown import block, plain
from reports.figures import Synchronize
from reports.history import History
from reports.units import duration, gibibytes, write_atomically


def write_report(
    out: Path,
    summary: Mapping[str, Any],
    history: History,
    figures: Synchronize,
    updater: Any,
    pictures: Iterable[Path],
    configuration: Mapping[str, Any],
    versions: Mapping[str, Any],
) -> Path:
    """Writes report.md: outcome, memory, time, configuration, versions, plots.

    Args:
        out: Folder of the results.
        summary: What ``summarize`` returned.
        history: The course of the run.
        figures: Its figures.
        updater: The run's updater.
        pictures: Plots, in ``out`` or folders of it.
        configuration: The resolved configuration.
        versions: Versions of what the run used; what is None is left out.

    Returns:
        The file.
    """
    sections = [
        f"# Training report: {plain(out.resolve().name)}\n\n{block(command_line(), 'sh')}\n",
        _section("Outcome", _outcome(summary, history, updater)),
        _section("Time", _time(figures)),
        _section("Memory", _memory(summary)),
        _section("Out of core", _out_of_core(summary)),
        _section("Plan, rank 0", _plan(chainer_ooc.plans() if chainer_ooc.is_enabled() else [])),
        _section("Configuration", configuration.items()),
        _section("Versions", versions.items()),
        "".join(f"![{plain(p.stem)}]({quote(str(p.relative_to(out)))})\n" for p in pictures),
    ]
    text = "\n".join(section for section in sections if section)
    path = out / "report.md"
    write_atomically(path, lambda f: f.write(text.encode()))
    return path


def command_line() -> str:
    """Returns the command line of this process, as a shell reads it."""
    return shlex.join([Path(sys.executable).name, *sys.argv])


def _section(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows if value is not None]
    if not lines:
        return ""
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines]) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ", ".join(map(str, value))
    return plain(value)


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _bytes(value: int | None) -> str | None:
    return None if value is None else gibibytes(value)


def _outcome(
    summary: Mapping[str, Any], history: History, updater: Any
) -> list[tuple[str, str | None]]:
    first, last = summary["loss_first"], summary["loss_last"]
    best = max(history.validation, key=lambda row: row[2], default=None)
    return [
        ("ranks", str(summary["ranks"])),
        ("iterations", f"{updater.iteration} ({updater.n_updates} in this process)"),
        ("epochs", f"{updater.epoch_detail:.2f}"),
        ("loss", None if first is None else f"{first:.4f} -> {last:.4f}"),
        ("validation accuracy", _number(summary["val_accuracy"], ".4f")),
        ("best of them", best and f"{best[2]:.4f} at iteration {best[0]}"),
    ]


def _time(figures: Synchronize) -> list[tuple[str, str | None]]:
    seconds = figures.total_seconds
    if not seconds:
        return []
    return [
        ("training", duration(seconds)),
        ("images per second", f"{figures.total_images / seconds:.4g} (all ranks)"),
        ("waiting for data", f"{figures.total_data_seconds / seconds:.1%}"),
    ]


def _memory(summary: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    peak, in_core = summary["peak_bytes"], summary["in_core_peak_bytes"]
    share = f" ({peak / in_core:.0%} of in core)" if in_core else ""
    return [
        ("peak of a rank", f"{gibibytes(peak)}{share}"),
        ("limit of a rank", _bytes(summary["limit_bytes"])),
        ("in-core step, measured", _bytes(in_core)),
    ]


def _out_of_core(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    if summary["limit_bytes"] is None:
        return []
    rows = [
        ("moved out, all ranks", gibibytes(summary["bytes_out"])),
        ("moved in, all ranks", gibibytes(summary["bytes_in"])),
    ]
    stats = chainer_ooc.stats()
    rows.append(("advice, rank 0", stats.advice))
    for field in dataclasses.fields(stats):
        value = getattr(stats, field.name)
        # What is above, for all ranks; and what this version or run does not count.
        if isinstance(value, int | float) and field.name not in ("peak_bytes", "limit_bytes"):
            rows.append((f"{field.name}, rank 0", _quantity(field.name, value)))
    return rows


def _plan(plans: Sequence[chainer_ooc.PlanReport]) -> list[tuple[str, str | None]]:
    """Returns what was planned for the graph that was trained last, and what came of it."""
    if not plans:
        return []
    plan = plans[0]
    rows: list[tuple[str, str | None]] = [
        (name, f"{count} arrays, {gibibytes(nbytes)}")
        for name, count, nbytes in (
            ("kept in memory", plan.storages_kept, plan.bytes_kept),
            ("swapped", plan.storages_swapped, plan.bytes_swapped),
            ("computed again", plan.storages_recomputed, plan.bytes_recomputed),
        )
    ]
    measured = plan.measured_seconds
    rows += [
        ("iteration on demand", f"{plan.on_demand_seconds:.3g} s"),
        (
            "iteration, foreseen",
            f"{plan.seconds:.3g} s; "
            + (
                f"no schedule below {plan.bound_seconds:.3g} s"
                if plan.bound_seconds is not None and plan.bound_seconds <= plan.seconds
                else "what one function needs does not fit below the limit"
            ),
        ),
        (
            "iteration, measured",
            f"{min(measured):.3g} s, the best of {len(measured)}" if measured else None,
        ),
        ("peak, foreseen", gibibytes(plan.peak_bytes)),
    ]
    if measured:
        rows.append(("peak, measured", gibibytes(max(plan.measured_peak_bytes))))
    return [*rows, ("followed", "yes" if plan.followed else "no: on demand was faster")]


def _quantity(name: str, value: float) -> str:
    if name.endswith("seconds"):
        return duration(value)
    if "bytes" in name:
        return gibibytes(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
