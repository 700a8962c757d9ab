"""The timeline of a simulated or measured iteration: intervals, waits, memory."""

from __future__ import annotations

import dataclasses

__all__ = ["Interval", "Timeline"]


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """An activity with a start and an end.

    Attributes:
        kind: ``"forward"``, ``"backward"``, ``"other"``, ``"rerun"``, ``"out"``, ``"in"``, or a wait of the
            computation: ``"wait in"``, ``"wait out"``.
        number: The step for compute, the storage for copies and waits (index).
        start: The start (seconds).
        end: The end (seconds).
    """

    kind: str
    number: int
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The times, bytes and waits of a simulated iteration.

    Attributes:
        seconds: The step time.
        peak_bytes: The highest memory (bytes).
        over_bytes: The most by which memory exceeded the high watermark, 0 if the policy kept it.
        bytes_out: The bytes copied out.
        bytes_in: The bytes copied in.
        wait_in_seconds: The time that computation waited for copies in.
        wait_out_seconds: The time that computation waited for copies out, for the memory that they free.
        rerun_seconds: The time of re-runs.
        waits: The seconds that computation waited for each storage to come in.
        slack: The seconds between each storage's arrival and its first use.
        starts: The start of each step (seconds).
        reruns: The re-runs: (before this step, forward steps in order).
        intervals: All intervals, if requested.
        memory: (seconds, bytes) whenever memory changed, if requested.
        unplaced_bytes: The bytes of copies that fit into no tier: the engine could not make them.
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
