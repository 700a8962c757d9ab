"""Plans that run functions again: the bits of stock Chainer, whoever gets an array and writes to it, and when."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
from types import SimpleNamespace

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.graph import recompute
from chainer_ooc.graph.iteration import Guarded, guarded_by, tracker_of
from chainer_ooc.planning import plan_cache, search
from chainer_ooc.planning.plan import Choice
from chainer_ooc.planning.steps import FORWARD
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.recipe import PrivateContent
from chainer_ooc.testing import assert_same_bits
from tests.swap.test_leaks import on_ram

KIB, MIB = 1 << 10, 1 << 20
#: What counts as used by something else: memory is always past the low-water mark.
OTHER = 8 * MIB
BLOCKS = 4
#: The iteration in which a program does first what it does; a plan has been made long before.
FIRST = 4

pytestmark = pytest.mark.extension


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """Have copies count as slow: plans run functions again instead."""
    monkeypatch.setattr(SwapManager, "bandwidths", lambda self, otherwise: (1e6, 1e6))
    monkeypatch.setattr(plan_cache, "_WORSE", float("inf"))
    monkeypatch.setattr(search, "EFFORT", 1000)
    gc.collect()
    with on_ram(str(tmp_path), monkeypatch, OTHER):
        yield state.process.managers["ram"]


def train(act, iterations=7):
    """Train a network; ``act`` gets the iteration, the place and the variable there. Return all bits."""
    np.random.seed(0)
    blocks = chainer.ChainList(*[L.Convolution2D(8, 8, 3, pad=1) for _ in range(BLOCKS)])
    norms = chainer.ChainList(*[L.BatchNormalization(8) for _ in range(BLOCKS)])
    model = chainer.Sequential(blocks, norms, L.Linear(8, 3))
    optimizer = chainer.optimizers.MomentumSGD(0.01).setup(model)
    losses = []
    for n in range(iterations):

        def at(place, v, n=n):
            other = act(n, place, v)
            return v if other is None else other

        h = chainer.Variable(np.random.rand(2, 8, 20, 20).astype("f"))
        for i in range(BLOCKS):
            r = at(f"relu {i}", F.relu(at(f"norm {i}", norms[i](at(f"conv {i}", blocks[i](h))))))
            h = at(f"drop {i}", F.dropout(h, 0.2))
            h = r * at(f"tanh {i}", F.tanh(h * 0.7)) + r
            del r
        loss = F.softmax_cross_entropy(model[2](F.average(h, axis=(2, 3))), np.array([0, 2], "i"))
        del h
        model.cleargrads()
        loss.backward()
        optimizer.update()
        losses.append(loss.array.copy())
        del loss
    params = [p for _, p in sorted(model.namedparams())]
    return losses, [p.array for p in params], [p.grad for p in params], [m.avg_mean for m in norms]


def both(manager, make, kib=400):
    """Train on stock Chainer and by plans that run functions again; compare the bits.

    Args:
        manager: The manager.
        make: Returns the ``act`` of a training.
        kib: How much of what is saved may be in memory (KiB).
    """
    expected = train(make())
    with chainer_ooc.out_of_core_mode(limit=OTHER + kib * KIB, min_bytes=1):
        actual = train(make())
    entries = tracker_of(manager).plan_cache.entries.values()
    assert any(entry.plan.chosen(Choice.RECOMPUTE) for entry in entries)
    assert manager.counters.storages_remade
    assert_same_bits(actual, expected)
    gc.collect()
    manager.settle()
    assert not manager.storages()


def halve(array):
    array *= np.float32(0.5)


def mode(**settings):
    on = chainer_ooc.is_enabled()
    return chainer_ooc.out_of_core_mode(**settings) if on else contextlib.nullcontext()


class After(chainer.FunctionHook):
    """Calls something after each function that runs forward."""

    name = "after"

    def __init__(self, call):
        self.call = call

    def forward_postprocess(self, function, in_data):
        self.call(in_data)


@contextlib.contextmanager
def on_floating_point_errors(call):
    with np.errstate(all="call"), np.errstate(call=lambda kind, flag: call()):
        yield


def leave_the_plan(v):
    F.sqrt(F.absolute(v))


def of_an_input_by_a_hook(v, kept):
    with After(lambda in_data: halve(in_data[0])):
        F.sum(v)


def of_another_variable_by_a_hook(v, kept):
    with After(lambda in_data: halve(kept.pop().array) if kept else None):
        F.sum(v)


def of_another_node_by_a_hook(v, kept):
    with After(
        lambda in_data: (
            halve(kept.pop().creator_node.outputs[0]().get_variable().data) if kept else None
        )
    ):
        F.sum(v)


def of_another_variable_by_a_callback(v, kept):
    with on_floating_point_errors(lambda: halve(kept.pop().array) if kept else None):
        F.exp(v * 1e6)


def of_a_view(v, kept):
    halve(F.reshape(v, (-1,)).array)


def of_a_view_of_another(v, kept):
    halve(F.swapaxes(kept.pop(), 0, 1).array)


def of_the_same_array(v, kept):
    halve(F.identity(v).array)


def of_a_copied_variable(v, kept):
    halve(copy.copy(v).array)


def of_a_part(v, kept):
    halve(F.split_axis(v, 2, 1)[1].array)


def of_a_view_without_graph(v, kept):
    with chainer.no_backprop_mode():
        halve(F.reshape(v, (-1,)).array)


def of_a_view_without_plan(v, kept):
    with mode(plan=False):
        halve(F.reshape(v, (-1,)).array)


def of_a_view_out_of_core_only_there(v, kept):
    with mode(enabled=False):
        halve(F.reshape(v, (-1,)).array)


EDITS = [
    of_an_input_by_a_hook,
    of_another_variable_by_a_hook,
    of_another_node_by_a_hook,
    of_another_variable_by_a_callback,
    of_a_view,
    of_a_view_of_another,
    of_the_same_array,
    of_a_copied_variable,
    of_a_part,
    of_a_view_without_graph,
    of_a_view_without_plan,
    of_a_view_out_of_core_only_there,
]


@pytest.mark.parametrize("leaves", [False, True], ids=["by the plan", "the plan is left"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edits(manager, edit, leaves):
    """In all iterations from one on: what differs from the plan has a plan itself soon."""

    def make():
        kept = []

        def act(n, place, v):
            if n >= FIRST and place == "relu 1":
                kept.append(v)
            if n >= FIRST and place == "relu 2":
                if leaves:
                    leave_the_plan(v)
                edit(v, kept)
                kept.clear()

        return act

    both(manager, make)


@pytest.mark.parametrize("seed", range(8))
def test_edits_in_turns(manager, seed):
    def make():
        rng, kept = random.Random(seed), []
        turns = [
            (
                rng.randint(2, 6),
                f"{rng.choice(['conv', 'norm', 'relu', 'tanh'])} {i}",
                rng.choice(EDITS),
            )
            for i in (1, 1, 2, 3)
        ]

        def act(n, place, v):
            kept.append(v)
            for turn, where, edit in turns:
                if turn == n and where == place:
                    edit(v, kept[-4:-2])
            del kept[:-4]

        return act

    both(manager, make)


def test_what_only_functions_of_chainer_have_had_is_not_read_for_fingerprints(manager, monkeypatch):
    made = []
    init = PrivateContent.__init__
    monkeypatch.setattr(
        PrivateContent, "__init__", lambda self, *args: made.append(self) or init(self, *args)
    )
    both(manager, lambda: lambda n, place, v: None)
    needed = [one for one in made if one.is_needed]
    assert len(needed) > 20
    assert sum(one.fingerprint is not None for one in needed) < len(needed) / 10


def test_only_what_a_plan_asks_for_is_noted(manager, monkeypatch):
    """By plan it matters who gets what is discarded, or read to make that again."""
    noted = {}
    note_private = recompute.note_private

    def note(func, inputs, outputs, fresh):
        if fresh:
            iteration, step = func.__dict__[recompute.STEP]
            noted.setdefault(iteration, set()).add(step)
        return note_private(func, inputs, outputs, fresh)

    monkeypatch.setattr(recompute, "note_private", note)
    both(manager, lambda: lambda n, place, v: None, kib=480)
    (entry,) = tracker_of(manager).plan_cache.entries.values()
    profile, plan = entry.profile, entry.plan
    dropped = {i for _, i in plan.discard}
    reads = {i for d in dropped for i in profile.steps[profile.makers[d]].rerun.reads}
    made = {profile.storages[i].producer for i in dropped | reads}
    run = {n for d in dropped for n in profile.steps[profile.makers[d]].rerun.steps}
    last = noted[max(noted)]
    assert made <= last <= made | run | {profile.makers[d] for d in dropped}
    forward = {n for n, step in enumerate(profile.steps) if step.phase == FORWARD}
    assert last < forward


def test_who_gets_what_only_moves_does_not_matter():
    """The first of three functions runs again and reads what the second makes; the result of the third moves."""
    rerun = SimpleNamespace(steps=(), reads=(1,))
    profile = SimpleNamespace(
        makers={0: 0},
        steps=[SimpleNamespace(rerun=rerun), *[SimpleNamespace(rerun=None)] * 2],
        storages=[SimpleNamespace(producer=n) for n in range(3)],
    )
    executor = SimpleNamespace(discarded=frozenset({0}), moved=frozenset({0, 2}))
    guarded = guarded_by(
        executor, SimpleNamespace(profile=profile, saved={n: (n,) for n in range(3)})
    )
    assert guarded == Guarded(make={0, 1}, run={0}, save={0}, moves={0, 1, 2})
