"""Predict a call's memory from earlier calls of its kind, where allocations cannot be announced."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import NamedTuple

from chainer_ooc.swap.system.memory import ResidentMemory

__all__ = ["ObservedGrowth", "Start"]

#: The prediction is the most that this many last measured calls of the kind took.
REMEMBERED = 8
#: This many first calls of a kind are measured, later ones only if they raise the process's peak: the first call may
#: take what no other does, for imports and buffers of BLAS.
MEASURED = 16
#: The number of kinds that are remembered, the last used ones.
KINDS = 4096


class Start(NamedTuple):
    """The memory when a call began (bytes)."""

    resident: int
    arriving: int
    peak: int
    is_reset: bool


class _Seen:
    """The memory that the measured calls of one kind took (bytes)."""

    def __init__(self) -> None:
        self.left = MEASURED
        self.growths: deque[int] = deque(maxlen=REMEMBERED)


class ObservedGrowth:
    """Remember the largest rise of resident memory during each kind of call.

    The kernel keeps the peak (``VmHWM``) and resets it on demand. A reset takes a microsecond, reading ten.
    Only one thread measures at a time: the peak is the process's.
    """

    def __init__(self) -> None:
        self._memory = ResidentMemory()
        self._kinds: OrderedDict[Hashable, _Seen] = OrderedDict()
        self._lock = threading.Lock()
        self._is_measuring = threading.Lock()

    def expected(self, kind: Hashable, otherwise: int) -> int:
        """Return the bytes that a call of this kind will take; ``otherwise`` before the first was measured."""
        with self._lock:
            seen = self._kinds.get(kind)
            return otherwise if seen is None or not seen.growths else max(seen.growths)

    def begin(self, kind: Hashable, used: int) -> Start | None:
        """Begin to measure a call. ``used`` bytes are in use, those of copies in included.

        Returns:
            The argument for :meth:`end`; ``None`` if this call cannot be measured, because another thread's
            is.
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
        """End the measurement of a call. ``used`` bytes are in use now.

        Returns:
            The bytes that it took, ``None`` if no new peak showed them.
        """
        try:
            peak = self._memory.peak_since_reset() if start.is_reset else self._memory.peak_bytes()
            if peak <= start.peak:  # no new peak, or a kernel that keeps none
                return None
            # Copies that came in meanwhile do not count as the call's memory.
            arriving = max(used - self._memory.bytes(), 0)
            growth = max(peak - start.resident - max(start.arriving - arriving, 0), 0)
        finally:
            self._is_measuring.release()
        with self._lock:
            seen = self._kinds.get(kind)
            if seen is not None:
                seen.growths.append(growth)
        return growth
