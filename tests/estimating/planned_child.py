"""Train a network under a limit, and print the engine's profile and what an iteration by its plan moved."""

from __future__ import annotations

import json
import sys

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import psutil

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.planning.plan_cache import plan_for
from tests.estimating.planned_nets import LARGE

#: The first iterations on demand, then some by the plan, which is made again after the third of them.
ITERATIONS = 7


def main(name: str, room: int) -> None:
    """Train ``name`` under a limit of ``room`` bytes beside what the process takes."""
    # What runs for the first time brings its code and its buffers to memory.
    small = chainer.Sequential(L.Convolution2D(1, 2, 3), F.relu, L.Linear(None, 2))
    update = chainer.optimizers.MomentumSGD().setup(small).update
    update(lambda x: F.sum(small(x)), np.ones((1, 1, 8, 8), "f"))
    np.ones((2048, 512), "f") @ np.ones((512, 512), "f")
    base = psutil.Process().memory_info().rss
    model, *inputs = LARGE[name]()
    optimizer = chainer.optimizers.MomentumSGD().setup(model)
    chainer_ooc.enable(limit=base + room)
    for _ in range(ITERATIONS):
        optimizer.update(model, *inputs)
    (entry,) = state.manager_of_ram().tracker.plan_cache.entries.values()
    profile, conditions = entry.profile, entry.conditions
    (tier,) = conditions.system.tiers
    found = {
        "profile": profile.to_json(),
        "limit": conditions.system.limit_bytes,
        "bandwidths": (tier.out_bandwidth, tier.in_bandwidth),
    }
    for recompute in ("auto", "never"):
        # Follow the plan that is made from what is known now, even where on demand was faster.
        plan = plan_for(profile, conditions._replace(recompute=recompute != "never"))
        entry.propose(plan)
        before = chainer_ooc.stats()
        optimizer.update(model, *inputs)
        after = chainer_ooc.stats()
        # What is discarded after its last use is not made again, unless backward runs twice.
        storages = profile.storages
        used = sum(storages[i].nbytes for step, i in plan.discard if step > storages[i].uses[-1])
        found[recompute] = (
            after.bytes_out - before.bytes_out,
            after.bytes_in - before.bytes_in,
            after.bytes_discarded - before.bytes_discarded - used,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
