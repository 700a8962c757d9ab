"""The planner against everything that can be done, against its bound, and on recorded networks."""

import dataclasses
import random
from pathlib import Path

import pytest

from benchmarks.baselines import compare
from chainer_ooc.planning import search
from chainer_ooc.planning.bound import lower_bound
from chainer_ooc.planning.plan import Choice, Plan
from chainer_ooc.planning.policies import OnDemand, Planned
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.schedule import ScheduleBuilder, bytes_for_second_backward
from chainer_ooc.planning.search import make_plan
from chainer_ooc.planning.simulator import simulate
from chainer_ooc.planning.system import System, Tier

from .instances import chain_of, everything, random_case, system_for

PROFILES = Path(__file__).parents[2] / "benchmarks" / "profiles"


def recorded(net):
    return Profile.from_json((PROFILES / f"{net}.json").read_text())


def limited(profile, fraction, rate, **more):
    floor, peak = profile.floor_bytes, profile.resident_peak(True)
    limit = int(floor + fraction * (peak - floor)) + 1
    return System(limit, (Tier("host", rate, rate),), margin=0.0, **more)


@pytest.mark.parametrize(("length", "seeds"), [(3, 120), (4, 40)])
def test_as_good_as_trying_everything(length, seeds):
    worse = 0
    for seed in range(seeds):
        profile, its = random_case(seed, length)
        best = min((t.over_bytes, t.seconds) for t in everything(profile, its))
        plan = make_plan(profile, its)
        timeline = simulate(profile, its, Planned(plan))
        assert timeline.seconds == plan.seconds
        assert timeline.over_bytes <= best[0]
        if not best[0]:
            assert plan.bound_seconds <= best[1] * (1 + 1e-9)
            assert timeline.seconds <= 1.1 * best[1]
            worse += timeline.seconds > 1.001 * best[1]
    assert worse <= seeds // 20


def test_nothing_goes_below_the_bound():
    compared = stalled = 0
    for seed in range(120):
        rng = random.Random(seed)
        profile = chain_of(rng, rng.randint(5, 14), rerun=seed % 3 > 0)
        its = system_for(rng, profile, rng.uniform(0.05, 0.95))
        bound = lower_bound(profile, its)
        assert bound >= profile.compute_seconds * (1 - 1e-9)
        stalled += bound > 1.05 * profile.compute_seconds
        timelines = [*compare(profile, its).values()]
        timelines.append(simulate(profile, its, Planned(make_plan(profile, its))))
        for timeline in timelines:
            if not timeline.over_bytes:
                compared += 1
                assert timeline.seconds >= bound * (1 - 1e-9)
    assert compared > 400
    assert stalled > 30


def test_bound_of_an_iteration_done_by_hand():
    # Three storages of 100 bytes, room for two, nothing can be made again: 100 bytes go out and come back.
    profile, _ = random_case(0, 3, rerun=False)
    steps = tuple(
        dataclasses.replace(s, seconds=1.0, workspace_bytes=0, held_bytes=0) for s in profile.steps
    )
    storages = tuple(
        dataclasses.replace(s, nbytes=100, free_from=n + 1, uses=(5 - n,))
        for n, s in enumerate(profile.storages)
    )
    profile = dataclasses.replace(profile, steps=steps, storages=storages, fixed_bytes=0)
    its = System(200, (Tier("host", 10.0, 20.0),), margin=0.0)
    # The first is free at 1 s and must be out before the third is made, at 2 s: 10 s instead of 1. It can come
    # back when the third is dead and must be there two steps later: 5 s instead of 1.
    assert lower_bound(profile, its) == pytest.approx(1 + 10 + 1 + 1 + 5 + 1)
    assert make_plan(profile, its).seconds == pytest.approx(19.0)


def test_plans_are_deterministic():
    profile = recorded("googlenet")
    its = limited(profile, 0.3, 3e8)
    plan = make_plan(profile, its)
    assert make_plan(Profile.from_json(profile.to_json()), its) == plan
    assert Plan.from_json(plan.to_json()) == plan


def test_with_room_for_all_everything_is_kept():
    profile = recorded("resnet50")
    plan = make_plan(profile, limited(profile, 1.0, 1e9))
    assert set(plan.choices) == {Choice.KEEP}
    assert (plan.copy_out, plan.copy_in, plan.discard) == ((), (), ())
    assert plan.seconds == profile.compute_seconds == plan.bound_seconds


@pytest.mark.parametrize("single_backward", [True, False])
@pytest.mark.parametrize("net", ["resnet50", "googlenet", "unet3d"])
@pytest.mark.parametrize("rate", [3e7, 3e8])
def test_recorded_networks_are_planned_near_the_bound(net, rate, single_backward):
    profile = recorded(net)
    its = limited(profile, 0.5, rate, single_backward=single_backward)
    plan = make_plan(profile, its)
    timeline = simulate(profile, its, Planned(plan))
    assert timeline.over_bytes == 0
    assert timeline.peak_bytes == plan.peak_bytes <= its.limit_bytes
    assert timeline.seconds <= simulate(profile, its, OnDemand()).seconds
    if single_backward:
        assert timeline.seconds <= 1.05 * plan.bound_seconds
    counts = [len(plan.chosen(choice)) for choice in (Choice.SWAP, Choice.RECOMPUTE)]
    assert sum(counts) > 0


def test_effort_is_bounded(monkeypatch):
    """A second for 1,000 storages: the planner's time is the steps that it simulates, some 8 us each."""
    profile = chain_of(random.Random(1), 1000)
    simulated = 0

    def counting(profile, *arguments):
        nonlocal simulated
        simulated += len(profile.steps)
        return simulate(profile, *arguments)

    monkeypatch.setattr(search, "simulate", counting)
    rate = profile.saved_bytes / profile.compute_seconds / 4
    plan = make_plan(profile, limited(profile, 0.2, rate))
    assert plan.seconds < simulate(profile, limited(profile, 0.2, rate), OnDemand()).seconds
    assert simulated <= search.EFFORT + 8 * len(profile.steps)


def test_a_plan_does_with_the_room_outside():
    profile = recorded("resnet50")
    its = limited(profile, 0.5, 1e9)
    unlimited = simulate(profile, its, Planned(make_plan(profile, its)))
    room = unlimited.bytes_out // 2
    its = dataclasses.replace(its, tiers=(dataclasses.replace(its.tiers[0], capacity=room),))
    timeline = simulate(profile, its, Planned(make_plan(profile, its)))
    assert timeline.unplaced_bytes == timeline.over_bytes == 0
    assert timeline.bytes_out <= room
    assert timeline.rerun_seconds > unlimited.rerun_seconds


def test_below_the_floor_the_plan_says_by_how_much():
    profile = recorded("googlenet")
    its = System(int(0.9 * profile.floor_bytes), (Tier("host", 1e9, 1e9),), margin=0.0)
    plan = make_plan(profile, its)
    assert plan.peak_bytes >= profile.floor_bytes


@pytest.mark.parametrize("fraction", [0.3, 0.6])
@pytest.mark.parametrize("net", ["googlenet", "resnet50", "vgg16", "lstm"])
def test_what_need_not_leave_with_single_backward_need_not(net, fraction):
    """A schedule without it fits, and one that moves less than the rest would not."""
    recorded_one = recorded(net)
    profile = recorded_one.without_reruns(range(len(recorded_one.storages)))
    limit = int(profile.floor_bytes + fraction * (profile.in_core_bytes - profile.floor_bytes))
    tiers = (Tier("host", 1e9, 1e9),)
    twice = ScheduleBuilder(profile, System(limit, tiers, False)).plan((), (), 0)
    spared = bytes_for_second_backward(profile, twice, limit)
    once = ScheduleBuilder(profile, System(limit, tiers, True)).plan((), (), 0)

    def leaving(plan):
        return sum(profile.storages[i].nbytes for _, i in plan.copy_out)

    assert spared == leaving(twice) - leaving(once) > 0
    system = System(limit, tiers, True)
    assert simulate(profile, system, Planned(once)).peak_bytes <= limit
    excess = profile.resident_peak(single_backward=True) - limit
    largest = max(storage.nbytes for storage in profile.storages)
    assert leaving(once) >= excess - largest


@pytest.mark.parametrize("net", ["resnet50", "unet3d", "lstm"])
@pytest.mark.parametrize("fraction", [0.2, 0.6])
def test_what_backward_has_used_and_can_be_made_again_is_given_up(net, fraction):
    """Not before its last use, only where it is in the way, and then less has to leave with a copy."""
    profile = recorded(net)
    floor, peak = profile.floor_bytes, profile.resident_peak(single_backward=True)
    limit = int(floor + fraction * (peak - floor))
    system = System(limit, (Tier("host", 1e9, 1e9),), single_backward=False, margin=0.0)
    plan = ScheduleBuilder(profile, system).plan((), (), 0)
    given_up = {i: step for step, i in plan.discard}
    assert given_up
    for i, step in given_up.items():
        assert plan.choices[i] is Choice.KEEP
        assert i in profile.makers
        assert step > profile.storages[i].uses[-1]
    moves_only = profile.without_reruns(range(len(profile.storages)))
    without = ScheduleBuilder(moves_only, system).plan((), (), 0)
    assert not without.discard

    def leaving(plan):
        return sum(profile.storages[i].nbytes for _, i in plan.copy_out)

    assert leaving(plan) < leaving(without)
    timeline = simulate(profile, system, Planned(plan))
    assert timeline.peak_bytes <= limit
    assert not timeline.reruns  # backward runs once here
    roomy = dataclasses.replace(system, limit_bytes=profile.in_core_bytes)
    assert not ScheduleBuilder(profile, roomy).plan((), (), 0).discard
