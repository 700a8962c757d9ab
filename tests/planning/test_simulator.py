"""The simulator against timelines done by hand, and rules that hold for all of them."""

import dataclasses

import pytest

from benchmarks.baselines import BASELINES
from chainer_ooc.planning.plan import Choice, Plan
from chainer_ooc.planning.policies import OnDemand, Planned
from chainer_ooc.planning.profile import BACKWARD, FORWARD, Profile, Rerun, SavedTensor, Step
from chainer_ooc.planning.search import make_plan
from chainer_ooc.planning.simulator import Simulator, simulate
from chainer_ooc.planning.states import State
from chainer_ooc.planning.system import System, Tier

from .instances import random_case

KEEP, SWAP, RECOMPUTE = Choice.KEEP, Choice.SWAP, Choice.RECOMPUTE


def three(rerun=None):
    """a, b, c forward, a second each; each saves 100 bytes; back, two seconds each."""
    forward = [Step(name, FORWARD, 1.0) for name in "abc"]
    forward[0] = Step("a", FORWARD, 1.0, rerun=rerun)
    backward = [Step(name, BACKWARD, 2.0, function=n) for n, name in ((2, "c"), (1, "b"), (0, "a"))]
    storages = tuple(SavedTensor(100, n, n + 1, (5 - n,)) for n in range(3))
    return Profile("three", "none", True, 0, (*forward, *backward), storages)


NEEDS = three().need_bytes


def system(limit, out=100.0, back=100.0, **more):
    return System(limit, (Tier("host", out, back),), margin=0.0, **more)


def test_with_room_for_all_nothing_moves():
    timeline = simulate(three(), system(1000), OnDemand())
    assert timeline.seconds == 9.0
    assert (timeline.bytes_out, timeline.bytes_in, timeline.peak_bytes) == (0, 0, 300)
    assert timeline.starts == [0.0, 1.0, 2.0, 3.0, 5.0, 7.0]


def test_plan_hides_copies_behind_compute():
    plan = Plan("", (SWAP, KEEP, KEEP), copy_out=((1, 0),), copy_in=((4, 0),), need_bytes=NEEDS)
    timeline = simulate(three(), system(200), Planned(plan), detailed=True)
    # Out in second 1 to 2, released before c needs the room; in from 5 to 6, needed at 7.
    assert timeline.seconds == 9.0
    assert timeline.peak_bytes == 200
    assert timeline.slack == {0: 1.0}
    copies = [(i.kind, i.start, i.end) for i in timeline.intervals if i.kind in ("in", "out")]
    assert copies == [("out", 1.0, 2.0), ("in", 5.0, 6.0)]


def test_slow_links_stall_compute_both_ways():
    plan = Plan("", (SWAP, KEEP, KEEP), copy_out=((1, 0),), copy_in=((4, 0),), need_bytes=NEEDS)
    timeline = simulate(three(), system(200, out=40.0, back=25.0), Planned(plan))
    # Out takes 2.5 s from second 1, c waits from 2 to 3.5; in takes 4 s from 6.5, a waits from 8.5.
    assert timeline.wait_out_seconds == pytest.approx(1.5)
    assert timeline.wait_in_seconds == pytest.approx(2.0)
    assert timeline.waits == {0: pytest.approx(2.0)}
    assert timeline.seconds == pytest.approx(12.5)


def test_copy_in_waits_for_room():
    plan = Plan("", (SWAP, KEEP, KEEP), copy_out=((1, 0),), copy_in=((2, 0),), need_bytes=NEEDS)
    timeline = simulate(three(), system(200), Planned(plan))
    # Due at step 2, but there is room only when c's storage is dead, at step 4.
    assert timeline.peak_bytes == 200
    assert timeline.slack == {0: 1.0}


def test_copy_under_way_holds_the_memory_of_what_died():
    plan = Plan("", (KEEP, KEEP, SWAP), copy_out=((3, 2),))
    steps = [*three().steps]
    steps[4] = Step("b", BACKWARD, 2.0, workspace_bytes=150)
    profile = Profile("three", "none", True, 0, tuple(steps), three().storages)
    timeline = simulate(profile, system(350, out=20.0), Planned(plan))
    # c's storage is dead at 5 s, but its copy goes on until 8 s; b needs 200 + 150 bytes.
    assert timeline.wait_out_seconds == pytest.approx(3.0)
    assert timeline.peak_bytes == 350


def test_dropped_storage_is_made_again():
    again = Rerun(0.75, 0, (), (0,))
    plan = Plan("", (RECOMPUTE, KEEP, KEEP), discard=((1, 0),))
    timeline = simulate(three(again), system(200), Planned(plan))
    assert timeline.rerun_seconds == 0.75
    assert timeline.seconds == 9.75
    assert timeline.reruns == [(5, (0,))]
    assert timeline.peak_bytes == 200
    assert (timeline.bytes_out, timeline.bytes_in) == (0, 0)


def test_double_backward_keeps_used_storages():
    once = simulate(three(), system(1000), OnDemand())
    steps = tuple(
        Step(s.label, s.phase, s.seconds, held_bytes=60 * (s.phase == BACKWARD))
        for s in three().steps
    )
    profile = Profile("three", "none", True, 0, steps, three().storages)
    twice = simulate(profile, system(1000, single_backward=False), OnDemand())
    assert once.peak_bytes == 300
    assert twice.peak_bytes == 360


def test_full_tier_overflows_into_the_next():
    tiers = (Tier("host", 100.0, 100.0, capacity=100), Tier("disk", 50.0, 50.0))
    plan = Plan(
        "",
        (SWAP, SWAP, KEEP),
        copy_out=((1, 0), (2, 1)),
        copy_in=((4, 1), (5, 0)),
        need_bytes=NEEDS,
    )
    its = System(200, tiers, margin=0.0)
    timeline = simulate(three(), its, Planned(plan), detailed=True)
    took = [i.end - i.start for i in timeline.intervals if i.kind == "out"]
    assert took == pytest.approx([1.0, 2.0])


def test_what_no_tier_has_room_for_is_counted():
    its = System(200, (Tier("host", 100.0, 100.0, capacity=50),), margin=0.0)
    plan = Plan("", (SWAP, KEEP, KEEP), copy_out=((1, 0),), copy_in=((4, 0),), need_bytes=NEEDS)
    assert simulate(three(), its, Planned(plan)).unplaced_bytes == 100


IN_MEMORY = State.RESIDENT, State.GOING_OUT, State.BOTH


class Watched(Simulator):
    """Checks at each step that what it needs is there, and that the bytes add up."""

    def run(self):
        policy = self.policy
        between = policy.between

        def check(simulator):
            between(simulator)
            here = (*IN_MEMORY, State.COMING_IN)
            alive = sum(one.nbytes for one in self.storages if one and one.state in here)
            assert self.resident == alive + sum(nbytes for _, nbytes in self._deferred_frees)
            for state in (State.RESIDENT, State.BOTH, State.COMING_IN):
                members = [*self.members(state)]
                assert {one.state for one in members} <= {state}
                assert self.nbytes[state] == sum(one.nbytes for one in members)

        policy.between = check
        timeline = super().run()
        assert all(self.storages[i].state is State.DROPPED for i in self.profile.saved)
        return timeline

    def _drop(self, storage):
        assert storage.state in IN_MEMORY
        super()._drop(storage)


@pytest.mark.parametrize("name", [*BASELINES, "plan"])
def test_bytes_add_up_whatever_the_policy(name):
    moved = 0
    for seed in range(40):
        profile, its = random_case(seed, 8)
        policy = Planned(make_plan(profile, its)) if name == "plan" else BASELINES[name]()
        timeline = Watched(profile, its, policy).run()
        moved += timeline.bytes_in
        waits = timeline.wait_in_seconds + timeline.wait_out_seconds + timeline.rerun_seconds
        assert timeline.seconds == pytest.approx(profile.compute_seconds + waits)
    assert moved > 0 or name == "vDNN conv"  # there are no convolutions here


@pytest.mark.parametrize("limit", [1000, 250])
def test_storages_may_be_saved_in_another_order_than_they_are_made(limit):
    """A function saves its input, which an earlier one has made, after others."""
    profile = three()
    turned = dataclasses.replace(profile, storages=profile.storages[::-1])
    Watched(turned, system(limit), OnDemand()).run()
