"""What guarding re-runs costs on a GPU: the bytes that fingerprints read, over the bytes that functions move.

    python benchmarks/guarding.py [--nets resnet50] [--system pcie4] [--fractions 0.9 0.5] [--json guarding.json]

The iterations in benchmarks/profiles are planned as ``planner.py`` does, for the default settings: backward may run
twice, and products do not run again on a GPU, except in the rows "products", for
``chainer.config.cudnn_deterministic``. Nothing is measured: bytes are counted.

"private": only Chainer's functions have had the arrays. Then only products get fingerprints: their result before it is
discarded and when it has been made again; their parameters when they run, before they are copied, and of the copy.
"exposed": other code has had every array. Then what the functions that run again read and make gets one when they run;
what is discarded and what its re-run reads before that; the result when it has been made again.

It fails if the default settings' share is more than 2 % with private arrays.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from planner import FRACTIONS, NETS, PROFILES, SYSTEMS, profile_of, system_of
from planner_devices import CHECKED, parameter_bytes, traffic
from training import print_table, write

from chainer_ooc.planning.plan import Choice, Plan
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.search import make_plan

#: The most that guarding may take (share of the step's traffic).
MOST = 0.02


def without_products(profile: Profile) -> Profile:
    """Return a profile in which no product runs again."""
    steps = tuple(
        dataclasses.replace(step, rerun=None) if step.label.startswith(CHECKED) else step
        for step in profile.steps
    )
    return dataclasses.replace(profile, steps=steps)


def guarded_bytes(
    profile: Profile, plan: Plan, parameters: list[int], moved: list[int], exposed: bool
) -> int:
    """Return the bytes that the fingerprints of a planned iteration read.

    Args:
        profile: The iteration.
        plan: Its plan.
        parameters: The bytes of parameters that each step reads.
        moved: The bytes that each step reads and writes.
        exposed: Other code has had every array.
    """
    size = [storage.nbytes for storage in profile.storages]
    chosen = {*plan.chosen(Choice.RECOMPUTE)}
    moves = [*plan.discard, *plan.evict_after_recompute]
    total, ran = 0, set[int]()
    for i in (i for _, i in moves if i in chosen):
        rerun = profile.steps[profile.makers[i]].rerun
        assert rerun is not None
        steps = rerun.steps or (profile.makers[i],)
        products = [n for n in steps if profile.steps[n].label.startswith(CHECKED)]
        if exposed:
            total += 2 * size[i] + sum(size[read] for read in rerun.reads)
            ran.update(steps)
        elif products:
            total += 2 * size[i]
            ran.update(products)
        total += 2 * sum(parameters[n] for n in products)
    return total + sum(moved[n] if exposed else parameters[n] for n in ran)


def run(net: str, system: str, fraction: float, products: bool) -> dict[str, Any]:
    """Plan one iteration and count."""
    scale = 1 if net == "lstm" else 16
    recorded = Profile.from_json((PROFILES / f"{net}.json").read_text())
    profile = profile_of(net, system)
    if not products:
        profile = without_products(profile)
    its = dataclasses.replace(system_of(profile, system, fraction), single_backward=False)
    plan = make_plan(profile, its)
    moved, parameters = traffic(recorded, scale), parameter_bytes(recorded)
    private, exposed = (
        guarded_bytes(profile, plan, parameters, moved, exposed) for exposed in (False, True)
    )
    return {
        "net": net,
        "system": system,
        "products": products,
        "fraction": fraction,
        "discarded_bytes": sum(profile.storages[i].nbytes for i in plan.chosen(Choice.RECOMPUTE)),
        "saved_bytes": profile.saved_bytes,
        "traffic_bytes": sum(moved),
        "private_bytes": private,
        "exposed_bytes": exposed,
    }


def main() -> None:
    """Count, print, and fail if it is too much."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS)
    parser.add_argument("--system", choices=SYSTEMS, default="pcie4")
    parser.add_argument("--fractions", nargs="+", type=float, default=FRACTIONS[::4])
    parser.add_argument("--json")
    options = parser.parse_args()
    results = [
        run(net, options.system, fraction, products)
        for products in (False, True)
        for net in options.nets
        for fraction in options.fractions
    ]
    rows = [
        [
            "products" if r["products"] else "default",
            r["net"],
            r["fraction"],
            f"{r['discarded_bytes'] / r['saved_bytes']:.0%}",
            f"{r['traffic_bytes'] / 1e9:.1f}",
            f"{r['private_bytes'] / r['traffic_bytes']:.2%}",
            f"{r['exposed_bytes'] / r['traffic_bytes']:.2%}",
        ]
        for r in results
    ]
    print_table(["", "net", "limit", "discarded", "traffic (GB)", "private", "exposed"], rows)
    write(options.json, results)
    worst = max(r["private_bytes"] / r["traffic_bytes"] for r in results if not r["products"])
    if worst > MOST:
        sys.exit(f"guarding takes {worst:.1%} of the traffic, more than {MOST:.0%}")


if __name__ == "__main__":
    main()
