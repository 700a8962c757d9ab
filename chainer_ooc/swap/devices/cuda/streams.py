"""Streams that copy beside the computation on one GPU, and the order between the streams.

The rules that this module keeps (CUDA C++ Programming Guide, "Asynchronous Concurrent Execution"; CUDA
Runtime API, "Stream Management" and "Event Management"; CuPy's ``cupy/cuda/memory.pyx``):

* Work on different non-blocking streams has no order but through events. A copy out begins after what
  computing streams have been given until then; a copy in begins after the allocation of its memory on
  the stream that it was allocated on, because what that memory held before may still be in use there.
* CuPy's pool hands a freed block out again at once, on the stream it was allocated on. So memory that a
  copy reads or writes is held until the copy's event is done, or until those streams wait for it. A stream
  that is seen for the first time waits for all copies begun so far: it may own blocks of before.
* Nobody tells when the owner of an external stream (``cupy.cuda.ExternalStream``) destroys it, and the driver may
  give its number to the next stream. It is known to live while it is the calling thread's current stream: work is
  given to it only then. For what it was given before, the host waits.
* A stream of which a CUDA graph is captured keeps what it is given for the graph: no event of ours may be recorded on
  it, it may wait for no event from outside, and no thread may ask or wait for any event meanwhile ("potentially
  unsafe API calls"). So nothing moves until the capture has ended. The legacy default stream cannot be captured.
* The legacy default stream is named 0 on each GPU: waiting and recording must be done with this GPU the
  current one.
* After a kernel that failed every call returns its error for ever, queries too. CuPy's ``Event.done`` and
  ``Stream.done`` take that for "not yet": nobody may ask them.
* The per-thread default stream (``CUPY_CUDA_PER_THREAD_DEFAULT_STREAM=1``) is named 2 in each thread, and
  is another in each: only its own thread can put it in order. Where several threads compute on such
  streams, the host waits instead.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from chainer_ooc import references
from chainer_ooc.swap.devices.ram import native

__all__ = ["CopyStreams", "is_captured"]

#: Beyond this number, computing streams to which nothing else refers are forgotten.
_MOST_STREAMS = 8
_LEGACY = (0, 1)  # CuPy's name of it, and cudaStreamLegacy
_PER_THREAD = 2  # cudaStreamPerThread
_SUCCESS, _NOT_READY = 0, 600  # cudaError_t
#: Device times are calibrated against the host's clock again after this time (seconds).
_RENEWED = 300


class CopyStreams:
    """Two non-blocking streams that copy, one for each direction, and one for the flags of comparisons.

    Args:
        cupy: CuPy, or a double of it.
        device_id: The GPU's number.
    """

    def __init__(self, cupy: Any, device_id: int) -> None:
        self.device_id = device_id
        self._cuda = cupy.cuda
        self._runtime = cupy.cuda.runtime
        self._compute: dict[int, Any] = {}
        self._can_be_captured = False  # any of them can
        # CuPy 14 has Stream.from_external(), too, which keeps the owner's object: such a stream lives.
        self._external_type: Any = getattr(cupy.cuda, "ExternalStream", ())
        self._noted_by: dict[int, threading.Thread] = {}  # external streams, by which thread last
        self._left_work = False  # external streams were forgotten that may not have ended
        self._lock = threading.Lock()
        self._local = threading.local()
        self._threads = 0  # the number of threads on per-thread default streams
        self._events: tuple[deque[Any], deque[Any]] = deque(), deque()  # the second take times
        with self.on_device():
            self._out = self._cuda.Stream(non_blocking=True)
            self._back = self._cuda.Stream(non_blocking=True)
            self._flags = self._cuda.Stream(non_blocking=True)
            self._origin = self._new_origin()  # an event and its host time
            self.note_current()

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which this GPU is the current one of the calling thread."""
        if self._runtime.getDevice() == self.device_id:
            return contextlib.nullcontext()
        device: contextlib.AbstractContextManager[Any] = self._cuda.Device(self.device_id)
        return device

    def note_current(self) -> Any:
        """Count the calling thread's current stream among the computing ones, and return it."""
        stream = self._cuda.get_current_stream()
        known = self._compute.get(stream.ptr)
        if known is not stream and (known is None or self._is_external(known)):
            if self.captured():
                return stream  # later
            self._note(stream, known)
            self._wait_for_copies(stream)
        if stream.ptr == _PER_THREAD and not hasattr(self._local, "noted") and not self.captured():
            self._local.noted = True
            with self._lock:
                self._threads += 1
            self._wait_for_copies(stream)
        return stream

    def computed(self) -> list[Any]:
        """Return events after all work that the computing streams have queued until now."""
        living = self._living(self.note_current())
        if self._threads > 1:
            self._runtime.deviceSynchronize()
        return [self._record(stream) for stream in living]

    def allocated(self) -> list[Any]:
        """Return the event after all work that the current stream has queued until now."""
        return [self._record(self.note_current())]

    def copy_out(
        self, host: int, device: int, nbytes: int, after: Iterable[Any]
    ) -> tuple[Any, Any]:
        """Begin a copy to the host after some events. Return the events of its begin and its end.

        Args:
            host: The address in pinned memory.
            device: The address on the GPU.
            nbytes: The size (bytes).
            after: The events to wait for.

        Raises:
            OSError: If the driver refuses.
        """
        kind = self._runtime.memcpyDeviceToHost
        return self._copy(self._out, host, device, nbytes, kind, after)

    def copy_in(self, device: int, host: int, nbytes: int, after: Iterable[Any]) -> tuple[Any, Any]:
        """Begin a copy to the GPU after some events. Return the events of its begin and its end.

        Raises:
            OSError: If the driver refuses.
        """
        kind = self._runtime.memcpyHostToDevice
        return self._copy(self._back, device, host, nbytes, kind, after)

    def copy_flag(self, host: int, device: int, nbytes: int) -> Any:
        """Begin to copy a few bytes to the host after the current stream's work. Return the event of the end.

        They wait for no copy of an array, and no computing stream waits for them.

        Raises:
            OSError: If the driver refuses.
        """
        kind = self._runtime.memcpyDeviceToHost
        return self._copy(self._flags, host, device, nbytes, kind, self.allocated())[1]

    def let_compute_wait(self, event: Any) -> None:
        """Make later work of the computing streams wait for an event. The host does not wait.

        All of them wait, since one of them allocated the memory that is freed after this.
        """
        with self.on_device():
            living = self._living(self.note_current())
            if self._threads > 1:
                event.synchronize()
            for stream in living:
                stream.wait_event(event)

    @property
    def are_one(self) -> bool:
        """Whether there is one computing stream."""
        return len(self._compute) <= 1 and self._threads <= 1 and not self._left_work

    def order_computing(self) -> None:
        """Make later work of each computing stream wait for the earlier work of all of them."""
        with self.on_device():
            self.note_current()
            if not self.are_one and not self.captured():
                for event in self.computed():
                    self.let_compute_wait(event)

    def know(self, streams: Iterable[int]) -> bool:
        """Return whether all of some streams, by their numbers, are among the computing ones."""
        return all(stream in self._compute for stream in streams)

    def has_passed(self, event: Any) -> bool:
        """Return, without waiting, whether an event has passed. While a graph is captured that is not known.

        Raises:
            CUDARuntimeError: If the GPU has failed. CuPy's ``Event.done`` would be false for ever.
        """
        return not self.captured() and self._is_success(self._runtime.eventQuery(event.ptr))

    def _is_idle(self, stream: Any) -> bool:
        return self._is_success(self._runtime.streamQuery(stream.ptr))

    def _is_success(self, status: int) -> bool:
        if status in (_SUCCESS, _NOT_READY):
            return status == _SUCCESS
        raise self._runtime.CUDARuntimeError(status)

    def synchronize(self) -> None:
        """Wait until all copies have ended."""
        for stream in (self._out, self._back, self._flags):
            stream.synchronize()

    def _copy(
        self, stream: Any, target: int, source: int, nbytes: int, kind: int, after: Iterable[Any]
    ) -> tuple[Any, Any]:
        try:
            # Both before the copy: without its end nobody would know until when it uses the memory.
            begin, end = self._event(timed=True), self._event(timed=True)
            for event in after:
                stream.wait_event(event)
            stream.record(begin)
            self._runtime.memcpyAsync(target, source, nbytes, kind, stream.ptr)
        except self._runtime.CUDARuntimeError as error:
            raise OSError(
                errno.EIO, f"the copy of {nbytes} bytes cannot be begun: {error}"
            ) from error
        stream.record(end)
        return begin, end

    def mark(self) -> Any:
        """Return a timed event after all work that the current stream has queued until now.

        ``None`` while a graph is captured.
        """
        with self.on_device():
            return None if self.captured() else self._record(self.note_current(), timed=True)

    def seconds(self, earlier: Any, later: Any) -> float:
        """Return the time on the GPU between two timed events (seconds). The host waits for both.

        0 if one is not known, and while a graph is captured.
        """
        if earlier is None or later is None or self.captured():
            return 0.0
        for event in (earlier, later):
            event.synchronize()
        return float(self._cuda.get_elapsed_time(earlier, later)) / 1e3

    def host_time(self, event: Any) -> float:
        """Return the host's time of a timed event that has passed (seconds of :func:`time.perf_counter`)."""
        # Elapsed times are single precision: the origin must not be too long ago.
        if time.perf_counter() - self._origin[1] > _RENEWED:
            with self.on_device():
                if self._is_idle(self._out):
                    self._origin = self._new_origin()
        origin, then = self._origin
        return then + float(self._cuda.get_elapsed_time(origin, event)) / 1e3

    def _wait_for_copies(self, stream: Any) -> None:
        for copies in (self._out, self._back):
            if not self._is_idle(copies):
                stream.wait_event(self._record(copies))

    def _new_origin(self) -> tuple[Any, float]:
        origin = self._record(self._out, timed=True)
        origin.synchronize()
        return origin, time.perf_counter()

    def _record(self, stream: Any, timed: bool = False) -> Any:
        return stream.record(self._event(timed))

    def _event(self, timed: bool) -> Any:
        """Return an event to which nothing refers any more, or a new one.

        All are referred to from here. Events that died with a graph in a cycle of references would be destroyed by
        the collector in any order, and before the graph's storages ask them whether their copies have ended.
        """
        events = self._events[timed]
        for _ in range(min(2, len(events))):
            with contextlib.suppress(IndexError):  # another thread was faster
                oldest = [events.popleft()]
                is_free = not references.item_is_referenced_externally(oldest, 0)
                events.append(oldest[0])
                if is_free:
                    return oldest[0]
        event = self._cuda.Event(disable_timing=not timed)
        events.append(event)
        return event

    def _forget_idle(self) -> None:
        self._forget_external(None)
        table = self._compute
        self._know_only(
            {
                pointer: table[pointer]
                for pointer in table
                if pointer in self._noted_by
                or references.item_is_referenced_externally(table, pointer)
                or not self._is_idle(table[pointer])
            }
        )
        native.ask_again()  # their next allocation must be noted anew

    def _know_only(self, streams: dict[int, Any]) -> None:
        """Replace the computing streams, by number."""
        self._can_be_captured = any(number not in _LEGACY for number in streams)
        self._compute = streams

    # Streams that are captured.

    def captured(self) -> bool:
        """Return whether a CUDA graph is being captured of a computing stream.

        The driver is asked only of streams that can be captured: where all work is on the default stream, never.
        """
        current = self._cuda.get_current_stream(self.device_id)
        if not self._can_be_captured and current.ptr in _LEGACY:
            return False
        streams = (current, *self._compute.values())
        return any(
            is_captured(self._runtime, stream)
            for stream in streams
            if stream is current or not self._is_external(stream)
        )

    # External streams.

    def _is_external(self, stream: Any) -> bool:
        return isinstance(stream, self._external_type)

    def _note(self, stream: Any, known: Any) -> None:
        """Add a stream to the computing ones, in the place of ``known``, an external one that had its number."""
        with self._lock:
            if known is not None:
                self._left_work = True
            elif len(self._compute) >= _MOST_STREAMS:
                self._forget_idle()
            self._know_only({**self._compute, stream.ptr: stream})
            self._noted_by.pop(stream.ptr, None)
            if self._is_external(stream):
                self._noted_by[stream.ptr] = threading.current_thread()

    def _living(self, current: Any) -> list[Any]:
        """Return the computing streams that are known to live. The host waits for what others were given."""
        streams = self._compute.values()
        living = [one for one in streams if one is current or not self._is_external(one)]
        if len(living) < len(streams) or self._left_work:
            with self._lock:
                self._forget_external(current)
                self._left_work = False
            self._runtime.deviceSynchronize()
        return living

    def _forget_external(self, current: Any) -> None:
        """Forget the external streams that this thread has left, or whose thread has ended."""
        here = threading.current_thread()
        for pointer, thread in tuple(self._noted_by.items()):
            is_left = thread is here or not thread.is_alive()
            if is_left and self._compute[pointer] is not current:
                self._know_only({p: one for p, one in self._compute.items() if p != pointer})
                del self._noted_by[pointer]
                self._left_work = True


def is_captured(runtime: Any, stream: Any) -> bool:
    """Return whether a CUDA graph is being captured of a stream."""
    if stream.ptr in _LEGACY:
        return False
    try:
        return bool(runtime.streamIsCapturing(stream.ptr))
    except runtime.CUDARuntimeError:
        raise
    except RuntimeError:  # CuPy's for a capture that an error has spoilt, and that has not ended
        return True
