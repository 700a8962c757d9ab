"""The memory budget of one device: the limit, the watermarks, and the memory in use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from chainer_ooc.planning.system import LOW_WATER, MARGIN, REMEMBERED_GROWTH
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.protocol import Device

__all__ = ["UNASKED", "MemoryBudget"]

#: The OS is queried at least once in this many functions.
UNASKED = 64


class MemoryBudget:
    """The limit in force on a device, the watermarks, and the memory in use.

    Args:
        device: The device whose memory is bounded.
        settings: Returns the settings in force in the calling thread.

    Attributes:
        last_used: The bytes in use when the device was asked last.
        raised: A level (bytes) below which nothing moves, whatever the limit; 0 for none.
        note_growth: Notes how many bytes a function took for itself.
    """

    def __init__(self, device: Device, settings: Callable[[], Settings]) -> None:
        self._device = device
        self._settings = settings
        self.last_used = self.raised = 0
        self._growth: deque[int] = deque([0], REMEMBERED_GROWTH)
        self.note_growth = self._growth.append
        # Settings and their limit, high and low watermark; the bytes that limit=None stands for.
        self._measured: tuple[Any, tuple[int, int, int]] = (None, (0, 0, 0))
        self._capacity: int | None = None
        self._slack = self._unasked = 0

    @property
    def limit(self) -> int:
        """The limit in force (bytes)."""
        return self.levels()[0]

    @property
    def high(self) -> int:
        """The high watermark (bytes): room is made so that memory stays below it."""
        return self.levels()[1]

    @property
    def low(self) -> int:
        """The low watermark (bytes): nothing moves below it."""
        return self.levels()[2]

    def used_bytes(self) -> int:
        """Return the bytes in use now."""
        self.last_used = self._device.used_bytes()
        return self.last_used

    def are_far(self, nbytes: int, settings: Settings) -> bool:
        """Cheap test: would usage stay below the low watermark? Queries the OS only if the answer could change.

        ``nbytes`` is the most that the next function may take.
        """
        self._slack -= nbytes
        self._unasked += 1
        if self._slack < 0 or self._unasked > UNASKED or settings is not self._measured[0]:
            self._slack = self.low - self.used_bytes() - nbytes
            self._unasked = 0
        return self._slack >= 0

    def raise_to(self, nbytes: int) -> None:
        """Move nothing below ``nbytes``: the limit cannot be held, more would not lower the peak. 0: as usual."""
        if nbytes != self.raised:
            self.raised = nbytes
            self._measured = (None, (0, 0, 0))

    def lend_slack(self) -> int:
        """Return the bytes that :meth:`are_far` would still allow without a query, and let it query the next time."""
        slack, self._slack = self._slack, 0
        return slack

    def high_beside_growth(self) -> int:
        """Return the high watermark less the most that recent functions took for themselves (bytes).

        Prefetching must leave that much free. Otherwise the next function would evict what was just
        fetched.
        """
        return self.high - max(self._growth)

    def levels(self) -> tuple[int, int, int]:
        """Return the limit, the high watermark and the low watermark (bytes)."""
        settings = self._settings()
        if settings is not self._measured[0]:
            limit = self._limit_of(settings)
            high = max(int(limit * (1 - MARGIN)), self.raised)
            marks = (limit, high, max(int(limit * LOW_WATER), int(self.raised * LOW_WATER)))
            self._measured = (settings, marks)
            self._device.set_cached_limit(marks[1])
        return self._measured[1]

    def _limit_of(self, settings: Settings) -> int:
        wanted = settings.limit
        if wanted is None:
            # Query once: later the free memory would lack what this process has taken.
            if self._capacity is None:
                self._capacity = self._device.capacity()
            return self._capacity // settings.shares
        if isinstance(wanted, float):
            wanted = int(wanted * self._device.total_bytes())
        return wanted // settings.shares
