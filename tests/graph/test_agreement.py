"""Agreement: what one process planned is followed by another that trains the same."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path

import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.extensions import AgreeOnPlans
from chainer_ooc.graph import agreement
from chainer_ooc.planning import plan_cache, search
from chainer_ooc.planning.plan import Plan
from chainer_ooc.testing import assert_same_bits
from tests.graph.test_iteration import KIB, OTHER, Training, on_ram, tracker_of

LIMIT = OTHER + 700 * KIB


@pytest.fixture(autouse=True)
def device(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_cache, "_WORSE", float("inf"))
    monkeypatch.setattr(search, "EFFORT", 2000)
    gc.collect()
    with on_ram(str(tmp_path), monkeypatch, OTHER):
        yield state.process.managers["ram"]


class Communicator:
    """Rank 1 of 2, which hears what rank 0 says."""

    def __init__(self, said, rank=1):
        self.said, self.rank, self.calls = said, rank, 0

    def bcast_obj(self, mine):
        self.calls += 1
        return mine if self.rank == 0 else self.said


class At:
    """A trainer after an iteration."""

    def __init__(self, iteration):
        self.updater = self
        self.iteration = iteration


def entry():
    (only,) = tracker_of(state.process.managers["ram"]).plan_cache.entries.values()
    return only


def test_the_plan_of_another_is_followed_with_the_same_bits(device):
    expected = [Training().step() for _ in range(1)]
    stock = Training()
    expected = [[stock.step() for _ in range(8)], stock.state()]
    with chainer_ooc.out_of_core_mode(limit=LIMIT, min_bytes=1):
        training = Training()
        losses = [training.step() for _ in range(4)]
        ((case, text),) = agreement.offers().items()
        plan = Plan.from_json(text)
        assert plan == entry().plan
        others = dataclasses.replace(  # all at the last moment
            plan,
            copy_in=tuple((entry().profile.storages[i].uses[0], i) for _, i in plan.copy_in),
        )
        assert others != plan
        AgreeOnPlans(Communicator({case: others.to_json()}))(At(4))
        losses += [training.step()]
        assert entry().plan == others
        losses += [training.step() for _ in range(3)]
        assert_same_bits([losses, training.state()], expected)


@pytest.mark.parametrize("differs", ["limit", "graph"])
def test_the_plan_of_something_else_is_not(device, differs):
    with chainer_ooc.out_of_core_mode(limit=LIMIT, min_bytes=1):
        training = Training()
        for _ in range(4):
            training.step()
        (((limit, identity), text),) = agreement.offers().items()
        assert agreement.follow({(limit, identity): text}) == 1
        other = (limit + 1, identity) if differs == "limit" else (limit, identity[::-1])
        assert agreement.follow({other: text}) == 0


def test_what_is_slower_for_rank_0_is_given_up_by_all(device, monkeypatch):
    with chainer_ooc.out_of_core_mode(limit=LIMIT, min_bytes=1):
        training = Training()
        for _ in range(4):
            training.step()
        ((case, text),) = agreement.offers().items()
        agreement.follow({case: text})
        training.step()  # followed: what was decided before hides nobody's own times
        entry().iterations, entry().demand_seconds = 3, 0.0
        monkeypatch.setattr(plan_cache, "_WORSE", 1.0)
        assert agreement.offers() == {case: None}
        assert not entry().disabled
        agreement.follow(agreement.offers())
        training.step()
        assert entry().disabled
        agreement.follow({case: text})
        training.step()
        assert not entry().disabled


def test_all_ranks_talk_after_the_same_iterations_and_rank_0_keeps_its_plans(device):
    for rank in (0, 1):
        communicator = Communicator({}, rank)
        extension = AgreeOnPlans(communicator)
        talked = []
        for iteration in range(1, 100):
            before = communicator.calls
            extension(At(iteration))
            if communicator.calls > before:
                talked.append(iteration)
        assert talked == [4, 8, 16, 32, 64]


def test_two_processes_that_train_the_same_have_the_same_case(device):
    """Whatever their times."""
    cases = []
    for _ in range(2):
        tracker_of(state.process.managers["ram"]).plan_cache.entries.clear()
        with chainer_ooc.out_of_core_mode(limit=LIMIT, min_bytes=1):
            training = Training()
            for _ in range(5):
                training.step()
            cases.append(set(agreement.offers()))
    assert cases[0] == cases[1]
    assert len(cases[0]) == 1
    assert np.isfinite(training.step())


@pytest.mark.mpi
def test_two_ranks_follow_one_plan(run_python):
    script = Path(__file__).with_name("agreement_child.py")
    code = f"import chainer_ooc, runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = run_python("-c", code, ranks=2, timeout=200)
    assert done.returncode == 0, done.stderr
    one, other = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert one["bytes_in"] > 0 and other["bytes_in"] > 0
    assert one["plan"]["copy_in"]
    assert one["plan"] == other["plan"]
    assert one["parameters"] == other["parameters"]
