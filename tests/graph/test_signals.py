"""Handlers of signals that raise at any moment of an iteration leave the engine and its plans whole."""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import random
import signal
import time
import types

import chainer
import chainer.functions as F
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.graph.iteration import IterationTracker, tracker_of
from chainer_ooc.planning import plan_cache, search
from chainer_ooc.planning.executor import PlanExecutor
from chainer_ooc.planning.plan_cache import PlanCache
from chainer_ooc.planning.recorder import Recorder
from chainer_ooc.swap.prefetch import UseOrder
from chainer_ooc.swap.storage import Storage
from chainer_ooc.swap.transfers import Transfers
from chainer_ooc.testing import assert_same_bits
from tests.graph.test_iteration import OTHER, Training
from tests.swap.test_leaks import on_ram

KIB = 1 << 10
MOST = 8  #: methods of a class

pytestmark = pytest.mark.extension


class Interrupt(BaseException):
    """What the handler raises."""


PLANNED, ON_DEMAND = {"discard_all": True}, {"plan": False}


@pytest.fixture
def manager(request, tmp_path, monkeypatch):
    """Turn out-of-core mode on, on a double of memory that is short. Give the manager."""
    monkeypatch.setattr(
        plan_cache, "_WORSE", float("inf")
    )  # on a busy machine any iteration may be slow
    monkeypatch.setattr(search, "EFFORT", 2000)
    gc.collect()
    with (
        on_ram(str(tmp_path), monkeypatch, OTHER),
        chainer_ooc.out_of_core_mode(limit=OTHER + 200 * KIB, min_bytes=1, **request.param),
    ):
        yield state.process.managers["ram"]


@pytest.fixture
def handled():
    """Handle a signal and the alarm clock by noting and raising; give the notes."""
    notes = []

    def handle(number, frame):
        notes.append(number)
        raise Interrupt(number)

    before = [signal.signal(number, handle) for number in (signal.SIGUSR1, signal.SIGALRM)]
    yield notes
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in zip((signal.SIGUSR1, signal.SIGALRM), before, strict=True):
        signal.signal(number, handler)


class Gradients:
    """The gradients of a small net: the same whenever they are computed."""

    def __init__(self):
        training = Training()
        self.net, (self.x, self.t) = training.net, training.batch(side=16)

    def __call__(self):
        np.random.seed(2)
        loss = F.softmax_cross_entropy(self.net(self.x, 3), self.t)
        self.net.cleargrads()
        loss.backward()
        return [loss.array, *[p.grad for p in self.net.params() if p.grad is not None]]


class Calls:
    """Counts the calls of a class's methods; a context manager.

    Args:
        kind: The class.
        name: The method in which a signal is sent, in the midst of what called it; ``None``: in none.
        times: At its so-manieth call.
        late: After what it does, not before.
    """

    def __init__(self, kind, name=None, times=0, late=False):
        self.kind, self.chosen = kind, (name, times, late)
        self.counts = collections.Counter()
        self.stock = {n: f for n, f in vars(kind).items() if isinstance(f, types.FunctionType)}

    def _wrapped(self, name, function):
        def wrapper(*args, **options):
            self.counts[name] += 1
            number = self.counts[name]
            if self.chosen == (name, number, False):
                os.kill(os.getpid(), signal.SIGUSR1)
            result = function(*args, **options)
            if self.chosen == (name, number, True):
                os.kill(os.getpid(), signal.SIGUSR1)
            return result

        return wrapper

    def __enter__(self):
        for name, function in self.stock.items():
            setattr(self.kind, name, self._wrapped(name, function))
        return self.counts

    def __exit__(self, *error):
        for name, function in self.stock.items():
            setattr(self.kind, name, function)


@contextlib.contextmanager
def after(seconds):
    """Send a signal after so long."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def check(manager, gradients):
    """Check that nothing is held that was not, and that what is computed next is what stock Chainer computes."""
    assert not manager._lock._is_owned()
    assert not tracker_of(manager)._lock._is_owned()
    assert state.local.running is None
    assert len(state.local.stack) == 1
    assert_same_bits(gradients(), gradients.expected)


def interrupted(run, moment, handled):
    """Run something; tell whether it was interrupted."""
    config = dict(vars(chainer.config._local))
    handled.clear()
    arrived = False
    try:
        with moment:
            run()
    except Interrupt:
        arrived = True
    assert arrived == bool(handled)
    # Contexts that were interrupted leave their settings behind, as on stock Chainer.
    vars(chainer.config._local).clear()
    vars(chainer.config._local).update(config)
    return arrived


@pytest.fixture
def gradients(manager):
    """Compute gradients until the iterations follow a plan, and look at what is left in the end."""
    found = Gradients()
    with chainer_ooc.out_of_core_mode(False):
        found.expected = found()
    plans = manager.settings().plan
    for _ in range(4):
        assert_same_bits(found(), found.expected)
    assert manager.follows_plan == plans
    yield found
    for _ in range(4):
        check(manager, found)
    assert manager.follows_plan == plans
    found.net.cleargrads()
    gc.collect()
    manager.settle()
    assert (manager.storages(), manager.device.file.allocated) == ([], 0)


@pytest.mark.parametrize(
    ("manager", "kind"),
    [
        *((PLANNED, kind) for kind in (IterationTracker, Recorder, PlanCache, PlanExecutor)),
        *((ON_DEMAND, kind) for kind in (Transfers, Storage, UseOrder)),
    ],
    indirect=["manager"],
)
def test_a_signal_in_the_midst_of_the_engine_leaves_it_whole(kind, manager, gradients, handled):
    with Calls(kind) as counts:
        gradients()
    moments = random.Random(0)
    for name in moments.sample(sorted(counts), min(len(counts), MOST)):
        for late in (False, True):
            moment = Calls(kind, name, moments.randint(1, counts[name]), late)
            interrupted(gradients, moment, handled)
            check(manager, gradients)


@pytest.mark.parametrize("manager", [PLANNED, ON_DEMAND], indirect=True)
def test_a_signal_at_any_time_leaves_the_engine_whole(manager, gradients, handled):
    start = time.perf_counter()
    gradients()
    seconds = time.perf_counter() - start
    moments = random.Random(0)
    for _ in range(12):
        interrupted(gradients, after(moments.uniform(1e-5, seconds)), handled)
        check(manager, gradients)
