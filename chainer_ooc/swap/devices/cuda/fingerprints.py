"""Fingerprints of a GPU's memory: taken and compared on the GPU, so that the host never waits for one.

A fingerprint is a checksum in a slot of GPU memory. A comparison writes a flag on the GPU, which is copied to pinned
host memory. The order:

* A fingerprint is computed on the current stream, after what all computing streams have been given until then, and
  before what they are given later: they may write to the array, or have its memory.
* Its slot is used again as soon as nothing refers to the fingerprint. Then all comparisons that read it have been
  queued, and the next fingerprint comes after them.
* A flag is used again when the host has seen that its copy has ended.

The memory is not from CuPy's pool, nor the flags from the pinned memory of copies: both may be full.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from chainer_ooc.swap.devices.cuda.checksum import SLOT, SumKernel
from chainer_ooc.swap.devices.cuda.streams import CopyStreams
from chainer_ooc.swap.devices.protocol import Known, Verdict
from chainer_ooc.swap.tiers.pinned import PinnedSlab

__all__ = ["COMPARED", "COMPARISON", "PINNED", "Fingerprint", "Fingerprints"]

#: The number of slots that are allocated at a time.
SLOTS = 4096
#: The number of comparisons whose result may be unknown at a time.
FLAGS = 2048
#: The number of pairs that one kernel compares.
COMPARED = 8
COMPARISON = "chainer_ooc_compare"

_FLAG = ctypes.c_uint32
_FLAG_BYTES = ctypes.sizeof(_FLAG)
#: The pinned memory for the flags (bytes).
PINNED = FLAGS * _FLAG_BYTES

_PAIRS = ", ".join(
    f"const unsigned long long* a{i}, const unsigned long long* b{i}" for i in range(COMPARED)
)
_ARE_EQUAL = " && ".join(f"*a{i} == *b{i}" for i in range(COMPARED))
_CODE = f"""
extern "C" __global__ void {COMPARISON}({_PAIRS}, unsigned int* flag, unsigned int continues) {{
    const bool equal = {_ARE_EQUAL};
    *flag = equal && (!continues || *flag);
}}
"""


class Fingerprint:
    """The fingerprint of some bytes, in a slot that it owns.

    Attributes:
        slot: The address of the slot on the GPU.
        nbytes: The number of bytes of which it was taken.
    """

    __slots__ = ("_free", "nbytes", "slot")

    def __init__(self, slot: int, nbytes: int, free: list[int]) -> None:
        self.slot = slot
        self.nbytes = nbytes
        self._free = free

    def __del__(self) -> None:
        self._free.append(self.slot)


class _Comparison:
    """A verdict that the GPU is about to reach."""

    def __init__(
        self,
        streams: CopyStreams,
        flag: int,
        host: int,
        event: Any,
        retired: deque[tuple[int, Any]],
    ) -> None:
        self._streams = streams
        self._flag = flag
        self._host = host
        self._event = event
        self._retired = retired

    def done(self) -> bool:
        """Return, without waiting, whether the flag has arrived."""
        return self._streams.has_passed(self._event)

    def equal(self) -> bool:
        """Return whether all pairs were equal. Wait for the flag."""
        self._event.synchronize()
        return _FLAG.from_address(self._host).value == 1

    def __del__(self) -> None:
        self._retired.append((self._flag, self._event))


class Fingerprints:
    """Take and compare the fingerprints of one GPU, which is the current one in all calls.

    Args:
        cupy: CuPy, or a double of it.
        streams: The order of the GPU's streams.
        slab: Pinned memory of :data:`PINNED` bytes.
    """

    def __init__(self, cupy: Any, streams: CopyStreams, slab: PinnedSlab) -> None:
        self._cupy = cupy
        self._streams = streams
        self._slab = slab
        self._sum = SumKernel(cupy)
        self._compare = cupy.RawKernel(_CODE, COMPARISON)
        self._slots: list[Any] = []  # arrays
        self._free: list[int] = []  # the addresses of free slots
        self._spare = 0  # the slot of what is compared at once
        self._is_refused = False  # there was no memory for slots
        self._flags: Any = None  # an array, with one more flag for a result that the host waits for
        self._host = 0  # the address of the first flag in pinned memory
        self._free_flags: list[int] = []  # their numbers
        self._retired: deque[tuple[int, Any]] = deque()

    def take(self, address: int, nbytes: int) -> Fingerprint | None:
        """Begin to take the fingerprint of ``nbytes`` bytes; ``None`` if there is no memory for it."""
        if not self._free and not self._grow():
            return None
        fingerprint = Fingerprint(self._free.pop(), nbytes, self._free)
        self._begin_sum(address, nbytes, fingerprint.slot)
        return fingerprint

    def compare(self, pairs: Sequence[tuple[Fingerprint | None, Fingerprint | None]]) -> Verdict:
        """Begin to compare pairs of fingerprints. Without one of them, or without a flag, they count as not equal."""
        slots = []
        for first, second in pairs:
            if first is None or second is None or first.nbytes != second.nbytes:
                return Known(False)
            if first is not second:
                slots += [first.slot, second.slot]
        return self._begin_compare(slots) if slots else Known(True)

    def matches(self, fingerprint: Fingerprint, address: int, nbytes: int) -> Verdict:
        """Begin to find out whether bytes have a fingerprint. Without a flag the host waits for that."""
        if fingerprint.nbytes != nbytes:
            return Known(False)
        self._begin_sum(address, nbytes, self._spare)
        return self._begin_compare([fingerprint.slot, self._spare], must=True)

    def close(self) -> None:
        """Free the pinned memory. The verdicts of all comparisons must be dead."""
        self._slab.close()

    def after_fork(self) -> None:
        """Forget the pinned memory in a forked child, which does not have it."""
        self._slab.after_fork()

    def _begin_sum(self, address: int, nbytes: int, slot: int) -> None:
        # The slot was taken before: what used it last is among what this comes after.
        self._streams.order_computing()
        self._sum(address, nbytes, slot)
        self._streams.order_computing()

    def _begin_compare(self, slots: list[int], must: bool = False) -> Verdict:
        number = self._take_flag()
        if number is None and not must:
            return Known(False)
        place = FLAGS if number is None else number
        flag = self._flags.data.ptr + place * _FLAG_BYTES
        self._streams.order_computing()  # the current stream may be new
        for start in range(0, len(slots), 2 * COMPARED):
            some = slots[start : start + 2 * COMPARED]
            some += some[:1] * (2 * COMPARED - len(some))  # a slot is equal to itself
            arguments = (*map(np.uint64, some), np.uint64(flag), np.uint32(start > 0))
            self._compare((1,), (1,), arguments)
        if number is not None:
            host = self._host + number * _FLAG_BYTES
            try:
                event = self._streams.copy_flag(host, flag, _FLAG_BYTES)
                return _Comparison(self._streams, number, host, event, self._retired)
            except OSError:  # the driver refuses
                self._free_flags.append(number)
        return Known(must and self._cupy.asnumpy(self._flags)[place] == 1)

    def _take_flag(self) -> int | None:
        while self._retired and self._streams.has_passed(self._retired[0][1]):
            self._free_flags.append(self._retired.popleft()[0])
        return self._free_flags.pop() if self._free_flags else None

    def _grow(self) -> bool:
        """Allocate more slots, and with the first the flags. Return whether there was memory."""
        if self._is_refused:
            return False
        try:
            if self._flags is None:
                flags = self._allocate(FLAGS + 1, np.uint32)
            slots = self._allocate(SLOTS * SLOT // 8, np.uint64)
        except (MemoryError, self._cupy.cuda.runtime.CUDARuntimeError):
            self._is_refused = True
            return False
        slots.fill(0)
        self._slots.append(slots)
        addresses = [slots.data.ptr + i * SLOT for i in range(SLOTS)]
        if self._flags is None:
            self._flags, self._spare = flags, addresses.pop()
            self._host = self._slab.allocate(PINNED) or 0
            self._free_flags = [*range(FLAGS if self._host else 0)]
        self._free += addresses
        return True

    def _allocate(self, count: int, dtype: type) -> Any:
        memory = self._cupy.cuda.Memory(count * np.dtype(dtype).itemsize)
        return self._cupy.ndarray((count,), dtype, self._cupy.cuda.MemoryPointer(memory, 0))
