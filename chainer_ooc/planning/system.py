"""The memory that an iteration may use, the places for copies, and the constants of memory."""

from __future__ import annotations

import dataclasses
import math

__all__ = ["IN_FLIGHT", "LOW_WATER", "MARGIN", "REMEMBERED_GROWTH", "System", "Tier"]

#: The share of the limit that is left for unannounced allocations: Python's objects, BLAS buffers.
MARGIN = 1 / 64
#: The low watermark, as a share of the limit: past it, copies go out behind the computation.
LOW_WATER = 0.8
#: The most bytes that copies out carry at a time.
IN_FLIGHT = 256 << 20
#: The next function is expected to take as much for itself as any of this many last ones.
REMEMBERED_GROWTH = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Tier:
    """A place for copies and the link to it: pinned host memory, a disk.

    Attributes:
        name: Its name.
        out_bandwidth: The bytes per second of copies out.
        in_bandwidth: The bytes per second of copies in.
        both_bandwidth: The bytes per second of both directions together when both are busy; ``None`` if
            they do not slow each other down.
        latency: The seconds that each copy takes besides.
        capacity: The bytes that fit, ``None`` for any number.
        one_queue: Copies of both directions wait in one queue, as for the swap file's threads. Otherwise
            each direction has its queue, as CUDA's copy streams do.
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
    """The memory and the links that the engine has to work with.

    Attributes:
        limit_bytes: The limit in force.
        tiers: The places for copies. The first one with room takes a copy.
        single_backward: Storages are dropped after their last use, with no copy written.
        margin: The share of the limit that is left for unannounced allocations.
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
        """The high watermark (bytes): memory stays below it."""
        return int(self.limit_bytes * (1 - self.margin))
