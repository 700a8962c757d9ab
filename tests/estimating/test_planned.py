"""estimate() plans as the engine does: from the profile that the engine records, by the same planner."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import chainer
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.estimating import calibration, profiles, step
from chainer_ooc.estimating import inputs as inputs_of
from chainer_ooc.estimating.estimator import bytes_again
from chainer_ooc.planning.plan_cache import Conditions, plan_for
from chainer_ooc.planning.policies import Planned
from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.simulator import simulate
from chainer_ooc.planning.system import System, Tier
from tests.estimating.planned_nets import LARGE, NETS

MIB = 1 << 20


def foreseen(net, process_bytes=64 * MIB):
    model, *inputs = net()
    make = inputs_of.parse(inputs).make()
    optimizer = chainer.optimizers.MomentumSGD
    return step.record(model, make, optimizer, process_bytes=process_bytes).profile


def recorded(net):
    """Return the profile that the engine records in a real run with plenty of memory."""
    with chainer_ooc.out_of_core_mode(limit="1TiB"):
        manager = state.manager_of_ram()
        outer = manager.tracker, manager.has_been_short
        manager.tracker, manager.has_been_short = None, True
        try:
            model, *inputs = net()
            optimizer = chainer.optimizers.MomentumSGD().setup(model)
            for _ in range(4):
                optimizer.update(model, *inputs)
            (entry,) = manager.tracker.plan_cache.entries.values()
        finally:
            manager.tracker, manager.has_been_short = outer
    return entry.profile


def reruns(profile):
    """Return what identifies the steps, and how each can be run again: reads, writes, steps, guarded."""
    return [
        (s.key, s.function, s.rerun and (s.rerun.reads, s.rerun.writes, s.rerun.steps, s.rerun.guard_seconds > 0))
        for s in profile.steps
    ]  # fmt: skip


def storages(profile):
    return [(s.nbytes, s.producer, s.free_from, s.uses, s.label) for s in profile.storages]


@pytest.mark.parametrize("name", NETS)
def test_the_profile_is_that_of_a_real_run(name):
    mine, real = foreseen(NETS[name]), recorded(NETS[name])
    assert sum(s.rerun is not None for s in mine.steps) >= 2
    assert reruns(mine) == reruns(real)
    assert storages(mine) == storages(real)
    assert mine.signature == real.signature


@functools.cache
def trained(name, room):
    """Train under a limit of ``room`` bytes beside the process, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.estimating.planned_child", name, str(room)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.extension
@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_plan_is_that_of_a_real_run(name):
    mine = foreseen(LARGE[name])
    limit = mine.floor_bytes + 6 * (mine.in_core_bytes - mine.floor_bytes) // 10
    real = trained(name, limit - 64 * MIB)
    theirs = Profile.from_json(real["profile"])
    assert reruns(mine) == reruns(theirs)
    # Told the times and the memory beside arrays, which no estimate can know, it decides alike.
    told = mine.at(theirs.seconds)
    beside = theirs.fixed_bytes - mine.fixed_bytes
    tier = Tier("swap file", *real["bandwidths"], one_queue=True)
    system = System(real["limit"] - beside, (tier,), single_backward=False)
    plan = plan_for(told, Conditions(system))
    expected = plan_for(theirs, Conditions(System(real["limit"], (tier,), single_backward=False)))
    # Of the recurrent net's many equal arrays, kilobytes that only a real process takes choose others.
    if name != "recurrent":
        assert plan.choices == expected.choices
    # What an iteration by plan moved, within one array: memory beside arrays may grow meanwhile.
    timeline = simulate(told, system, Planned(plan))
    slack = max(mine.storages[i].nbytes for i in mine.saved)
    moved = timeline.bytes_out, timeline.bytes_in, bytes_again(told, timeline)
    assert moved == pytest.approx(real["auto"], abs=slack)


@pytest.mark.extension
@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnet", "recurrent", "unet"])
def test_an_estimate_is_as_long_as_a_real_run(name, monkeypatch):
    """Told how long the steps and the copies of the real run took: which of two plans is shorter depends on them.

    Arrays can be moved in several ways that take as long, so what moves is compared only to 10 % and one array, and
    only what leaves. What a process takes beside its arrays, more than before it trains, no estimate can know.
    """
    model, *inputs = LARGE[name]()
    mine = foreseen(LARGE[name])
    room = mine.floor_bytes + 6 * (mine.in_core_bytes - mine.floor_bytes) // 10 - 64 * MIB
    real = trained(name, room)
    theirs = Profile.from_json(real["profile"])
    make_profile = profiles.make_profile
    monkeypatch.setattr(
        profiles, "make_profile", lambda *given: make_profile(*given).at(theirs.seconds)
    )
    monkeypatch.setattr(calibration, "disk_rates", lambda: real["bandwidths"])
    options = {"search": False, "recompute": "never"}
    for _ in range(2):  # the first one makes the process larger
        process = chainer_ooc.estimate(model, inputs, limit="1TiB", **options).process_bytes
    limit = process + real["limit"] - theirs.fixed_bytes + mine.fixed_bytes - 64 * MIB
    result = chainer_ooc.estimate(model, inputs, limit=limit, **options)
    assert not result.fits_in_core
    slack = 0.1 * mine.saved_bytes + max(mine.storages[i].nbytes for i in mine.saved)
    assert result.planned_bytes_out == pytest.approx(real["never"][0], abs=slack)
    tier = Tier("swap file", *real["bandwidths"], one_queue=True)
    system = System(real["limit"], (tier,), single_backward=False)
    plan = plan_for(theirs, Conditions(system, recompute=False))
    seconds = simulate(theirs, system, Planned(plan)).seconds
    assert result.planned_step_seconds == pytest.approx(seconds, rel=0.1)
