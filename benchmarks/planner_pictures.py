"""Draw the pictures of docs/planner.md.

    python benchmarks/planner_pictures.py [--results benchmarks/results/planner.json] [--out docs/images]

``planner-timeline.png`` simulates one iteration anew; the others show the table that ``planner.py`` wrote.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import planner

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from chainer_ooc.planning.policies import OnDemand, Planned
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.search import make_plan
from chainer_ooc.planning.simulator import simulate
from chainer_ooc.planning.system import System
from chainer_ooc.planning.timeline import Timeline

ROWS = {"forward": 2, "backward": 2, "other": 2, "rerun": 2, "out": 1, "in": 0}
#: Colours that colour-blind readers tell apart (Okabe and Ito).
COLOURS = {
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "other": "#999999",
    "rerun": "#E69F00",
    "out": "#009E73",
    "in": "#CC79A7",
    "stall": "#D55E00",
}
GIB = 1 << 30


def draw(
    axes: tuple[Any, Any], timeline: Timeline, profile: Profile, system: System, title: str
) -> None:
    """Draw one iteration: compute and copies above, memory below."""
    above, below = axes
    for interval in timeline.intervals:
        kind, row = interval.kind, ROWS.get(interval.kind, 2)
        colour = COLOURS["stall" if kind.startswith("wait") else kind]
        width = 1000 * (interval.end - interval.start)
        above.barh(row, width, left=1000 * interval.start, height=0.8, color=colour, lw=0)
    ratio = timeline.seconds / profile.compute_seconds
    above.set_title(
        f"{title}: {1000 * timeline.seconds:.0f} ms, {ratio:.2f} x compute", fontsize=9, loc="left"
    )
    above.set_yticks([2, 1, 0], ["compute", "out", "in"], fontsize=8)
    above.tick_params(axis="x", labelbottom=False)
    times, used = zip(*timeline.memory, strict=True)
    below.fill_between([1000 * t for t in times], [n / GIB for n in used], color="#BBBBBB", lw=0)
    below.axhline(system.limit_bytes / GIB, color=COLOURS["stall"], lw=1)
    below.set_ylabel("GiB", fontsize=8)
    below.set_ylim(0, 1.1 * system.limit_bytes / GIB)
    below.tick_params(labelsize=8)


def draw_timelines(path: Path, net: str = "resnet50", name: str = "pcie3") -> None:
    """Draw one network half way down, on demand and by plan."""
    profile = planner.profile_of(net, name)
    system = planner.system_of(profile, name, 0.5)
    policies = {"on demand": OnDemand(), "by plan": Planned(make_plan(profile, system))}
    figure, axes = plt.subplots(
        4, 1, figsize=(8, 5.4), sharex=True, gridspec_kw={"height_ratios": [3, 2, 3, 2]}
    )
    for place, (title, policy) in enumerate(policies.items()):
        timeline = simulate(profile, system, policy, detailed=True)
        draw((axes[2 * place], axes[2 * place + 1]), timeline, profile, system, title)
    axes[-1].set_xlabel(f"ms ({net}, {planner.SYSTEMS[name].about}, modelled)", fontsize=8)
    names = {"rerun": "run again", "stall": "compute waits", "out": "copy out", "in": "copy in"}
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=colour, label=names.get(kind, kind))
        for kind, colour in COLOURS.items()
        if kind != "other"
    ]
    figure.legend(handles=handles, ncols=6, fontsize=7, loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, dpi=110)


#: The highest ratio that is drawn.
MOST = 1.3


def draw_ratios(path: Path, results: list[dict[str, Any]]) -> None:
    """Draw the planner's step time over the bound against the limit."""
    names = list(dict.fromkeys(r["system"] for r in results))
    figure, axes = plt.subplots(1, len(names), figsize=(9, 2.6), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for net in dict.fromkeys(r["net"] for r in results):
            here = [r for r in results if (r["system"], r["net"]) == (name, net)]
            ratios = [r["seconds"].get("plan", math.nan) / r["bound_seconds"] for r in here]
            (line,) = axis.plot([r["fraction"] for r in here], ratios, marker=".", lw=1, label=net)
            for r, ratio in zip(here, ratios, strict=True):
                if ratio > MOST:  # above the picture: in numbers
                    text = f"{ratio:.1f}"
                    axis.text(
                        r["fraction"],
                        MOST,
                        text,
                        color=line.get_color(),
                        ha="right",
                        va="top",
                        size=6,
                    )
        axis.set_ylim(0.99, MOST)
        axis.axhline(1.05, color="#999999", lw=1, ls=":")
        axis.set_title(planner.SYSTEMS[name].about.replace(", ", "\n"), fontsize=7)
        axis.invert_xaxis()
        axis.tick_params(labelsize=7)
    axes[0][0].set_ylabel("step time / lower bound", fontsize=8)
    axes[0][0].legend(fontsize=6, frameon=False)
    figure.supxlabel("limit: 1 is everything in memory, 0 the floor", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_policies(path: Path, results: list[dict[str, Any]], fraction: float = 0.5) -> None:
    """Draw what each policy makes of the networks at one limit."""
    names = list(dict.fromkeys(r["system"] for r in results))
    nets = list(dict.fromkeys(r["net"] for r in results))
    figure, axes = plt.subplots(1, len(names), figsize=(9, 3), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for place, policy in enumerate(planner.POLICIES):
            for net, marker in zip(nets, "osD^v", strict=False):
                (r,) = (
                    r
                    for r in results
                    if (r["system"], r["net"], r["fraction"]) == (name, net, fraction)
                )
                if policy in r["seconds"]:
                    axis.plot(
                        place,
                        r["seconds"][policy] / r["in_core_seconds"],
                        marker=marker,
                        ms=5,
                        ls="",
                        color=COLOURS["stall" if policy == "plan" else "backward"],
                        mfc="none",
                        label=net if place == 1 else None,
                    )
        axis.set_yscale("log")
        axis.set_xticks(range(len(planner.POLICIES)), planner.POLICIES, rotation=90, fontsize=7)
        axis.set_title(planner.SYSTEMS[name].about.replace(", ", "\n"), fontsize=7)
        axis.tick_params(axis="y", labelsize=7, which="both")
        axis.grid(axis="y", lw=0.3)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.set_yticks([1, 2, 5, 10, 20])
    axes[0][0].set_ylabel(f"step time / compute, at {fraction}", fontsize=8)
    axes[0][0].legend(fontsize=6, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse arguments, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", default="benchmarks/results/planner.json", metavar="FILE")
    parser.add_argument("--out", default="docs/images", metavar="DIRECTORY")
    options = parser.parse_args()
    results = json.loads(Path(options.results).read_text())["results"]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    draw_timelines(out / "planner-timeline.png")
    draw_ratios(out / "planner-bound.png", results)
    draw_policies(out / "planner-policies.png", results)


if __name__ == "__main__":
    main()
