import dataclasses
import random

import pytest

from chainer_ooc.planning.plan import Plan
from chainer_ooc.planning.plan_cache import Conditions, PlanCache
from chainer_ooc.planning.policies import Planned
from chainer_ooc.planning.search import make_plan
from chainer_ooc.planning.simulator import simulate

from .instances import chain_of, system_for


def graph(inputs, seed=0, length=6):
    """A chain whose functions take inputs of that shape from the fourth on."""
    profile = chain_of(random.Random(seed), length)
    steps = tuple(
        dataclasses.replace(step, inputs=(inputs,) if n >= 3 else ("float32[1]",))
        for n, step in enumerate(profile.steps)
    )
    return dataclasses.replace(profile, steps=steps)


def planned(profile, seed=0):
    its = system_for(random.Random(seed), profile, 0.3)
    return make_plan(profile, its), its


def run(plan_cache, profile):
    """Return which plan was followed at each step."""
    plan_cache.begin()
    return [found and found[0].signature for found in map(plan_cache.advance, profile.steps)]


def test_each_graph_follows_its_own_plan_from_where_it_differs():
    one, two = graph("float32[8]"), graph("float32[16]")
    plan_cache = PlanCache()
    for profile in (one, two):
        plan_cache.add(profile, planned(profile)[0])
    for profile in (one, two, two, one):
        followed = run(plan_cache, profile)
        assert set(followed[3:]) == {profile.signature}
        assert plan_cache.finish() == profile.signature


def test_an_unknown_graph_is_served_on_demand_from_where_it_differs():
    known, other = graph("float32[8]"), graph("float32[9]")
    plan_cache = PlanCache()
    plan_cache.add(known, planned(known)[0])
    assert run(plan_cache, other)[:4] == [known.signature] * 3 + [None]
    assert plan_cache.finish() is None
    assert set(run(plan_cache, known)) == {known.signature}


def test_an_iteration_that_ends_early_or_goes_on_has_followed_no_plan():
    profile = graph("float32[8]")
    plan_cache = PlanCache()
    plan_cache.add(profile, planned(profile)[0])
    plan_cache.begin()
    plan_cache.advance(profile.steps[0])
    assert plan_cache.finish() is None
    run(plan_cache, profile)
    assert plan_cache.advance("other update()") is None
    assert plan_cache.finish() is None


def test_what_was_measured_moves_the_copies_of_that_plan_alone():
    profile = graph("float32[8]")
    plan, its = planned(profile)
    late = dataclasses.replace(
        plan, copy_in=tuple((profile.storages[i].uses[0], i) for _, i in plan.copy_in)
    )
    assert late.copy_in
    plan_cache = PlanCache()
    plan_cache.add(profile, late)
    run(plan_cache, profile)
    plan_cache.finish(simulate(profile, its, Planned(late)))
    plan_cache.begin()
    now, number = plan_cache.advance(profile.steps[0])
    assert number == 0
    assert sum(step for step, _ in now.copy_in) < sum(step for step, _ in late.copy_in)


def test_the_plan_of_another_graph_is_refused():
    with pytest.raises(ValueError, match="of graph"):
        PlanCache().add(graph("float32[8]"), Plan("other", ()))


def test_the_plan_not_followed_for_longest_is_forgotten():
    plan_cache = PlanCache()
    profiles = [graph(f"float32[{n}]") for n in range(1, 35)]
    for profile in profiles[:32]:
        plan_cache.add(profile, Plan(profile.signature, ()))
    run(plan_cache, profiles[0])
    plan_cache.finish()
    for profile in profiles[32:]:
        plan_cache.add(profile, Plan(profile.signature, ()))
    assert len(plan_cache) == 32
    assert run(plan_cache, profiles[0])[-1] == profiles[0].signature
    assert run(plan_cache, profiles[1])[-1] is None


def finish(plan_cache, profile, seconds, step_seconds=()):
    """Run an iteration that takes so long; return the page."""
    run(plan_cache, profile)
    plan_cache.finish(Took(seconds), 0, step_seconds)
    return plan_cache.entries[profile.signature]


class Took:
    waits, slack = {}, {}

    def __init__(self, seconds):
        self.seconds = seconds
        self.starts = [0.0] * 100


def test_a_plan_is_made_again_for_the_fastest_iteration_as_a_whole():
    """Each step by its least time is faster than any iteration ever is."""
    profile = graph("float32[8]")
    plan, its = planned(profile)
    plan_cache = PlanCache()
    plan_cache.add(profile, plan)
    least = min(profile.seconds) / 2
    for turn in range(3):
        times = [3 * least if n % 3 == turn else least for n in range(len(profile.steps))]
        run(plan_cache, profile)
        plan_cache.finish(Took(sum(times)), 0, times, Conditions(its))
    (entry,) = plan_cache.entries.values()
    fastest = min(sum(3 if n % 3 == turn else 1 for n in range(len(times))) for turn in range(3))
    assert sum(entry.profile.seconds) == pytest.approx(fastest * least)
    assert entry.profile.seconds == pytest.approx([fastest * least / len(times)] * len(times))


def test_what_the_others_follow_is_followed_from_the_next_iteration_on():
    profile = graph("float32[8]")
    plan, _ = planned(profile)
    other = dataclasses.replace(plan, copy_out=(), copy_in=(), earliest=())
    assert other != plan
    plan_cache = PlanCache()
    plan_cache.add(profile, plan)
    (entry,) = plan_cache.entries.values()
    run(plan_cache, profile)
    entry.propose(other)
    assert entry.plan is plan
    plan_cache.finish()
    plan_cache.begin()
    assert plan_cache.advance(profile.steps[0]) == (other, 0)


def test_what_the_others_gave_up_is_given_up_until_they_follow_it_again():
    profile = graph("float32[8]")
    plan, _ = planned(profile)
    plan_cache = PlanCache()
    plan_cache.add(profile, plan, demand_seconds=1.0)
    (entry,) = plan_cache.entries.values()
    entry.propose(None)
    assert set(run(plan_cache, profile)) == {None}
    entry.propose(plan)
    assert set(run(plan_cache, profile)) == {profile.signature}
    for _ in range(3):  # slower than on demand, here; the others are asked
        finish(plan_cache, profile, 2.0)
    assert set(run(plan_cache, profile)) == {profile.signature}


def test_plans_are_for_a_graph_and_its_storages():
    profile = graph("float32[8]")
    plan, _ = planned(profile)

    def identity(profile):
        plan_cache = PlanCache()
        plan_cache.add(profile, plan)
        return plan_cache.entries[profile.signature].identity

    def with_storage(**change):
        first, *rest = profile.storages
        return dataclasses.replace(profile, storages=(dataclasses.replace(first, **change), *rest))

    slower = tuple(dataclasses.replace(step, seconds=7.0) for step in profile.steps)
    assert identity(profile) == identity(dataclasses.replace(profile, steps=slower))
    nbytes = profile.storages[0].nbytes + 1
    assert identity(profile) != identity(with_storage(nbytes=nbytes))
    assert identity(profile) != identity(with_storage(label="other", uses=()))


def under(plan_cache, profile, now, seconds=1.0):
    """Run an iteration under some conditions; return the entry."""
    plan_cache.begin(now)
    entry = plan_cache.entries[profile.signature]
    if [*map(plan_cache.advance, profile.steps)][-1] is not None:
        entry.adapt(now)
        plan_cache.finish(Took(seconds), 0, [1.0] * len(profile.steps), now)
    return entry


def test_under_another_limit_a_plan_is_judged_anew():
    profile = graph("float32[8]")
    plan, its = planned(profile)
    now, other = Conditions(its), Conditions(dataclasses.replace(its, limit_bytes=2**40))
    plan_cache = PlanCache()
    plan_cache.add(profile, plan, 1.0, now)
    for _ in range(4):
        entry = under(plan_cache, profile, now, seconds=2.0)
    assert entry.disabled and entry.iterations == 3
    for number in range(2):
        assert under(plan_cache, profile, other).iterations == number + 1
        assert list(entry.seconds) == [1.0] * (number + 1)
        assert not entry.disabled and not entry.plan.copy_out
    again = entry.tuner
    under(plan_cache, profile, other)
    assert entry.tuner is not again  # from the least times, as after the first plan


def test_memory_that_goes_up_and_down_is_planned_for_a_few_times():
    profile = graph("float32[8]")
    plan, its = planned(profile)
    more = its.limit_bytes // 8
    plan_cache = PlanCache()
    plan_cache.add(profile, plan, 1.0, Conditions(its))
    tuners = set()
    for number in range(20):
        entry = under(plan_cache, profile, Conditions(its, True, more * (number % 2)), 0.5)
        tuners.add(entry.tuner)
    assert 3 < len(tuners) < 8


def test_an_iteration_is_made_a_profile_only_if_a_plan_gets_it():
    profile = graph("float32[8]")
    plan, its = planned(profile)
    made = []
    plan_cache = PlanCache()
    plan_cache.add(profile, plan, 1.0, Conditions(its))
    run(plan_cache, graph("float32[9]"))
    plan_cache.finish(Took(1.0), 0, (), Conditions(its), record=lambda: made.append(1))
    assert made == []
    run(plan_cache, profile)
    plan_cache.finish(Took(1.0), 0, (), Conditions(its), record=lambda: made.append(1) or profile)
    assert made == [1]


def test_a_graph_that_does_not_come_again_is_not_measured_for():
    one, two = graph("float32[8]"), graph("float32[16]")
    plan_cache = PlanCache()
    for profile in (one, two):
        plan_cache.add(profile, planned(profile)[0])
    times = Took(1.0)
    for _ in range(17):
        run(plan_cache, two)
        plan_cache.finish(times)
    assert plan_cache.is_settling  # one may come again
    for _ in range(17):
        run(plan_cache, two)
        plan_cache.finish(times)
    assert not plan_cache.is_settling
    run(plan_cache, one)
    plan_cache.finish()
    assert plan_cache.is_settling
