"""The statistics of out-of-core mode in this process, and what they advise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from chainer_ooc import state
from chainer_ooc.graph.iteration import tracker_of
from chainer_ooc.planning.schedule import bytes_for_second_backward
from chainer_ooc.planning.system import LOW_WATER, MARGIN
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.transfers import Counters
from chainer_ooc.tables import Shown, Table, format_bytes, format_seconds

__all__ = ["Stats", "stats"]

#: Waits of less than this share of the time are not worth a change.
_NOTABLE = 0.05


@dataclasses.dataclass
class Stats(Shown, Counters):
    """The statistics of out-of-core mode in this process, over all devices. Their text is a table and the advice.

    It also has the attributes of :class:`~chainer_ooc.swap.transfers.Counters`.

    Attributes:
        peak_bytes: The highest memory measured (the process's resident memory on the CPU).
        limit_bytes: The limit in force (bytes), ``None`` if out-of-core mode was never enabled.
        free_limit_bytes: The least limit (bytes) under which nothing would have moved; ``None`` while
            memory was never short.
        least_limit_bytes: The least limit (bytes) that suffices, as far as iterations have shown; ``None``
            while that is not known.
    """

    peak_bytes: int = 0
    limit_bytes: int | None = None
    free_limit_bytes: int | None = None
    least_limit_bytes: int | None = None

    @property
    def advice(self) -> str:
        """What has bound the process's runs until now, and what to change."""
        return _advice(state.managers())

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

    def _blocks(self) -> Iterator[str | Table]:
        def known(nbytes: int | None) -> str:
            return "not known" if nbytes is None else format_bytes(nbytes)

        rows = [
            ("limit", known(self.limit_bytes)),
            ("peak", format_bytes(self.peak_bytes)),
        ]
        if self.seconds:
            rows += [
                ("limit without moves", known(self.free_limit_bytes)),
                ("least limit that suffices", known(self.least_limit_bytes)),
                ("copied out", format_bytes(self.bytes_out)),
                ("  for a second backward", format_bytes(self.bytes_out_used)),
                ("copied back", format_bytes(self.bytes_in)),
                ("freed, to be made again", format_bytes(self.bytes_discarded)),
                ("time, since memory was short", format_seconds(self.seconds)),
                ("  made again", format_seconds(self.recompute_seconds)),
                ("  waited, not prefetched", format_seconds(self.stall_fetch_seconds)),
                ("  waited, prefetched late", format_seconds(self.stall_late_seconds)),
                ("  waited for room", format_seconds(self.stall_room_seconds)),
                ("  gave memory back", format_seconds(self.stall_trim_seconds)),
            ]
        if self.overlap_percent is not None:
            rows.append(("copies behind computation", f"{self.overlap_percent:.0f} %"))
        if self.prefetch_accuracy is not None:
            rows.append(("prefetched and used", f"{100 * self.prefetch_accuracy:.0f} %"))
        yield Table(rows, "<>")
        yield self.advice


def stats() -> Stats:
    """Return the statistics so far, over all devices. The peak is the highest of any device."""
    managers = state.managers()
    names = [field.name for field in dataclasses.fields(Counters)]
    totals = {name: sum(getattr(manager.counters, name) for manager in managers) for name in names}
    short = [manager for manager in managers if manager.has_been_short]
    return Stats(
        peak_bytes=max((manager.device.peak_bytes() for manager in managers), default=0),
        limit_bytes=max((manager.limit for manager in managers), default=None),
        free_limit_bytes=max(map(_free_limit, short), default=None),
        least_limit_bytes=max(map(_least_limit, short), default=0) or None,
        **totals,
    )


def _free_limit(manager: SwapManager) -> int:
    """Return the least limit under which memory would have stayed below the low watermark (bytes)."""
    return manager.shortages.limit_for(manager.peak_without_offload, LOW_WATER * (1 - MARGIN))


def _least_limit(manager: SwapManager) -> int:
    """Return the least limit that suffices (bytes), 0 if it is not known: no more than one that was held."""
    least = manager.shortages.least_limit
    return least if manager.shortages.exceeds_limit else min(least, manager.limit)


def _advice(managers: list[SwapManager]) -> str:
    if not managers:
        return "Out-of-core mode has not been on."
    short = [manager for manager in managers if manager.has_been_short]
    moved = [m for m in short if m.counters.bytes_out or m.counters.bytes_discarded]
    if not moved and not any(m.shortages.exceeds_limit for m in short):
        return "Nothing moved: out-of-core mode was free."
    told = [" ".join(_sentences(manager)) for manager in moved or short]
    if len(told) == 1:
        return told[0]
    return " ".join(f"{m.device.name}: {t}" for m, t in zip(moved or short, told, strict=True))


def _sentences(manager: SwapManager) -> Iterator[str]:
    """Yield what bound a device's run, and what to change."""
    least, free = _least_limit(manager), _free_limit(manager)
    if least > manager.limit:
        yield f"The limit is too low: it takes {_setting(least)} or a smaller batch."
    yield _bottleneck(manager)
    if 0 < least <= manager.limit:
        yield f"The least limit that suffices, as far as was seen, is {_setting(least)}."
    if free > manager.device.total_bytes():
        yield f"That nothing moves would take {format_bytes(free)}, more than there is."
    else:
        yield f"With {_setting(free)} nothing moves."
    if not manager.settings().single_backward:
        yield from _for_second_backward(manager)


def _for_second_backward(manager: SwapManager) -> Iterator[str]:
    used, total = manager.counters.bytes_out_used, manager.counters.bytes_out
    entry = next(reversed(tracker_of(manager).plan_cache.entries.values()), None)
    spared = 0
    if entry is not None and not entry.disabled:
        spared = bytes_for_second_backward(entry.profile, entry.plan, manager.limit)
    if used:
        yield f"Written for a second backward: {format_bytes(used)} of {format_bytes(total)}."
    if spared:
        yield (
            f"By the plan {format_bytes(spared)} more leave in each iteration since used arrays take their place."
        )
    if used or spared:
        yield "If backward runs once per graph, single_backward=True spares that."


def _setting(nbytes: int) -> str:
    return f'limit="{-(-nbytes >> 20)}MiB"'


def _bottleneck(manager: SwapManager) -> str:
    counters = manager.counters
    seconds = max(counters.seconds, counters.lost_seconds)
    lost = {
        "waits for copies": counters.stall_in_seconds + counters.stall_out_seconds,
        "giving memory back to the system": counters.stall_trim_seconds,
        "running functions again": counters.recompute_seconds,
    }
    worst = max(lost, key=lost.__getitem__)
    share = lost[worst] / seconds if seconds else 0.0
    if share < _NOTABLE:
        return f"Computation is the bottleneck: {worst} took {100 * share:.1f} % of the time."
    took = f"{worst} took {100 * share:.0f} % of the time"
    if worst != "waits for copies":
        return f"The limit is the bottleneck: {took}."
    (tier, *_), *_ = manager.device.tiers()
    where, change = (
        ("disk", "; name a faster one with swap_dir") if tier == "swap file" else (tier, "")
    )
    ways = zip(manager.measured_bandwidths(), ("out", "back"), strict=True)
    rates = " and ".join(f"{rate / 1e9:.2g} GB/s {way}" for rate, way in ways if rate)
    return f"The {where} is the bottleneck{f' ({rates})' if rates else ''}: {took}{change}."
