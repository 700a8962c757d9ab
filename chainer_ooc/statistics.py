"""The statistics of out-of-core mode in this process."""

from __future__ import annotations

import dataclasses

from chainer_ooc import state
from chainer_ooc.swap.transfers import Counters

__all__ = ["Stats", "stats"]


@dataclasses.dataclass
class Stats(Counters):
    """The statistics of out-of-core mode in this process, over all devices.

    It also has the attributes of :class:`~chainer_ooc.swap.transfers.Counters`.

    Attributes:
        peak_bytes: The highest memory measured (the process's resident memory on the CPU).
        limit_bytes: The limit in force (bytes), ``None`` if out-of-core mode was never enabled.
    """

    peak_bytes: int = 0
    limit_bytes: int | None = None

    @property
    def prefetch_accuracy(self) -> float | None:
        """The share of prefetched allocations that were used before they left again; ``None`` without any."""
        return self.prefetch_hits / self.prefetched if self.prefetched else None

    @property
    def overlap_percent(self) -> float | None:
        """The share of the copies' time that hid behind computation (%); ``None`` if not measured."""
        if not self.copy_seconds:
            return None
        waited = self.stall_in_seconds + self.stall_out_seconds
        return 100 * max(1 - waited / self.copy_seconds, 0)


def stats() -> Stats:
    """Return the statistics so far, over all devices. The peak is the highest of any device."""
    managers = state.managers()
    names = [field.name for field in dataclasses.fields(Counters)]
    totals = {name: sum(getattr(manager.counters, name) for manager in managers) for name in names}
    return Stats(
        peak_bytes=max((manager.device.peak_bytes() for manager in managers), default=0),
        limit_bytes=max((manager.limit for manager in managers), default=None),
        **totals,
    )
