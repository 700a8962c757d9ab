"""Write a trace of functions, copies, waits and memory over time, for Perfetto and chrome://tracing.

The format is the Trace Event Format of the Chromium project (JSON object form): complete events (``X``),
counters (``C``) and metadata (``M``).
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from chainer_ooc.report.whole import write_whole
from chainer_ooc.swap.devices.protocol import Span
from chainer_ooc.swap.events import Copied, Observer
from chainer_ooc.swap.storage import Storage
from chainer_ooc.swap.system import ranks

__all__ = ["Trace"]

#: The number of events that are kept, the latest: a few hundred iterations of a large network.
KEPT = 400_000

_TRACKS = ("compute", "stalls", "copies out", "copies in")


class _Event(NamedTuple):
    track: str
    category: str
    name: str
    start: float
    end: float
    args: dict[str, Any]


class Trace(Observer):
    """Collect events and write them to a file.

    Args:
        path: The file. With several ranks, ``ooc.json`` becomes ``ooc.rank1.json`` and so on.
        facts: Returns the process's settings and figures, which the file contains as well.
    """

    def __init__(self, path: str, facts: Callable[[], dict[str, Any]]) -> None:
        self.path = Path(path)
        if ranks.world_size() > 1:
            self.path = self.path.with_suffix(f".rank{ranks.rank()}{self.path.suffix}")
        self._facts = facts
        self._events: deque[_Event] = deque(maxlen=KEPT)
        self._counted: deque[tuple[str, float, int]] = deque(maxlen=KEPT)
        self._told = 0
        self._start = time.perf_counter()

    def ran(self, device: str, label: str, backward: bool, span: Span) -> None:
        """Record a function's run."""
        category = "backward" if backward else "forward"
        thread = threading.current_thread()
        where = "" if thread is threading.main_thread() else f" ({thread.name})"
        self._keep(_Event(f"compute{where}", category, label, *span, {"device": device}))

    def copied(self, copied: Copied, span: Span) -> None:
        """Record a copy."""
        device = copied.device
        track, category = ("copies out", "copy out") if copied.out else ("copies in", "copy in")
        args = {"device": device, "bytes": copied.nbytes, "storage": copied.sequence}
        self._keep(_Event(f"{track}, {device}", category, copied.label, *span, args))

    def remade(self, storage: Storage, span: Span) -> None:
        """Record a re-run."""
        args = {"device": storage.manager.device.name, "bytes": storage.nbytes}
        self._keep(_Event("compute", "recompute", storage.label, *span, args))

    def stalled(self, device: str, cause: str, span: Span) -> None:
        """Record a wait."""
        self._keep(_Event(f"stalls, {device}", "stall", cause, *span, {"device": device}))

    def used(self, device: str, time: float, nbytes: int) -> None:
        """Record the memory in use."""
        self._counted.append((device, time, nbytes))

    def write(self) -> None:
        """Write the whole file or, after an error, none of it."""
        events = sorted(self._events, key=lambda event: (event.start, -event.end))
        document = {
            "traceEvents": [*self._metadata(), *self._complete(events), *self._counters()],
            "displayTimeUnit": "ms",
            "otherData": {**self._facts(), "events_left_out": self._told - len(self._events)},
        }
        write_whole(self.path, json.dumps(document, separators=(",", ":")))

    def _keep(self, event: _Event) -> None:
        self._events.append(event)
        self._told += 1

    def _metadata(self) -> Iterator[dict[str, Any]]:
        name = f"rank {ranks.rank()}" if ranks.world_size() > 1 else "chainer_ooc"
        yield {"ph": "M", "pid": ranks.rank(), "name": "process_name", "args": {"name": name}}

    def _complete(self, events: Iterable[_Event]) -> Iterator[dict[str, Any]]:
        lanes: dict[str, list[float]] = {}
        numbers: dict[str, int] = {}
        for event in events:
            track = event.track
            if track.startswith("copies"):
                # Events of one track must not overlap: simultaneous copies get separate tracks.
                ends = lanes.setdefault(track, [])
                free = [lane for lane, end in enumerate(ends) if end <= event.start]
                lane = free[0] if free else len(ends)
                ends[lane : lane + 1] = [event.end]
                track = f"{track} {lane + 1}" if lane else track
            if track not in numbers:
                numbers[track] = len(numbers) + 1
                common = {"ph": "M", "pid": ranks.rank(), "tid": numbers[track]}
                yield {**common, "name": "thread_name", "args": {"name": track}}
                yield {
                    **common,
                    "name": "thread_sort_index",
                    "args": {"sort_index": _sort_index(track)},
                }
            yield {
                "ph": "X",
                "pid": ranks.rank(),
                "tid": numbers[track],
                "cat": event.category,
                "name": event.name,
                "ts": self._microseconds(event.start),
                "dur": round((event.end - event.start) * 1e6, 1),
                "args": event.args,
            }

    def _counters(self) -> Iterator[dict[str, Any]]:
        for device, moment, nbytes in tuple(self._counted):
            yield {
                "ph": "C",
                "pid": ranks.rank(),
                "name": f"memory, {device}",
                "ts": self._microseconds(moment),
                "args": {"bytes": nbytes},
            }

    def _microseconds(self, moment: float) -> float:
        return round((moment - self._start) * 1e6, 1)


def _sort_index(track: str) -> int:
    return next(index for index, kind in enumerate(_TRACKS) if track.startswith(kind))
