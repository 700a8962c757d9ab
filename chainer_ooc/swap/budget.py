"""MemoryBudget: how much memory there may be, how much is in use, and when it gets short."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from chainer_ooc.planning.system import LOW_WATER, MARGIN, REMEMBERED_GROWTH
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.protocol import Device

__all__ = ["MemoryBudget"]

#: The system is asked at least once in so many functions.
_UNASKED = 64


class MemoryBudget:
    """The limit in force on a device, and where memory stands.

    Args:
        device: The memory.
        settings: Returns the settings in force in the calling thread.

    Attributes:
        note_growth: Takes how many bytes a function took for itself.
        last_used: The bytes that were in use when the device was asked last.
    """

    def __init__(self, device: Device, settings: Callable[[], Settings]) -> None:
        self._device = device
        self._settings = settings
        self.last_used = 0
        self._growth: deque[int] = deque([0], REMEMBERED_GROWTH)
        self.note_growth = self._growth.append
        # The settings in force, and their limit, high- and low-water mark; what a limit of None means.
        self._measured: tuple[Any, tuple[int, int, int]] = (None, (0, 0, 0))
        self._capacity: int | None = None
        self._slack = self._unasked = 0

    @property
    def limit(self) -> int:
        """The limit in force (bytes)."""
        return self.levels()[0]

    @property
    def high(self) -> int:
        """The high-water mark (bytes): room is made so that memory stays below it."""
        return self.levels()[1]

    @property
    def low(self) -> int:
        """The low-water mark (bytes): nothing moves below it."""
        return self.levels()[2]

    def used_bytes(self) -> int:
        """Return the bytes in use now."""
        self.last_used = self._device.used_bytes()
        return self.last_used

    def are_far(self, nbytes: int, settings: Settings) -> bool:
        """Tell whether a function that takes at most ``nbytes`` leaves memory below the low-water mark.

        The system is asked only when what functions may have taken since the last time could matter.
        """
        self._slack -= nbytes
        self._unasked += 1
        if self._slack < 0 or self._unasked > _UNASKED or settings is not self._measured[0]:
            self._slack = self.low - self.used_bytes() - nbytes
            self._unasked = 0
        return self._slack >= 0

    def high_beside_growth(self) -> int:
        """Return the high-water mark less what functions took for themselves of late (bytes).

        What is fetched ahead of its use must leave that much free: otherwise the next function would push it
        out again.
        """
        return self.high - max(self._growth)

    def levels(self) -> tuple[int, int, int]:
        """Return the limit, the high- and the low-water mark (bytes)."""
        settings = self._settings()
        if settings is not self._measured[0]:
            limit = self._limit_of(settings)
            marks = (limit, int(limit * (1 - MARGIN)), int(limit * LOW_WATER))
            self._measured = (settings, marks)
            self._device.set_cached_limit(marks[1])
        return self._measured[1]

    def _limit_of(self, settings: Settings) -> int:
        wanted = settings.limit
        if wanted is None:
            # What is free is asked once: later it would be less by what was taken.
            if self._capacity is None:
                self._capacity = self._device.capacity()
            return self._capacity
        return int(wanted * self._device.total_bytes()) if isinstance(wanted, float) else wanted
