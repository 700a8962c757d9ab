"""The ledger of a step without data: each allocation it would make, and the work it would do."""

from __future__ import annotations

import dataclasses
import mmap
import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chainer_ooc.swap.manager import SwapManager

__all__ = ["BETWEEN", "Ledger", "Memory", "Segment", "active_ledger", "running"]

#: The phase between two functions.
BETWEEN = "between"
#: Address space is taken, memory is not: its pages are never touched, or read as zeros.
_NORESERVE = getattr(
    mmap, "MAP_NORESERVE", 0x4000
)  # Linux's, on all processors but MIPS; in Python since 3.12
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
#: Arrays above this size (bytes) get new pages from the system each time: the most that glibc's malloc keeps.
_MAPPED = 32 << 20


class _Running(threading.local):
    ledger: Ledger | None = None


running = _Running()


def active_ledger() -> Ledger | None:
    """Return the ledger of the step without data that the calling thread runs."""
    return running.ledger


class Memory(mmap.mmap):
    """One allocation: addresses without memory.

    Attributes:
        ledger: The ledger that counts it.
        number: The place in the order of allocation.
        nbytes: The size (bytes).
        segment: The number of the segment that allocated it.
    """

    ledger: Ledger
    number: int
    nbytes: int
    segment: int

    def __del__(self) -> None:
        self.ledger.release(self)


@dataclasses.dataclass
class Segment:
    """A part of the step: one function forward or backward, or the time between two of them.

    Attributes:
        name: The function's label; ``""`` between functions.
        phase: ``"forward"``, ``"backward"`` or ``"between"``.
        work: NumPy's work by kind: elements or bytes touched, see :mod:`.calibration`.
        gemms: Matrix products: (m, n, k, item size), and their number.
        flops: The floating-point operations of its matrix products and convolutions.
        in_bytes: The bytes of the function's inputs, parameters included.
        out_bytes: The bytes of its outputs.
    """

    name: str
    phase: str
    work: Counter[str] = dataclasses.field(default_factory=Counter)
    gemms: Counter[tuple[int, int, int, int]] = dataclasses.field(default_factory=Counter)
    flops: float = 0.0
    in_bytes: int = 0
    out_bytes: int = 0


class Ledger:
    """Count the allocations and the work of a step without data.

    Attributes:
        live_bytes: The bytes that are allocated now.
        peak_bytes: The most bytes that were ever allocated.
        high_bytes: The most bytes that were allocated since it was last set.
        manager: The manager of the arrays that it counts, if the engine runs on them.
        events: (number, bytes) of each allocation, (number, -bytes) of each release.
        segments: The segments so far. The last one is running.
        notes: The assumptions about values that are not computed.
    """

    def __init__(self) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0
        self.high_bytes = 0
        self.manager: SwapManager | None = None
        self.events: list[tuple[int, int]] = []
        self.segments: list[Segment] = []
        self.notes: dict[str, None] = {}
        self._count = 0
        self.begin("", BETWEEN)

    @property
    def segment(self) -> Segment:
        """The running segment."""
        return self.segments[-1]

    def begin(self, name: str, phase: str) -> Segment:
        """Begin a segment."""
        self.segments.append(Segment(name, phase))
        return self.segments[-1]

    def survivors(self, first: int) -> int:
        """Return the size (bytes) of what was allocated from event ``first`` on, and lives."""
        living: dict[int, int] = {}
        for number, nbytes in self.events[first:]:
            if nbytes > 0:
                living[number] = nbytes
            else:
                living.pop(number, None)
        return sum(living.values())

    def allocate(self, nbytes: int) -> Memory:
        """Return an allocation of ``nbytes`` > 0 bytes, which takes no memory."""
        memory = Memory(-1, nbytes, flags=_FLAGS)
        memory.ledger, memory.number, memory.nbytes = self, self._count, nbytes
        memory.segment = len(self.segments) - 1
        self._count += 1
        self.events.append((memory.number, nbytes))
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.high_bytes = max(self.high_bytes, self.live_bytes)
        if nbytes > _MAPPED:
            self.segment.work["fresh"] += nbytes
        return memory

    def release(self, memory: Memory) -> None:
        """Count a release. An allocation calls it when it dies."""
        self.events.append((memory.number, -memory.nbytes))
        self.live_bytes -= memory.nbytes

    def work(self, kind: str, amount: int) -> None:
        """Count an amount of work of a kind, and the call."""
        work = self.segment.work
        work[kind] += amount
        work["calls"] += 1

    def gemm(self, m: int, n: int, k: int, itemsize: int, count: int = 1) -> None:
        """Count ``count`` products of (m, k) and (k, n) matrices."""
        self.segment.gemms[m, n, k, itemsize] += count
        self.segment.work["calls"] += 1

    def note(self, text: str) -> None:
        """Note an assumption. Repetitions are ignored."""
        where = self.segment.name
        self.notes[f"{where}: {text}" if where else text] = None
