"""A device whose clock and links are those of the simulator, under the real engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from chainer_ooc.planning.links import Link, SimulatedTransfer
from chainer_ooc.planning.system import System
from chainer_ooc.swap.devices.protocol import Known, Layout, Location, Span

__all__ = ["SimulatedArray", "SimulatedDevice"]

_BYTE = np.dtype(np.uint8)


class Memory:
    """An allocation: it counts as used from its begin until nothing refers to it."""

    def __init__(self, device: SimulatedDevice, nbytes: int) -> None:
        self.device = device
        self.nbytes = nbytes
        device.resident += nbytes

    def __del__(self) -> None:
        self.device.resident -= self.nbytes


class SimulatedArray:
    """An array without elements, that fills its memory."""

    dtype, strides = _BYTE, (1,)

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.shape = (memory.nbytes,)
        self.flags = np.empty(0, _BYTE).flags


class Block:
    """A copy outside of memory."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def free(self) -> None:
        """Do nothing: there is room."""


class Transfer:
    """A running copy. One that goes out holds its memory until it has ended."""

    def __init__(
        self,
        device: SimulatedDevice,
        copy: Block,
        simulated: SimulatedTransfer,
        memory: Memory | None,
    ) -> None:
        self.copy = copy
        self.simulated = simulated
        self.memory = memory
        self._device = device

    def done(self) -> bool:
        self._device.pass_time()
        return self.simulated.end >= 0

    def join(self) -> None:
        if not self.done():
            self._device.now = max(self._device.now, self.simulated.link.wait(self.simulated))
            self._device.pass_time()

    wait = join

    def span(self) -> Span | None:
        return self.simulated.start, self.simulated.end

    def arrival(self) -> None:
        return None


class SimulatedDevice:
    """Memory as large as wanted, and one link.

    Args:
        system: The link is that of its only tier.

    Attributes:
        now: The time (seconds).
        other: The bytes in use besides the arrays.
        resident: The bytes of all arrays.
    """

    name, stand_in, asks_for_room, runs_behind = "simulated", None, True, False

    @staticmethod
    def may_move() -> bool:
        return True

    def __init__(self, system: System) -> None:
        self.other = self.resident = 0
        self._system = system
        self.begin()

    def begin(self) -> None:
        """Begin at 0 seconds, with no copy under way."""
        (tier,) = self._system.tiers
        self.now = 0.0
        self._link = Link(tier)
        self._running: list[Transfer] = []

    def array(self, nbytes: int) -> SimulatedArray:
        """Return a new array."""
        return SimulatedArray(Memory(self, nbytes))

    def compute(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        self.pass_time()

    def pass_time(self) -> None:
        """Let the memory go whose copies out have ended by now."""
        self._link.advance(self.now)
        for transfer in self._running:
            if transfer.simulated.end >= 0:
                transfer.memory = None
        self._running = [one for one in self._running if one.memory is not None]

    def locate(self, array: SimulatedArray) -> Location:
        return Location(array.memory, array.memory.nbytes, 0, 0)

    def view(self, owner: Memory, origin: int, layout: Layout) -> SimulatedArray:
        return SimulatedArray(owner)

    def copy_out(self, owner: Memory, origin: int, nbytes: int) -> Transfer:
        copy = self._link.begin(0, nbytes, False, self.now)
        transfer = Transfer(self, Block(nbytes), copy, owner)
        self._running.append(transfer)
        return transfer

    def copy_in(self, copy: Block, nbytes: int, page_offset: int) -> tuple[Memory, int, Transfer]:
        simulated = self._link.begin(0, nbytes, True, self.now)
        return Memory(self, nbytes), 0, Transfer(self, copy, simulated, None)

    def take_buffer(self, array: SimulatedArray, *layout: Any) -> tuple[Memory, int]:
        return array.memory, 0

    def fingerprint(self, owner: Memory, origin: int, nbytes: int) -> int:
        return 0

    def compare(self, pairs: Sequence[tuple[int, int]]) -> Known:
        return Known(True)

    def matches(self, fingerprint: int, owner: Memory, origin: int, nbytes: int) -> Known:
        return Known(True)

    def before_release(self) -> None:
        """Do nothing: nothing is put off."""

    def used_bytes(self) -> int:
        self.pass_time()
        return self.other + self.resident

    def set_cached_limit(self, nbytes: int) -> None:
        """Do nothing: nothing is cached."""

    def trim(self, desperate: bool = False) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
