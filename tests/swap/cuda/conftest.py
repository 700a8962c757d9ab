"""A CUDA device on a simulated GPU, and a manager of it."""

from __future__ import annotations

import numpy as np
import pytest

from chainer_ooc.settings import Settings
from chainer_ooc.swap.cupy_allocator import CupyAllocator
from chainer_ooc.swap.devices.cuda import arenas as arenas_module
from chainer_ooc.swap.devices.cuda.device import CudaDevice
from chainer_ooc.swap.devices.ram import native
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.storage import State
from tests.doubles.adopted_arrays import storage_at
from tests.doubles.simulated_arenas import Arenas
from tests.doubles.simulated_cuda import SimulatedCuda

#: The size of arrays (bytes): the allocator asks for room for those of this size and more.
UNIT = 64 << 10


def states(saved):
    """Return the states of the storages of saved arrays."""
    return [one.storage.state for one in saved]


def values(saved):
    """Return the first element of each saved array."""
    return [float(one.get().get()[0]) for one in saved]


def give_up(rig, saved):
    """Evict an array as a plan does, and wait for the verdict if it is to be discarded. Return the bytes freed."""
    freed = rig.manager._evictor.give_up(saved.storage)
    if saved.storage.state is State.CHECKING:
        freed += rig.manager._transfers.end_discard(saved.storage)
    return freed


def host_bytes(rig):
    """Return what is in use when all copies have ended, and what was retired is taken back."""
    rig.cupy.synchronize()
    rig.device.host.allocate(1).free()
    return rig.device.host.slab.allocated


class Rig:
    """A simulated GPU, its device, manager and allocator hook."""

    def __init__(
        self, directory, seed=0, host_limit=None, limit=None, unit=UNIT, arenas=False, **given
    ):
        self.unit = unit
        limit = 8 * unit if limit is None else limit
        host_limit = 16 * unit if host_limit is None else host_limit
        self.cupy = SimulatedCuda(seed, **{"total": 32 * unit, **given})
        self.settings = Settings(limit=limit, min_bytes=1)
        self.allocator = CupyAllocator(
            self.cupy, lambda device_id: self.manager, lambda: "the test", lambda nbytes: None
        )
        self.manager = None
        if arenas:
            self.cupy.arenas = Arenas(self.cupy)
            self.allocator.install()
            self.allocator.arenas._make(0, 0)
        self.device = CudaDevice(self.cupy, 0, str(directory), host_limit, pool=self.allocator.pool)
        self.cupy.calls.clear()  # the host waits once, to relate the clocks
        self.manager = SwapManager(self.device, lambda: self.settings, is_read_only=lambda: True)
        native.ask_again()  # what the calling thread was granted is of another rig
        self.cupy.label = lambda address: storage_at(self.manager, address, lambda owner: owner.ptr)
        self.pool = self.allocator.pool()
        self.pool.set_limit(limit)

    def array(self, value, nbytes=None):
        array = self.cupy.ndarray(((nbytes or self.unit) // 4,), np.float32)
        array.fill(value)
        return array

    def save(self, value, nbytes=None):
        saved = self.manager.save(self.array(value, nbytes), f"f{value}")
        self.manager.add_use([saved])
        return saved

    def owner(self, value, nbytes=None):
        """Return memory that holds a value and that nobody else holds."""
        return self.array(value, nbytes).data.mem

    def close(self):
        self.manager.settle()
        self.cupy.check()
        self.device.close()


#: For tests of what only CuPy's pool does.
on_pool = pytest.mark.parametrize("arenas", ["pool"], indirect=True)


@pytest.fixture(params=["pool", "arenas"])
def arenas(request, monkeypatch):
    """Whether memory is from page arenas, in the place of CuPy's pool."""
    if request.param == "pool":
        yield False
        return
    if native.allocator is None:
        pytest.skip(f"needs the C extension: {native.HOW_TO_GET_IT}")
    made = []

    def current_stream():
        return made[-1].current_stream

    monkeypatch.setattr(arenas_module, "_current_stream", current_stream)
    monkeypatch.setattr(arenas_module, "_LEAST_TORN", 0)
    monkeypatch.setattr(
        Arenas,
        "__init__",
        lambda self, machine, start=Arenas.__init__: (made.append(self), start(self, machine))[1],
    )
    yield True
    native.allocator.set_driver(None)


@pytest.fixture
def make_rig(tmp_path, arenas):
    """Return a function that makes a rig, closed and checked for races at the end."""
    rigs = []

    def make(**given):
        rigs.append(Rig(tmp_path, **{"arenas": arenas, **given}))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture(params=range(4))
def rig(request, make_rig):
    """A rig, under several schedules."""
    return make_rig(seed=request.param)
