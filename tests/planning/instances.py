"""Small random iterations, and the best that can be done with them by trying everything."""

import itertools
import random

from chainer_ooc.planning.plan import Choice, Plan
from chainer_ooc.planning.policies import Planned
from chainer_ooc.planning.profile import BACKWARD, FORWARD, Profile, Rerun, SavedTensor, Step
from chainer_ooc.planning.rerun import can_be_made_again
from chainer_ooc.planning.residency import needs_of
from chainer_ooc.planning.simulator import simulate
from chainer_ooc.planning.system import System, Tier


def chain_of(rng, length, rerun=True):
    """A chain of functions, each of which saves its output; some save their input as well."""
    steps, storages = [], []
    for n in range(length):
        nbytes = rng.randint(10, 60)
        seconds = rng.uniform(0.5, 2.0)
        again = None
        if rerun and rng.random() < 0.6:
            again = Rerun(seconds, 0, (n - 1,) if n else (), (n,))
        steps.append(
            Step(f"f{n}", FORWARD, seconds, rng.randint(0, 20), rng.randint(0, 5), (), -1, again)
        )
        uses = [2 * length - 1 - n]
        if n + 1 < length and rng.random() < 0.5:
            uses.append(2 * length - 2 - n)
        storages.append(SavedTensor(nbytes, n, min(n + 2, length), tuple(sorted(uses)), f"f{n}"))
    for n in reversed(range(length)):
        seconds = rng.uniform(0.5, 3.0)
        steps.append(
            Step(f"f{n}", BACKWARD, seconds, rng.randint(0, 20), rng.randint(0, 10), (), n)
        )
    return Profile("chain", "none", True, rng.randint(0, 50), tuple(steps), tuple(storages))


def system_for(rng, profile, fraction):
    floor, peak = profile.floor_bytes, profile.resident_peak(True)
    limit = max(1, round(floor + fraction * (peak - floor)))
    both = rng.choice((None, None, 30.0))
    tier = Tier(
        "host", rng.choice((5.0, 20.0, 80.0)), rng.choice((5.0, 20.0, 80.0)), both_bandwidth=both
    )
    return System(limit, (tier,), margin=0.0)


def random_case(seed, length=4, rerun=True):
    rng = random.Random(seed)
    profile = chain_of(rng, length, rerun)
    return profile, system_for(rng, profile, rng.choice((0.1, 0.3, 0.5, 0.8)))


def everything(profile, system):
    """Yield the timeline of every plan: each storage kept, dropped, or swapped with each begin of its copy in."""
    able = set(can_be_made_again(profile))
    options = []
    for i, storage in enumerate(profile.storages):
        begins = range(storage.free_from + 1, storage.uses[0] + 1)
        option = [(Choice.KEEP, -1), *((Choice.SWAP, begin) for begin in begins)]
        options.append(option + [(Choice.RECOMPUTE, -1)] * (i in able))
    for picked in itertools.product(*options):
        dropped = [i for i, (choice, _) in enumerate(picked) if choice is Choice.RECOMPUTE]
        swapped = [i for i, (choice, _) in enumerate(picked) if choice is Choice.SWAP]
        needs = needs_of(profile, system, dropped)
        free_from = [storage.free_from for storage in profile.storages]
        arrivals = sorted((picked[i][1], needs.steps[i][0], i) for i in swapped)
        plan = Plan(
            profile.signature,
            tuple(choice for choice, _ in picked),
            copy_out=tuple((free_from[i], i) for i in swapped),
            copy_in=tuple((begin, i) for begin, _, i in arrivals),
            discard=tuple((free_from[i], i) for i in dropped),
            need_bytes=profile.need_bytes,
        )
        yield simulate(profile, system, Planned(plan))
