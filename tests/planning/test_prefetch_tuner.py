"""The closed loop: what compute waits for begins earlier, what lies about begins later, and then it stays."""

import dataclasses
import random
from pathlib import Path

import pytest

from chainer_ooc.planning.plan import Choice, Plan
from chainer_ooc.planning.policies import Planned
from chainer_ooc.planning.prefetch_tuner import PrefetchTuner
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.search import make_plan
from chainer_ooc.planning.simulator import simulate
from chainer_ooc.planning.system import System, Tier

PROFILES = Path(__file__).parents[2] / "benchmarks" / "profiles"


@pytest.fixture(scope="module")
def planned():
    profile = Profile.from_json((PROFILES / "resnet50.json").read_text())
    floor, peak = profile.floor_bytes, profile.resident_peak(True)
    its = System(floor + (peak - floor) // 2, (Tier("host", 4e8, 4e8),), margin=0.0)
    return profile, its, make_plan(profile, its)


def follow(profile, its, plan, iterations, noise, seed=0):
    """Return the tuner, and for each iteration the wait and the begins of the copies."""
    rng = random.Random(seed)
    tuner = PrefetchTuner(plan)
    history = []
    for _ in range(iterations):
        seconds = [s.seconds * rng.uniform(1 - noise, 1 + noise) for s in profile.steps]
        timeline = simulate(profile, its, Planned(tuner.plan), seconds=seconds)
        history.append((timeline.wait_in_seconds, tuner.plan.copy_in))
        tuner.update(timeline)
    return tuner, history


def test_waits_move_copies_earlier_until_there_are_none(planned):
    profile, its, plan = planned
    late = [min(profile.storages[i].uses) for _, i in plan.copy_in]
    worst = dataclasses.replace(
        plan, copy_in=tuple((use, i) for use, (_, i) in zip(late, plan.copy_in, strict=True))
    )
    _, history = follow(profile, its, worst, 30, noise=0.0)
    waits = [wait for wait, _ in history]
    assert waits[0] > 0.05 * profile.compute_seconds
    assert waits[-1] < 0.002 * profile.compute_seconds
    assert history[-1][1] == history[-5][1]


def test_slack_moves_copies_later_without_a_wait(planned):
    profile, its, plan = planned
    early = dataclasses.replace(
        plan, copy_in=tuple((e, i) for e, (_, i) in zip(plan.earliest, plan.copy_in, strict=True))
    )
    tuner, history = follow(profile, its, early, 20, noise=0.0)
    assert sum(step for step, _ in tuner.plan.copy_in) > sum(step for step, _ in early.copy_in)
    assert history[-1][0] <= history[0][0] + 0.002 * profile.compute_seconds


@pytest.mark.parametrize("slowdown", [1.0, 0.75])
def test_converges_under_noise_and_stays(planned, slowdown):
    profile, its, plan = planned
    (tier,) = its.tiers
    slower = Tier("host", tier.out_bandwidth * slowdown, tier.in_bandwidth * slowdown)
    its = dataclasses.replace(its, tiers=(slower,))
    _, history = follow(profile, its, plan, 60, noise=0.1, seed=3)
    waits = [wait for wait, _ in history]
    assert sum(waits[-10:]) <= sum(waits[:10]) + 0.002 * profile.compute_seconds
    assert sum(waits[-10:]) / 10 < 0.01 * profile.compute_seconds
    changed = [a != b for (_, a), (_, b) in zip(history[-15:], history[-14:], strict=False)]
    assert sum(changed) <= 2


class Seen:
    """One copy's wait or slack in an iteration of ten steps of a second each."""

    seconds = 10.0
    starts = tuple(map(float, range(10)))

    def __init__(self, wait=0.0, slack=0.0):
        self.waits, self.slack = {0: wait}, {0: slack}


def test_no_copy_begins_again_where_it_was_waited_for():
    tuner = PrefetchTuner(Plan("", (Choice.SWAP,), copy_in=((6, 0),), earliest=(1,)))
    begins = [tuner.update(seen).copy_in[0][0] for seen in (
        Seen(slack=2.0), Seen(wait=1.0), Seen(slack=3.0), Seen(slack=3.0), Seen(wait=0.1), Seen(slack=9.0)
    )]  # fmt: skip
    # Half of the slack later; one and a half waits earlier; then later again, but not to step 6.
    assert begins == [6, 4, 5, 5, 4, 4]
    for _ in range(9):
        tuner.update(Seen(wait=3.0))
    assert tuner.plan.copy_in == ((1, 0),)


def test_begins_stay_in_order_and_in_their_bounds(planned):
    profile, its, plan = planned
    _, history = follow(profile, its, plan, 20, noise=0.3)
    for _, copies in history:
        begins = [step for step, _ in copies]
        assert begins == sorted(begins)
        assert [i for _, i in copies] == [i for _, i in plan.copy_in]
        assert all(b >= e for b, e in zip(begins, plan.earliest, strict=True))
