"""The planner's step time over the lower bound, beside what prior art does with the same iterations.

    python benchmarks/planner.py [--nets resnet50] [--systems pcie3 disk] [--fractions 0.9 0.5] [--json planner.json]

Everything is simulated. The iterations in benchmarks/profiles were recorded by ``planner_record.py``: functions,
storages and sizes are Chainer's own. On ``disk`` their times are those measured on the CPU; for the other systems they
are modelled from a GPU's data sheet (``planner_devices.py``) at 16 times the recorded batch (lstm: the recorded one).

Settings are the defaults: functions may run again, and backward may run twice. Limits lie between the floor, under
which some function does not have what it needs, and the peak with everything in memory:
``floor + fraction x (peak - floor)``. "bound" is what no schedule can go below (``chainer_ooc/planning/bound.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

from baselines import compare
from planner_devices import DEVICES, PRODUCTS, guarded, modelled
from training import print_table, write

from chainer_ooc.planning.plan import Choice
from chainer_ooc.planning.policies import OnDemand, Planned
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.search import make_plan
from chainer_ooc.planning.simulator import simulate
from chainer_ooc.planning.system import System, Tier

PROFILES = Path(__file__).parent / "profiles"
NETS = ("resnet50", "googlenet", "vgg16", "unet3d", "lstm")
FRACTIONS = tuple(n / 10 for n in range(9, 0, -1))
#: The bytes per second of which fingerprints are taken on the CPU: XXH3, about as fast as one core reads memory.
CHECKSUMS = 10e9

POLICIES = ("plan", "on demand", "LRU", "swap-all", "vDNN conv", "window", "recompute")


@dataclasses.dataclass(frozen=True)
class Case:
    """A link and the device whose times go with it (``None``: the CPU's, as measured)."""

    tier: Tier
    device: str | None
    about: str


SYSTEMS = {
    "pcie3": Case(Tier("host", 12e9, 12e9, latency=1e-5), "v100", "V100, PCIe 3, 12 GB/s each way"),
    "pcie4": Case(Tier("host", 25e9, 25e9, latency=1e-5), "a100", "A100, PCIe 4, 25 GB/s each way"),
    "pcie5": Case(Tier("host", 55e9, 55e9, latency=1e-5), "h200", "H200, PCIe 5, 55 GB/s each way"),
    "c2c": Case(
        Tier("host", 400e9, 400e9, latency=1e-5), "h200", "H200, NVLink-C2C, 400 GB/s each way"
    ),
    "nvme": Case(
        Tier("disk", 5e9, 6e9, both_bandwidth=6e9, latency=1e-4),
        "a100",
        "A100, NVMe, 5 GB/s out, 6 in and in all",
    ),
    "disk": Case(
        Tier("disk", 1e9, 1e9, latency=1e-4, one_queue=True), None, "NumPy, disk, 1 GB/s in all"
    ),
}


def profile_of(net: str, system: str, products: bool = True) -> Profile:
    """Return the recorded iteration of a network with the times of a system's device.

    Args:
        net: The network.
        system: The system.
        products: Convolutions and other products may run again on a GPU.
    """
    profile = Profile.from_json((PROFILES / f"{net}.json").read_text())
    device = SYSTEMS[system].device
    if device is not None and not products:
        labels = (profile.steps[maker].label for maker in profile.makers.values())
        made = zip(profile.makers, labels, strict=True)
        profile = profile.without_reruns([i for i, label in made if label.startswith(PRODUCTS)])
    if device is None:
        return guarded(profile, CHECKSUMS)
    return modelled(profile, DEVICES[device], 1 if net == "lstm" else 16)


def system_of(profile: Profile, system: str, fraction: float) -> System:
    """Return a system whose limit lies at ``fraction`` between the floor and the peak in memory."""
    floor, peak = profile.floor_bytes, profile.resident_peak(single_backward=True)
    limit = math.ceil(floor + fraction * (peak - floor))
    return System(limit, (SYSTEMS[system].tier,), single_backward=False, margin=0.0)


def run(
    net: str, system: str, fraction: float, products: bool = True, single_backward: bool = False
) -> dict[str, Any]:
    """Plan and compare one case."""
    profile = profile_of(net, system, products)
    its = system_of(profile, system, fraction)
    its = dataclasses.replace(its, single_backward=single_backward)
    start = time.process_time()
    plan = make_plan(profile, its)
    planning = time.process_time() - start
    timeline = simulate(profile, its, Planned(plan))
    assert timeline.seconds == plan.seconds
    # Prior art drops what backward has used.
    once = dataclasses.replace(its, single_backward=True)
    others = {**compare(profile, once), "on demand": simulate(profile, its, OnDemand())}
    times = {name: t.seconds for name, t in others.items() if not t.over_bytes}
    if not timeline.over_bytes:
        times["plan"] = timeline.seconds
    return {
        "net": net,
        "system": system,
        "fraction": fraction,
        "limit_bytes": its.limit_bytes,
        "in_core_seconds": profile.compute_seconds,
        "bound_seconds": plan.bound_seconds,
        "seconds": times,
        "over_bytes": timeline.over_bytes,
        "planning_seconds": planning,
        "storages": len(profile.saved),
        "swapped": len(plan.chosen(Choice.SWAP)),
        "recomputed": len(plan.chosen(Choice.RECOMPUTE)),
        "bytes_out": timeline.bytes_out,
        "bytes_in": timeline.bytes_in,
        "wait_in_seconds": timeline.wait_in_seconds,
        "wait_out_seconds": timeline.wait_out_seconds,
        "rerun_seconds": timeline.rerun_seconds,
    }


def print_planner(results: list[dict[str, Any]], fractions: list[float]) -> None:
    """Print the planner's time over the bound."""
    rows = []
    for system in dict.fromkeys(r["system"] for r in results):
        for net in dict.fromkeys(r["net"] for r in results):
            cells = []
            for fraction in fractions:
                (found,) = (
                    r
                    for r in results
                    if (r["net"], r["system"], r["fraction"]) == (net, system, fraction)
                )
                seconds = found["seconds"].get("plan")
                cells.append("-" if seconds is None else f"{seconds / found['bound_seconds']:.3f}")
            rows.append([system, net, *cells])
    print("\nstep time by plan / lower bound, by limit")
    print_table(["system", "net", *(f"{fraction:.1f}" for fraction in fractions)], rows)


def print_policies(results: list[dict[str, Any]], fractions: list[float]) -> None:
    """Print each policy's time over the time with everything in memory."""
    rows = []
    for system in dict.fromkeys(r["system"] for r in results):
        for fraction in fractions:
            here = [r for r in results if (r["system"], r["fraction"]) == (system, fraction)]
            cells = []
            for policy in POLICIES:
                ratios = [
                    r["seconds"][policy] / r["in_core_seconds"]
                    for r in here
                    if policy in r["seconds"]
                ]
                missing = len(here) - len(ratios)
                note = f" ({missing} do not fit)" if missing else ""
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
                cells.append("-" if mean is None else f"{mean:.2f}{note}")
            bounds = [r["bound_seconds"] / r["in_core_seconds"] for r in here]
            bound = math.exp(sum(map(math.log, bounds)) / len(bounds))
            rows.append([system, f"{fraction:.1f}", f"{bound:.2f}", *cells])
    print("\nstep time / time with everything in memory: geometric mean over the networks that fit")
    print_table(["system", "limit", "bound", *POLICIES], rows)


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--fractions", nargs="+", type=float, default=list(FRACTIONS))
    parser.add_argument(
        "--no-products",
        action="store_true",
        help="on GPUs no convolution or other product runs again, as without cudnn_deterministic",
    )
    parser.add_argument(
        "--single-backward", action="store_true", help="what backward has used is dropped"
    )
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    for name in options.systems:
        print(f"{name}: {SYSTEMS[name].about}")
    results = []
    for system in options.systems:
        for net in options.nets:
            given = not options.no_products, options.single_backward
            results += [run(net, system, fraction, *given) for fraction in options.fractions]
    print_planner(results, options.fractions)
    print_policies(
        results, [f for f in options.fractions if f in (0.9, 0.5, 0.1)] or options.fractions
    )
    ratios = [r["seconds"].get("plan", math.inf) / r["bound_seconds"] for r in results]
    good = sum(ratio <= 1.05 for ratio in ratios)
    slowest = max(r["planning_seconds"] for r in results)
    print(
        f"\nwithin 1.05 of the bound: {good} of {len(ratios)}; planning took at most {slowest:.2f} s of CPU time"
    )
    for r, ratio in zip(results, ratios, strict=True):
        if ratio > 1.05:
            waits = {name: r[f"{name}_seconds"] for name in ("wait_in", "wait_out", "rerun")}
            shares = ", ".join(f"{n} {s / r['in_core_seconds']:.1%}" for n, s in waits.items())
            print(
                f"  {r['net']} on {r['system']} at {r['fraction']}: {ratio:.3f} ({shares} of the compute time)"
            )
    write(options.json, results)


if __name__ == "__main__":
    main()
