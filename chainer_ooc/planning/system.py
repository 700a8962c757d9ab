"""System: the memory that an iteration may use and the ways out of it."""

from __future__ import annotations

import dataclasses
import math

__all__ = ["IN_FLIGHT", "LOW_WATER", "MARGIN", "REMEMBERED_GROWTH", "System", "Tier"]

#: This share of the limit is left for what nobody announces: Python's objects, BLAS buffers.
MARGIN = 1 / 64
#: The low-water mark, as a share of the limit: past it, copies go out behind the computation.
LOW_WATER = 0.8
#: Most bytes on their way out at a time.
IN_FLIGHT = 256 << 20
#: What the last functions took for themselves is what the next may take: this many of them.
REMEMBERED_GROWTH = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Tier:
    """A place for copies and the way there: page-locked host memory, a disk.

    Attributes:
        name: What it is.
        out_bandwidth: Bytes per second on the way out.
        in_bandwidth: Bytes per second on the way in.
        both_bandwidth: Bytes per second of both directions together when both are busy; ``None`` where
            they do not hinder each other.
        latency: Seconds that each copy takes besides.
        capacity: The bytes it has room for, ``None`` for any number.
        one_queue: Copies of both directions wait in one queue, as they do before the swap file's threads,
            and not in one queue each, as in CUDA's copy streams.
    """

    name: str
    out_bandwidth: float
    in_bandwidth: float
    both_bandwidth: float | None = None
    latency: float = 0.0
    capacity: int | None = None
    one_queue: bool = False

    def __post_init__(self) -> None:
        for name in ("out_bandwidth", "in_bandwidth", "both_bandwidth"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(
                    f"tier {self.name!r}: {name}={value!r} is not allowed; give bytes per second > 0"
                )
        if not (self.latency >= 0 and math.isfinite(self.latency)):
            raise ValueError(
                f"tier {self.name!r}: latency={self.latency!r} is not allowed; give seconds >= 0"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class System:
    """What the executor has to work with.

    Attributes:
        limit_bytes: The limit in force.
        tiers: Where copies go: the first that has room.
        single_backward: What backward has used for the last time is dropped, with no copy written.
        margin: The share of the limit that is left for what nobody announces.
    """

    limit_bytes: int
    tiers: tuple[Tier, ...]
    single_backward: bool = True
    margin: float = MARGIN

    def __post_init__(self) -> None:
        if self.limit_bytes <= 0:
            raise ValueError(f"limit_bytes={self.limit_bytes!r} is not allowed; give bytes > 0")
        if not self.tiers:
            raise ValueError("tiers=() is not allowed; give at least one Tier")
        if not 0 <= self.margin < 1:
            raise ValueError(
                f"margin={self.margin!r} is not allowed; give a share of the limit, 0 to 1"
            )

    @property
    def high_bytes(self) -> int:
        """The high-water mark: memory stays below it."""
        return int(self.limit_bytes * (1 - self.margin))
