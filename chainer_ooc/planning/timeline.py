"""What a simulated or measured iteration did: intervals, waits, memory."""

from __future__ import annotations

import dataclasses

__all__ = ["Interval", "Timeline"]


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """Something that took time.

    Attributes:
        kind: ``"forward"``, ``"backward"``, ``"other"``, ``"rerun"``, ``"out"``, ``"in"``, or what compute
            waited for: ``"wait in"``, ``"wait out"``.
        number: The step for compute, the storage for copies and waits (index).
        start: Seconds.
        end: Seconds.
    """

    kind: str
    number: int
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What a simulated iteration did.

    Attributes:
        seconds: The step time.
        peak_bytes: The highest memory.
        over_bytes: By how much memory was above the high-water mark, 0 if the policy kept it.
        bytes_out: Copied out.
        bytes_in: Copied in.
        wait_in_seconds: Compute waited for copies in.
        wait_out_seconds: Compute waited for copies out, for the memory that they free.
        rerun_seconds: Compute ran functions again.
        waits: Seconds that compute waited for each storage to come in.
        slack: Seconds between each storage's arrival and its first use.
        starts: When each step started (seconds).
        reruns: What was run again: (before this step, forward steps in order).
        intervals: All that took time, if asked for.
        memory: (seconds, bytes) whenever memory changed, if asked for.
        unplaced_bytes: Copies that no tier had room for: the executor could not have made them.
    """

    seconds: float
    peak_bytes: int
    over_bytes: int
    bytes_out: int
    bytes_in: int
    wait_in_seconds: float
    wait_out_seconds: float
    rerun_seconds: float
    waits: dict[int, float]
    slack: dict[int, float]
    starts: list[float]
    reruns: list[tuple[int, tuple[int, ...]]]
    intervals: list[Interval]
    memory: list[tuple[float, int]]
    unplaced_bytes: int = 0
