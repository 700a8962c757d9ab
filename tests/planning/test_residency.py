import random

import pytest

from chainer_ooc.planning.policies import Planned
from chainer_ooc.planning.profile import BACKWARD, FORWARD, Profile, Rerun, SavedTensor, Step
from chainer_ooc.planning.residency import Residency, needs_of
from chainer_ooc.planning.schedule import ScheduleBuilder
from chainer_ooc.planning.search import make_plan
from chainer_ooc.planning.simulator import simulate
from chainer_ooc.planning.system import System, Tier

from .instances import chain_of

TIER = Tier("host", 1.0, 1.0)


def nested(single_backward=True, limit=1000):
    """Three functions, each making 100 bytes from the one before; the second's output is not saved."""
    reruns = [Rerun(1.0, 7, (n - 1,) if n else (), (n,)) for n in range(3)]
    forward = [Step(f"f{n}", FORWARD, 1.0, rerun=reruns[n]) for n in range(3)]
    backward = [Step(f"f{n}", BACKWARD, 1.0, function=n) for n in (2, 1, 0)]
    storages = (
        SavedTensor(100, 0, 2, (5,)),
        SavedTensor(40, 1, 3, ()),
        SavedTensor(100, 2, 3, (3,)),
    )
    profile = Profile("nested", "none", True, 0, (*forward, *backward), storages)
    return profile, System(limit, (TIER,), single_backward=single_backward, margin=0.0)


def test_rerun_passes_through_what_nobody_saved():
    profile, system = nested()
    needs = needs_of(profile, system, [2])
    assert needs.reruns == [(3, (1, 2))]
    assert needs.rerun_seconds == 2.0
    # The first is read before step 3 and used in step 5; 40 bytes pass by while the last is made.
    assert needs.steps == [[3, 5], [], [3]]
    assert needs.own_bytes[3] == 7 + 40


def test_what_a_rerun_made_on_the_way_stays_or_is_made_twice():
    profile, system = nested()
    kept = needs_of(profile, system, [0, 2])
    assert kept.reruns == [(3, (0, 1, 2))]
    twice = needs_of(profile, system, [0, 2], [(0, 3)])
    assert twice.reruns == [(3, (0, 1, 2)), (5, (0,))]
    assert twice.rerun_seconds == kept.rerun_seconds + 1.0


def test_nothing_is_dropped_that_is_made_from_what_is_gone_by_then():
    """With ``single_backward`` the first, which cannot be made again, is dropped when backward begins."""
    forward = [Step(f"f{n}", FORWARD, 1.0) for n in range(4)]
    for n in (1, 2):
        forward[n] = Step(f"f{n}", FORWARD, 1.0, rerun=Rerun(1.0, 0, (n - 1,), (n,)))
    backward = [Step(f"f{n}", BACKWARD, 1.0, function=n) for n in (3, 2, 1)]
    uses = [(4,), (6,), (5,), (4,)]
    storages = tuple(SavedTensor(100, n, 4, uses[n]) for n in range(4))
    profile = Profile("skipping", "none", True, 0, (*forward, *backward), storages)
    for single_backward, again in ((True, (2,)), (False, (1, 2))):
        system = System(250, (TIER,), single_backward=single_backward, margin=0.0)
        plan = ScheduleBuilder(profile, system).plan((1, 2), (), 0)
        assert [i for i in (1, 2) if plan.choices[i].name == "RECOMPUTE"] == list(again)
        simulate(profile, system, Planned(plan))
        make_plan(profile, system)


def test_cover_takes_out_nothing_that_is_needless():
    profile = chain_of(random.Random(5), 12, rerun=False)
    peak = profile.resident_peak(True)
    system = System(int(0.7 * peak), (TIER,), margin=0.0)
    needs = needs_of(profile, system, ())
    memory = Residency(profile, system, needs)
    # The smallest first: a large one that is taken at last makes some of them needless.
    smallest = sorted(profile.saved, key=lambda i: profile.storages[i].nbytes)
    chosen = memory.cover(smallest, 0)
    assert memory.room.min() >= 0
    for i in chosen:
        rest = Residency(profile, system, needs)
        for other in chosen:
            if other != i:
                rest.remove(other)
        assert rest.room.min() < 0


def test_after_a_backward_that_may_run_again_room_comes_from_what_left():
    profile, system = nested(single_backward=False)
    memory = Residency(profile, system, needs_of(profile, system, ()))
    before = memory.room.copy()
    memory.remove(2)
    # Used at step 3: not in memory from step 4 on.
    assert list(memory.room - before) == [0, 0, 0, 0, 100, 100]


@pytest.mark.parametrize(("let_go", "discard"), [(2, ((2, 1),)), (4, ((4, 1),)), (7, ())])
def test_nothing_is_discarded_before_what_it_is_made_from_is_let_go(let_go, discard):
    """Until then somebody may write to that."""
    forward = [Step(f"f{n}", FORWARD, 1.0) for n in range(4)]
    forward[1] = Step("f1", FORWARD, 1.0, rerun=Rerun(1.0, 0, (0,), (1,), open_reads=(0,)))
    backward = [Step(f"f{n}", BACKWARD, 1.0, function=n) for n in (3, 2, 1, 0)]
    storages = (SavedTensor(100, 0, let_go, (7,)), SavedTensor(100, 1, 2, (6,)))
    profile = Profile("held", "none", True, 0, (*forward, *backward), storages)
    plan = ScheduleBuilder(profile, System(1000, (TIER,), margin=0.0)).plan({1}, (), 0)
    assert plan.discard == discard
