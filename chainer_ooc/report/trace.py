"""Write a trace of functions, copies, waits and memory over time, for Perfetto and chrome://tracing.

The format is the Trace Event Format of the Chromium project (JSON object form): complete events (``X``),
counters (``C``) and metadata (``M``).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from chainer_ooc import wording
from chainer_ooc.compat import run
from chainer_ooc.report.whole import replacing
from chainer_ooc.swap.devices.protocol import Span
from chainer_ooc.swap.events import Copied, Observer
from chainer_ooc.swap.storage import Storage
from chainer_ooc.swap.system import ranks

__all__ = ["Trace"]

#: What the file begins with. Then each event has a line of its own.
HEAD = '{"displayTimeUnit":"ms","traceEvents":[\n'

#: Events are written when so many wait, or when the oldest has waited so long (seconds).
_WAITING, _DELAY = 256, 0.5

#: What comes later is not kept (bytes): no viewer opens larger files.
MOST = 1 << 30

_TRACKS = ("compute", "stalls", "copies out", "copies in")


class _Event(NamedTuple):
    track: str
    category: str
    name: str
    start: float
    end: float
    args: dict[str, Any]


class Trace(Observer):
    """Write events to a file while they happen.

    The file is complete whenever nothing is being written to it: what ends it is written after the events each time,
    and overwritten by the next ones. A process that is killed loses the last half second.

    Args:
        path: The file. With several ranks, ``ooc.json`` becomes ``ooc.rank1.json`` and so on; in a child process
            ``ooc.child1234.json``.
        facts: Returns the process's settings and figures, which the file contains as well.

    Raises:
        OSError: If the file cannot be made.
    """

    def __init__(self, path: str, facts: Callable[[], dict[str, Any]]) -> None:
        self.path = Path(path)
        if ranks.world_size() > 1:
            self.path = self.path.with_suffix(f".rank{ranks.rank()}{self.path.suffix}")
        if run.is_child():
            self.path = self.path.with_suffix(f".child{os.getpid()}{self.path.suffix}")
        self._facts = facts
        self._start = self._written_at = time.perf_counter()
        self._waiting: deque[_Event | tuple[str, float, int]] = deque()
        self._writing = threading.Lock()  # never waited for: who writes takes what others add
        self._lanes: dict[str, list[float]] = {}
        self._numbers: dict[str, int] = {}
        self._left_out = 0
        self._known: dict[str, Any] = {}
        self._known_at = self._cost = 0.0
        with replacing(self.path) as partial:
            self._file = open(partial, "r+b", buffering=0)  # noqa: SIM115
        self._size = 0
        self._append(HEAD + _json(self._process()))

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
        self._keep((device, time, nbytes))

    def close(self) -> None:
        """Write what is left, and the figures of the whole run."""
        mine = self._writing.acquire(timeout=10)  # Ctrl-C may have hit who had it
        self._write(ended=True)
        self._file.close()
        if mine:
            self._writing.release()

    def _keep(self, event: _Event | tuple[str, float, int]) -> None:
        self._waiting.append(event)
        late = time.perf_counter() - self._written_at > _DELAY
        # Not if another thread is writing, or this one: a finalizer may have come in between.
        if (late or len(self._waiting) >= _WAITING) and self._writing.acquire(blocking=False):
            try:
                self._write(ended=False)
            finally:
                self._writing.release()

    def _write(self, ended: bool) -> None:
        lines: list[str] = []
        while self._waiting:
            event = self._waiting.popleft()
            lines.extend(map(_json, self._converted(event)))
        text = "".join(f",\n{line}" for line in lines)
        if self._size + len(text) > MOST:
            self._left_out += len(lines)
            text = ""
        try:
            self._append(text, ended)
        except OSError as error:
            if not self._file.closed:
                wording.warn(f"the trace {str(self.path)!r} ends here: {error}")
                self._file.close()
        self._written_at = time.perf_counter()

    def _append(self, text: str, ended: bool = False) -> None:
        """Write text at the end of the events, and what ends the file."""
        if self._file.closed:
            return
        last = {**self._current_facts(ended), "events_left_out": self._left_out, "ended": ended}
        end = f'\n],"otherData":{_json(last)}}}\n'
        data = text.encode("utf-8", "backslashreplace")
        self._all_written(data + end.encode(), self._size)
        self._size += len(data)

    def _all_written(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[written:], offset + written
        os.ftruncate(self._file.fileno(), offset)

    def _current_facts(self, ended: bool) -> dict[str, Any]:
        """Return the settings and figures: those of a second ago if they are expensive and more events follow."""
        now = time.perf_counter()
        if ended or now - self._known_at > max(1.0, 100 * self._cost):
            with contextlib.suppress(Exception):  # in the middle of a change
                self._known = self._facts()
            self._known_at = time.perf_counter()
            self._cost = self._known_at - now
        return self._known

    def _process(self) -> dict[str, Any]:
        name = f"rank {ranks.rank()}" if ranks.world_size() > 1 else "chainer_ooc"
        return {"ph": "M", "pid": ranks.rank(), "name": "process_name", "args": {"name": name}}

    def _converted(self, event: _Event | tuple[str, float, int]) -> Iterator[dict[str, Any]]:
        if not isinstance(event, _Event):
            device, moment, nbytes = event
            yield {
                "ph": "C",
                "pid": ranks.rank(),
                "name": f"memory, {device}",
                "ts": self._microseconds(moment),
                "args": {"bytes": nbytes},
            }
            return
        track = event.track
        if track.startswith("copies"):
            # Events of one track must not overlap: simultaneous copies get separate tracks.
            ends = self._lanes.setdefault(track, [])
            free = [lane for lane, end in enumerate(ends) if end <= event.start]
            lane = free[0] if free else len(ends)
            ends[lane : lane + 1] = [event.end]
            track = f"{track} {lane + 1}" if lane else track
        if track not in self._numbers:
            self._numbers[track] = len(self._numbers) + 1
            common = {"ph": "M", "pid": ranks.rank(), "tid": self._numbers[track]}
            yield {**common, "name": "thread_name", "args": {"name": track}}
            order = {"sort_index": _sort_index(track)}
            yield {**common, "name": "thread_sort_index", "args": order}
        yield {
            "ph": "X",
            "pid": ranks.rank(),
            "tid": self._numbers[track],
            "cat": event.category,
            "name": event.name,
            "ts": self._microseconds(event.start),
            "dur": round((event.end - event.start) * 1e6, 1),
            "args": event.args,
        }

    def _microseconds(self, moment: float) -> float:
        return round((moment - self._start) * 1e6, 1)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _sort_index(track: str) -> int:
    return next(index for index, kind in enumerate(_TRACKS) if track.startswith(kind))
