"""Draw the report's pictures as SVG: memory against the limit, the timeline of an iteration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from chainer_ooc.report.page_data import Span, Traced
from chainer_ooc.report.page_figures import seconds, size

__all__ = ["memory_curve", "tag", "timeline"]

WIDTH = 960
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 14, 12, 30
_COLORS = {
    "forward": "#4c78a8",
    "backward": "#9467bd",
    "copy out": "#e08214",
    "copy in": "#2a9d5c",
    "stall": "#d62f3b",
    "recompute": "#17909f",
}
#: The lanes of the timeline, and what is drawn in each.
_LANES = (
    ("compute", ("forward", "backward", "recompute")),
    ("waiting", ("stall",)),
    ("copies out", ("copy out",)),
    ("copies in", ("copy in",)),
)
#: Bars are joined while they are closer than so many units.
_JOINED = 0.35


def tag(name: str, *children: str, **attributes: Any) -> str:
    """Return an SVG element. Attributes are escaped, children are markup; ``class_`` stands for ``class``."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{given}>{''.join(children)}</{name}>"


def memory_curve(trace: Traced, start: float, end: float) -> str:
    """Return a picture of the memory in use over an interval, with the limit."""
    points = trace.memory_between(start, end)
    limit = trace.limit_bytes
    top = max([limit or 0, *(nbytes for _, nbytes in points)], default=0) * 1.08 or 1
    height = 260
    x = _scale(start, end, _LEFT, WIDTH - _RIGHT)
    y = _scale(0, top, height - _BOTTOM, _TOP)
    parts = [_size_axis(top, y), _time_axis(start, end, x, height - _BOTTOM)]
    path = _steps(_thinned(points, start, end), x, y, end)
    if path:
        area = f"{path}V{y(0):.1f}H{x(max(points[0][0], start)):.1f}Z"
        parts.append(tag("path", d=area, class_="area"))
        parts.append(tag("path", d=path, class_="curve"))
    if limit:
        label = f"limit {size(limit)}"
        at = f"{y(limit):.1f}"
        parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at, class_="limit"))
        parts.append(
            tag("text", label, x=WIDTH - _RIGHT - 4, y=f"{y(limit) - 5:.1f}", class_="limit-label")
        )
    return _svg(
        height, f"Memory in use, {size(max((m for _, m in points), default=0))} at most", parts
    )


def timeline(trace: Traced, start: float, end: float) -> str:
    """Return a picture of computation, waits and copies over an interval."""
    lane_height, gap = 34, 10
    height = _TOP + len(_LANES) * (lane_height + gap) + _BOTTOM
    x = _scale(start, end, _LEFT, WIDTH - _RIGHT)
    parts = [_time_axis(start, end, x, height - _BOTTOM)]
    spans = trace.between(start, end)
    for number, (label, categories) in enumerate(_LANES):
        top = _TOP + number * (lane_height + gap)
        middle = top + lane_height / 2 + 4
        parts.append(tag("text", label, x=_LEFT - 8, y=f"{middle:.1f}", class_="lane"))
        parts.append(
            tag(
                "rect",
                x=_LEFT,
                y=top,
                width=WIDTH - _RIGHT - _LEFT,
                height=lane_height,
                class_="bed",
            )
        )
        for category in categories:
            chosen = [span for span in spans if span.category == category]
            for bar in _joined(chosen, x, start, end):
                parts.append(_bar(bar, category, top, lane_height))
    return _svg(height, "What computed, waited and copied when", parts)


def _bar(bar: tuple[float, float, list[Span]], category: str, top: float, height: float) -> str:
    left, right, spans = bar
    text = "; ".join(_describe(span) for span in spans[:4])
    if len(spans) > 4:
        text += f"; and {len(spans) - 4} more"
    title = tag("title", escape(text))
    return tag(
        "rect", title, x=f"{left:.2f}", y=top, width=f"{max(right - left, 0.3):.2f}", height=height,
        fill=_COLORS[category],
    )  # fmt: skip


def _describe(span: Span) -> str:
    nbytes = span.args.get("bytes")
    moved = f", {size(nbytes)}" if nbytes else ""
    return f"{span.category}: {span.name}{moved}, {seconds(span.end - span.start)}"


def _joined(
    spans: Iterable[Span], x: Any, start: float, end: float
) -> list[tuple[float, float, list[Span]]]:
    bars: list[tuple[float, float, list[Span]]] = []
    for span in spans:
        left, right = x(max(span.start, start)), x(min(span.end, end))
        if bars and left - bars[-1][1] < _JOINED and right - bars[-1][0] < 3:
            bars[-1] = (bars[-1][0], max(right, bars[-1][1]), [*bars[-1][2], span])
        else:
            bars.append((left, right, [span]))
    return bars


def _thinned(
    points: Sequence[tuple[float, int]], start: float, end: float
) -> list[tuple[float, int]]:
    """Return the lowest and the highest point of each of some hundred intervals."""
    buckets = 600
    if len(points) <= 2 * buckets:
        return list(points)
    kept: dict[int, list[tuple[float, int]]] = {}
    for point in points:
        number = int((point[0] - start) / max(end - start, 1e-12) * buckets)
        kept.setdefault(number, []).append(point)
    thinned = []
    for inside in kept.values():
        low = min(inside, key=lambda p: p[1])
        high = max(inside, key=lambda p: p[1])
        thinned += sorted({low, high})
    return thinned


def _steps(points: Sequence[tuple[float, int]], x: Any, y: Any, end: float) -> str:
    path = ""
    for moment, nbytes in points:
        at = min(max(x(moment), _LEFT), WIDTH - _RIGHT)
        path += f"H{at:.1f}V{y(nbytes):.1f}" if path else f"M{at:.1f},{y(nbytes):.1f}"
    return f"{path}H{x(end):.1f}" if path else ""


def _scale(low: float, high: float, first: float, last: float) -> Any:
    span = (high - low) or 1.0
    return lambda value: first + (value - low) / span * (last - first)


def _time_axis(start: float, end: float, x: Any, bottom: float) -> str:
    unit, name = (1.0, "s") if end - start >= 1 else (1e-3, "ms")
    parts = []
    for tick in _ticks(0, (end - start) / unit, 8):
        at = x(start + tick * unit)
        parts.append(tag("line", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=_TOP, y2=bottom, class_="grid"))
        parts.append(tag("text", f"{tick:g} {name}", x=f"{at:.1f}", y=bottom + 18, class_="tick"))
    return "".join(parts)


def _size_axis(top: float, y: Any) -> str:
    unit, name = next(
        (
            (one, label)
            for one, label in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
            if top >= 2 * one
        ),
        (1, "B"),
    )
    parts = []
    for tick in _ticks(0, top / unit, 5):
        at = y(tick * unit)
        parts.append(
            tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=f"{at:.1f}", y2=f"{at:.1f}", class_="grid")
        )
        parts.append(tag("text", f"{tick:g} {name}", x=_LEFT - 8, y=f"{at + 4:.1f}", class_="lane"))
    return "".join(parts)


def _ticks(low: float, high: float, about: int) -> list[float]:
    raw = (high - low) / about
    if raw <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    return [round(low + i * step, 10) for i in range(int((high - low) / step) + 1)]


_STYLE = """
text{font:12px system-ui,sans-serif;fill:var(--soft,#57606a)}
.tick{text-anchor:middle}.lane,.limit-label{text-anchor:end}
.grid{stroke:var(--line,#d8dee4);stroke-width:1}.bed{fill:var(--bed,#f3f5f7)}
.curve{fill:none;stroke:var(--curve,#4c78a8);stroke-width:1.6}.area{fill:var(--curve,#4c78a8);fill-opacity:.16}
.limit{stroke:#d62f3b;stroke-width:1.6;stroke-dasharray:7 4}.limit-label{fill:#d62f3b}
"""


def _svg(height: float, label: str, parts: list[str]) -> str:
    return tag(
        "svg", tag("title", escape(label)), tag("style", _STYLE), *parts,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", role="img",
    )  # fmt: skip


def legend() -> str:
    """Return a picture that explains the colours of the timeline."""
    return "".join(
        tag("span", tag("i", style=f"background:{color}"), f" {name}")
        for name, color in _COLORS.items()
    )
