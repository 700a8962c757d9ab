"""Thousands of iterations leave nothing behind: host blocks, file blocks, objects, threads, descriptors, memory."""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import sys
import threading

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import runtime, state
from chainer_ooc.planning import plan_cache
from chainer_ooc.swap.devices.ram import RamDevice, native
from chainer_ooc.swap.devices.ram import device as ram_device
from tests.doubles.adopted_arrays import simulated_gpu

KIB, MIB = 1 << 10, 1 << 20
OTHER = 64 * MIB
ITERATIONS = [200, pytest.param(10_000, marks=pytest.mark.exhaustive)]


class Failing(chainer.FunctionHook):
    """Fails in the midst of backward."""

    name = "Failing"

    def backward_postprocess(self, function, in_data, out_grad):
        if function.label == "ReLU":
            raise KeyError("on purpose")


class Training:
    """A small network that is used in all the ways that graphs end."""

    def __init__(self):
        np.random.seed(0)
        self.links = [L.Linear(64, 64) for _ in range(2)]
        self.model = chainer.Sequential(*self.links)
        self.optimizer = chainer.optimizers.SGD(1e-6).setup(self.model)
        self.x = np.random.standard_normal((48, 64)).astype("f")

    def loss(self, rows):
        h = self.x[:rows]
        for link in self.links:
            h = F.relu(link(h)) + F.dropout(h, 0.1)
        return F.sum(F.square(h))

    def step(self, number):
        rows = 16 + 8 * (number % 4)
        loss = self.loss(rows)
        self.model.cleargrads()
        if number % 5 == 1:
            return  # a prediction
        if number % 7 == 2:
            with contextlib.suppress(KeyError), Failing():
                loss.backward()
            return
        other = self.loss(16) if number % 11 == 3 else None  # two graphs at once
        loss.backward()
        self.optimizer.update()
        if number % 13 == 4:
            loss.backward()  # again
        if other is not None:
            other.backward()


class CountedRam(RamDevice):
    """RAM in which the storages count against the limit, beside something else."""

    other = OTHER

    def used_bytes(self):
        transfers = self.manager._transfers
        return self.other + sum(s.nbytes for s in transfers.everything() if s.owner is not None)


@contextlib.contextmanager
def small_arrays_unannounced():
    """Have nobody ask for room for what a small program allocates: doubles of memory do not count that."""

    def announce(nbytes, known):
        if native.allocator is not None:
            pool = ram_device._pool_of_process()
            native.allocator.configure(state._before_allocation, nbytes, pool, state._POOLED)
            state.process.announced = known

    before = state.process.announced or 1 << 20
    announce(1 << 20, 0)  # what is asked for later is never less
    yield
    announce(before, before)


@contextlib.contextmanager
def on_ram(directory, monkeypatch, other=OTHER):
    device = CountedRam(directory)
    device.other = other
    device.manager = runtime.make_manager(device)
    monkeypatch.setitem(state.process.managers, "ram", device.manager)
    with small_arrays_unannounced():
        yield lambda: {"file": device.file.allocated, "its size": device.file.size}
    device.close()


@contextlib.contextmanager
def on_gpu(directory, monkeypatch):
    monkeypatch.setitem(state.process.managers, "ram", None)
    with simulated_gpu(1, directory, 512 * KIB, OTHER) as machine:
        device = state.process.managers["ram"].device

        def sizes():
            if (block := device.host.allocate(1)) is not None:  # and take back what was retired
                block.free()
            return {
                "host": device.host.slab.allocated,
                "its size": sum(machine.pinned.values()),
                "file": device.disk.file.allocated,
                "its blocks": device.disk.file.size,
                "pool": machine.adopted_bytes() - OTHER,
                "waited for": len(device.streams._compute),
            }

        yield sizes
    device.close()


def census(manager):
    """What there is of everything that must not grow."""
    manager.settle()
    gc.collect()
    transfers = manager._transfers
    return collections.Counter(
        {
            "storages": len(manager.storages()),
            "bytes of storages": sum(transfers.nbytes.values()),
            "owners": len(transfers._by_owner),
            "graves": len(transfers.deferred_frees) + len(transfers.dead),
            "leaving": len(transfers.leaving),
            "threads": threading.active_count(),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "objects": len(gc.get_objects()),
            "blocks of Python": sys.getallocatedblocks(),
        }
    )


#: What comes and goes with caches of the interpreter and of NumPy.
NOISE = collections.defaultdict(int, {"objects": 300, "blocks of Python": 3000, "leaving": 60})


@pytest.mark.parametrize("iterations", ITERATIONS)
@pytest.mark.parametrize("device", [on_ram, on_gpu], ids=["RAM", "simulated GPU"])
def test_nothing_grows(device, iterations, tmp_path, monkeypatch):
    training = Training()
    monkeypatch.setattr(plan_cache, "_MOST", 2)  # as many plans as that
    with device(str(tmp_path), monkeypatch) as sizes:
        manager = state.process.managers["ram"]
        before = manager.counters.bytes_in
        with chainer_ooc.out_of_core_mode(limit=OTHER + 64 * KIB, min_bytes=1):
            for number in range(80):
                training.step(number)
            first = {**census(manager), **sizes()}
            for number in range(iterations):
                training.step(number)
            last = {**census(manager), **sizes()}
        grown = {
            name: (first[name], last[name])
            for name in last
            if last[name] > first[name] + NOISE[name]
        }
        assert not grown
        assert manager.counters.bytes_in - before > iterations * 4 * KIB
        assert manager.counters.bytes_out > iterations * 4 * KIB
        assert last["storages"] == last["file"] == 0
