"""Where allocations are not announced: what each kind of call was seen to take, and so will take again."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import NamedTuple

from chainer_ooc.swap.system.memory import ResidentMemory

__all__ = ["ObservedGrowth", "Start"]

#: What a kind of call takes is the most that these many of its last measured calls took.
REMEMBERED = 8
#: A kind's first calls, so many, are measured. Later ones only where they raise the process's peak: the first call may
#: take what no other does, for imports and buffers of BLAS.
MEASURED = 16
#: So many kinds are remembered, those that ran last.
KINDS = 4096


class Start(NamedTuple):
    """How memory stood when a call began (bytes)."""

    resident: int
    arriving: int
    peak: int
    is_reset: bool


class _Seen:
    """What the measured calls of one kind took (bytes)."""

    def __init__(self) -> None:
        self.left = MEASURED
        self.growths: deque[int] = deque(maxlen=REMEMBERED)


class ObservedGrowth:
    """Remembers by how much resident memory rose while each kind of call ran, at the most.

    The kernel keeps the peak (``VmHWM``), and forgets it when it is told to. That takes a microsecond, and
    reading it ten. Only one thread measures at a time: the peak is the process's.
    """

    def __init__(self) -> None:
        self._memory = ResidentMemory()
        self._kinds: OrderedDict[Hashable, _Seen] = OrderedDict()
        self._lock = threading.Lock()
        self._is_measuring = threading.Lock()

    def expected(self, kind: Hashable, otherwise: int) -> int:
        """Return what a call of this kind will take (bytes); ``otherwise`` if none has been seen yet."""
        with self._lock:
            seen = self._kinds.get(kind)
            return otherwise if seen is None or not seen.growths else max(seen.growths)

    def begin(self, kind: Hashable, used: int) -> Start | None:
        """Tell that a call begins, and how many bytes are in use, those on their way into memory included.

        Returns:
            What :meth:`end` wants; ``None`` if this call cannot be measured, as another thread's is.
        """
        if not self._is_measuring.acquire(blocking=False):
            return None
        with self._lock:
            seen = self._kinds.setdefault(kind, _Seen())
            self._kinds.move_to_end(kind)
            if len(self._kinds) > KINDS:
                self._kinds.popitem(last=False)
            wanted = seen.left > 0
            seen.left -= wanted
        is_reset = wanted and self._memory.reset_peak()
        peak = 0 if is_reset else self._memory.peak_bytes()
        resident = self._memory.bytes()
        return Start(resident, max(used - resident, 0), peak, is_reset)

    def end(self, kind: Hashable, start: Start, used: int) -> int | None:
        """Tell that the call has ended, and how many bytes are in use now.

        Returns:
            What it took (bytes), ``None`` if that was not to be seen.
        """
        try:
            peak = self._memory.peak_since_reset() if start.is_reset else self._memory.peak_bytes()
            if peak <= start.peak:  # no new peak, or a kernel that keeps none
                return None
            # What arrived meanwhile is not the call's.
            arriving = max(used - self._memory.bytes(), 0)
            growth = max(peak - start.resident - max(start.arriving - arriving, 0), 0)
        finally:
            self._is_measuring.release()
        with self._lock:
            seen = self._kinds.get(kind)
            if seen is not None:
                seen.growths.append(growth)
        return growth
