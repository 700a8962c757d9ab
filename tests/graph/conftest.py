"""Fixtures of the tests of the graph."""

from __future__ import annotations

import gc

import pytest

import chainer_ooc
from chainer_ooc import state


@pytest.fixture
def everything_out():
    """Turn a mode on that moves whatever nobody holds out at once. Returns the manager."""
    gc.collect()
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1):
        yield state.managers()[0]


@pytest.fixture
def bytes_in_use():
    """Return a function that returns the bytes of living storages, and those allocated in the file."""

    def measure():
        gc.collect()
        (manager,) = state.managers()
        manager.settle()
        resident = sum(s.nbytes for s in manager.storages() if s.owner is not None)
        return resident, manager.device.file.allocated

    gc.collect()
    return measure
