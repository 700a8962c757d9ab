"""The simulator does what the engine does: the same moves of the same storages at the same steps and times."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from chainer_ooc.planning.executor import PlanExecutor
from chainer_ooc.planning.policies import OnDemand, Planned
from chainer_ooc.planning.profile import Rerun
from chainer_ooc.planning.rerun import chain
from chainer_ooc.planning.search import make_plan
from chainer_ooc.planning.simulator import Simulator
from chainer_ooc.planning.system import MARGIN, System, Tier
from chainer_ooc.settings import Settings
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.recipe import Recipe
from chainer_ooc.swap.transfers import Transfers
from tests.doubles.simulated_device import SimulatedDevice
from tests.planning.instances import chain_of
from tests.planning.recorded import planner

#: What is compared.
MOVES = ("begin_out", "release", "discard", "begin_in")


def logged(kind):
    """Return a class whose moves are noted in ``log``: (step, move, storage)."""

    def noting(name):
        def move(self, storage, *more, **named):
            self.log.append((self.where(), name, self.number_of(storage)))
            getattr(kind, name)(self, storage, *more, **named)

        return move

    return type(f"Logged{kind.__name__}", (kind,), {name: noting(name) for name in MOVES})


class LoggedSimulator(logged(Simulator)):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.log = []

    def where(self):
        return self.step

    def number_of(self, storage):
        return storage.number


class LoggedManager(SwapManager):
    _transfers_type = logged(Transfers)


class Engine:
    """The real manager, fed with a recorded iteration as ``graph/`` feeds it with functions."""

    def __init__(self, profile, system):
        self.profile, self.system = profile, system
        self.device = SimulatedDevice(system)
        self.settings = Settings(limit=1 << 60, min_bytes=1)
        self.manager = LoggedManager(self.device, lambda: self.settings, is_read_only=lambda: True)
        self.step = 0
        self.packed, self.numbers = {}, {}
        self.log = []
        transfers = self.manager._transfers
        transfers.log, transfers.where = self.log, lambda: self.step
        transfers.number_of = lambda storage: self.numbers[storage.sequence]

    def run(self, limit, plan=None):
        """Run an iteration. The first one has taught the order in which backward uses what."""
        self.settings = Settings(limit=limit, min_bytes=1)
        self.log.clear()
        self.packed, self.numbers = {}, {}
        profile, manager, device = self.profile, self.manager, self.device
        manager.settle()
        device.begin()
        executor = plan and PlanExecutor(plan, self._find)
        manager.run_plan(None)
        held = {}  # by the user's code
        for number, seconds in enumerate(profile.seconds):
            self.step, device.other = number, profile.fixed_bytes + profile.held[number]
            for i in profile.freed[number]:
                held.pop(i, None)
            manager.make_room(0)
            if executor is not None and (not number or not executor.is_idle(number)):
                manager.run_plan(executor, number)
            group = [self.packed[i] for i in profile.used[number]]
            arrays = []
            if group:
                arrays = manager.fetch(group, read_only=True)
                manager.prefetch(group)
            manager.make_room(profile.need_bytes[number])
            device.compute(seconds)
            arrays.clear()
            for i in profile.used[number] if self.system.single_backward else ():
                if profile.storages[i].uses[-1] == number:
                    held.pop(i, None)  # a profile has it that nobody refers to it any more
            for i in profile.made[number]:
                held[i] = device.array(profile.storages[i].nbytes)
                self._save(i, held[i])
            for i in profile.made[number]:
                if i in profile.sources:
                    self._give_recipe(i)
            if limit < 1 << 60:
                manager.budget.note_growth(profile.need_bytes[number])
            manager.release_use(group, self.system.single_backward)
        return list(self.log), device.now

    def _find(self, number):
        packed = self.packed.get(number)
        return packed and packed.storage

    def _save(self, i, array):
        profile, manager = self.profile, self.manager
        saved = self.packed[i] = manager.save(array, "f")
        self.numbers[saved.storage.sequence] = i
        for _ in profile.storages[i].uses:
            manager.add_use([saved])
        manager.fingerprint(saved)

    def _give_recipe(self, i):
        profile, manager, saved = self.profile, self.manager, self.packed[i]
        rerun = profile.steps[profile.makers[i]].rerun
        inputs = tuple(self.packed[n] for n in profile.sources[i])

        def run(arrays):
            manager.make_room(rerun.workspace_bytes + profile.storages[i].nbytes)
            array = self.device.array(profile.storages[i].nbytes)
            self.device.compute(rerun.seconds)
            return array

        recipe = Recipe(inputs, run, saved.layout, 0, (0,) * len(inputs), costly=True, trusted=True)
        manager.give_recipe(saved, recipe)


def as_recorded(profile):
    """Return a profile whose re-runs are as the engine has them: of one storage each, from saved ones."""
    steps = list(profile.steps)
    reruns = {}
    for i, sources in profile.sources.items():
        if profile.storages[i].uses and profile.makers[i] not in reruns:
            order, _ = chain(profile, [i], lambda n: bool(profile.storages[n].uses))
            passing = sum(
                profile.storages[n].nbytes for _, rerun in order for n in rerun.writes if n != i
            )
            workspace = passing + max(rerun.workspace_bytes for _, rerun in order)
            seconds = sum(rerun.seconds for _, rerun in order)
            reruns[profile.makers[i]] = Rerun(seconds, workspace, sources, (i,))
    for number, step in enumerate(steps):
        steps[number] = dataclasses.replace(step, rerun=reruns.get(number))
    return dataclasses.replace(profile, steps=tuple(steps))


def with_margin(system):
    """Return a system whose high watermark is the other's limit."""
    return dataclasses.replace(
        system, limit_bytes=math.ceil(system.limit_bytes / (1 - MARGIN)), margin=MARGIN
    )


def compare(profile, system, plan=None):
    """Compare engine and simulator on demand, or by a plan. Return their moves."""
    simulator = LoggedSimulator(profile, system, Planned(plan) if plan else OnDemand())
    timeline = simulator.run()
    engine = Engine(profile, system)
    engine.run(1 << 60)
    log, seconds = engine.run(system.limit_bytes, plan)
    for number, (ours, theirs) in enumerate(zip(log, simulator.log, strict=False)):
        assert ours == theirs, f"move {number} of the engine, and that of the simulator"
    assert len(log) == len(simulator.log)
    assert seconds == pytest.approx(timeline.seconds, rel=1e-9)
    return log


CASES = [*itertools.product(planner.NETS, planner.SYSTEMS, (0.7, 0.3, 0.1))]
QUICK = {("resnet50", "pcie4", 0.3), ("googlenet", "nvme", 0.1), ("unet3d", "disk", 0.3)}


@pytest.mark.parametrize(
    ("net", "name", "fraction"),
    [pytest.param(*case, marks=[pytest.mark.exhaustive] * (case not in QUICK)) for case in CASES],
)
@pytest.mark.parametrize("single_backward", [True, False])
def test_recorded_iterations_move_alike(net, name, fraction, single_backward):
    profile = as_recorded(planner.profile_of(net, name))
    system = with_margin(planner.system_of(profile, name, fraction))
    system = dataclasses.replace(system, single_backward=single_backward)
    fits = system.high_bytes >= profile.resident_peak(single_backward)
    for plan in (None, make_plan(profile, system)):
        assert compare(profile, system, plan) or fits


#: In the last two it matters that by a plan what is going out leaves before what is clean.
SEEDS = (*range(30), 117, 126)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_iterations_move_alike(seed):
    rng = random.Random(seed)
    profile = chain_of(rng, rng.randint(4, 30))
    floor, peak = profile.floor_bytes, profile.resident_peak(True)
    limit = max(2, round(floor + rng.choice((-0.5, 0.0, 0.1, 0.4, 0.8)) * (peak - floor)))
    rates = rng.choice((5.0, 20.0, 80.0)), rng.choice((5.0, 20.0, 80.0))
    tier = dataclasses.replace(
        planner.SYSTEMS[rng.choice(["pcie3", "disk"])].tier,
        out_bandwidth=rates[0],
        in_bandwidth=rates[1],
        latency=rng.choice((0.0, 0.5)),
    )
    system = with_margin(System(limit, (tier,), single_backward=rng.random() < 0.5))
    compare(profile, system)
    plan = make_plan(profile, system)
    compare(profile, system, plan)
    compare(profile, system, at_other_times(plan, rng))


def at_other_times(plan, rng):
    """Return a plan whose moves come too early or too late, and some not at all."""

    def other(moves):
        moved = ((max(0, step + rng.randint(-3, 3)), i) for step, i in moves if rng.random() < 0.9)
        return tuple(sorted(moved))

    return dataclasses.replace(
        plan,
        **{
            name: other(getattr(plan, name))
            for name in ("copy_out", "copy_in", "release", "discard")
        },
    )


def test_room_comes_from_the_dead_before_anything_else_goes():
    """What went out in their place would wait in the queue until their copies have ended."""
    device = SimulatedDevice(System(310, (Tier("host", 10.0, 10.0),)))
    manager = SwapManager(device, lambda: Settings(limit=310, min_bytes=1))
    saved = [manager.save(device.array(100), "f") for _ in range(3)]
    for one in saved:
        manager.add_use([one])
    manager._transfers.begin_out(saved[0].storage)
    manager.release_use(saved[:1], drop=True)
    assert device.used_bytes() == 300
    assert manager.make_room(80)
    assert (device.now, manager.counters.storages_out) == (10.0, 1)
