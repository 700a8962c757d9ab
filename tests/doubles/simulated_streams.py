"""Streams and events of a simulated GPU: work is put off, and every access to memory has a vector clock."""

from __future__ import annotations

import contextlib
import random
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

from tests.doubles.vector_clocks import Access, Accesses, Clock, merge

__all__ = ["LEGACY", "PER_THREAD", "CUDARuntimeError", "Event", "Queue", "Schedule", "Stream"]

#: ``cudaStreamLegacy`` as CuPy names it, and ``cudaStreamPerThread``.
LEGACY, PER_THREAD = 0, 2
RELAXED = 2  # cudaStreamCaptureModeRelaxed
#: Spans of memory: address and size (bytes) of each.
Spans = Sequence[tuple[int, int]]


#: ``cudaError_t``
SUCCESS, INVALID_HANDLE, NOT_READY = 0, 400, 600


class CUDARuntimeError(RuntimeError):
    """What the runtime's calls raise."""


class Lock:
    """A lock that a thread may take again, and what must not happen inside: the collector's work."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._deferred: deque[Callable[[], object]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *args: object) -> None:
        while self._depth == 1 and self._deferred:
            self._deferred.popleft()()
        self._depth -= 1
        self._lock.release()

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread has it."""
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]

    def defer(self, job: Callable[[], object]) -> None:
        """Run a job now, or when the calling thread has left: memory may die in the midst of anything."""
        with self:
            self._deferred.append(job)


class Queue:
    """Work of one stream of one GPU, put off: calls, and places in other queues that are waited for."""

    def __init__(self, name: str, device_id: int) -> None:
        self.name, self.device_id = name, device_id
        self.clock: Clock = {}
        self.items: deque[Callable[[], object] | tuple[Queue, int]] = deque()
        self.executed = 0


class Stream:
    """What CuPy hands out: a name of a queue.

    The default streams are one object each for all GPUs and threads: which queue they name depends on the
    current GPU and, for the per-thread one, on the calling thread.
    """

    def __init__(self, schedule: Schedule, ptr: int, device_id: int) -> None:
        self.ptr, self.device_id = ptr, device_id
        self._schedule = schedule

    @property
    def queue(self) -> Queue:
        """The queue that it names now."""
        return self._schedule.queue_of(self.ptr)

    def record(self, event: Event | None = None) -> Event:
        """Let an event stand for all that the stream has been given.

        Raises:
            CUDARuntimeError: If the event was made for another GPU.
        """
        self._schedule.check_working()
        self._schedule.check_no_capture("record", self.ptr)
        event = Event(self._schedule) if event is None else event
        event.check()
        schedule, queue = self._schedule, self.queue
        with schedule.lock:
            if event.device_id != queue.device_id:
                raise CUDARuntimeError(
                    f"cudaErrorInvalidResourceHandle: the event is of GPU {event.device_id}, "
                    f"{queue.name} of GPU {queue.device_id}"
                )
            merge(queue.clock, schedule.host_clock)
            schedule.tick(queue)
            event.clock = dict(queue.clock)
            event.place = (queue, schedule.enqueue(queue, event.pass_by))
        return event

    def wait_event(self, event: Event) -> None:
        """Put what follows after the event, as it is now."""
        self._schedule.check_working()
        self._schedule.check_no_capture("wait_event")
        event.check()
        schedule, queue = self._schedule, self.queue
        with schedule.lock:
            schedule.count("wait_event")
            if event.place is not None:
                merge(queue.clock, schedule.host_clock)
                merge(queue.clock, event.clock)
                schedule.enqueue(queue, event.place)

    def synchronize(self) -> None:
        """Wait for all that it has been given."""
        self._schedule.check_working()
        self._schedule.check_no_capture("synchronize")
        self._schedule.finish(self.queue)

    def begin_capture(self) -> None:
        """Begin to keep what it is given. The double knows only what must not be done meanwhile."""
        assert self.ptr != LEGACY, "cudaErrorStreamCaptureUnsupported"
        self._schedule.capturing.add(self.ptr)

    def end_capture(self) -> None:
        """End that."""
        self._schedule.capturing.remove(self.ptr)

    @property
    def done(self) -> bool:
        """Whether it has done all that it has been given. As in CuPy not if that will never be."""
        return self._schedule.stream_query(self.ptr) == SUCCESS

    def __enter__(self) -> Stream:
        here = self._schedule.current_device()
        if self.device_id not in (-1, here):
            raise RuntimeError(f"a stream of GPU {self.device_id}, and the current GPU is {here}")
        self._schedule.current_streams(here).append(self)
        return self

    def __exit__(self, *args: object) -> None:
        device_id = self._schedule.current_device() if self.device_id < 0 else self.device_id
        self._schedule.current_streams(device_id).pop()


class ExternalStream(Stream):
    """Names a queue that belongs to other code, which may destroy it at any time."""

    schedule: Schedule

    def __init__(self, ptr: int) -> None:
        super().__init__(self.schedule, ptr, self.schedule.current_device())


class Event:
    """A point in a stream."""

    def __init__(self, schedule: Schedule, disable_timing: bool = False) -> None:
        self.device_id = schedule.current_device()
        self.clock: Clock = {}
        self.place: tuple[Queue, int] | None = None
        self._schedule = schedule
        self._times = not disable_timing
        self._time = 0
        self._is_destroyed = False
        self.ptr = id(self)  # of a living event
        schedule.events[self.ptr] = self

    def __del__(self) -> None:
        # The collector may call it before that of an object which refers to the event, and goes on to use it.
        self._is_destroyed = True

    def check(self) -> None:
        """Raise the driver's error if the event is destroyed."""
        if self._is_destroyed:
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: the event is destroyed")

    def pass_by(self) -> None:
        """Note that the stream comes by."""
        self._time = self._schedule.time

    def milliseconds_to(self, later: Event) -> float:
        """Return the time on the GPU from this event to another one.

        Raises:
            CUDARuntimeError: If one of them takes no times or was never recorded, or has not ended.
        """
        with self._schedule.lock:
            for event in (self, later):
                event.check()
                if not event._times or event.place is None:
                    raise CUDARuntimeError("cudaErrorInvalidResourceHandle: the event has no time")
                if event.place[0].executed <= event.place[1]:
                    raise CUDARuntimeError("cudaErrorNotReady: the event has not ended")
        return (later._time - self._time) / 1000

    @property
    def done(self) -> bool:
        """Whether the stream has come so far. As in CuPy not if it never will."""
        self.check()
        return self._schedule.event_query(self.ptr) == SUCCESS

    def synchronize(self) -> None:
        """Wait until the stream has come so far."""
        self._schedule.check_working()
        self._schedule.check_no_capture("synchronize")
        self.check()
        schedule = self._schedule
        with schedule.lock:
            schedule.count("synchronize")
            if self.place is not None:
                schedule.run(*self.place)
            merge(schedule.host_clock, self.clock)


class Schedule:
    """When the work of all streams runs, and which accesses to memory race.

    Args:
        seed: Decides when work runs.
        devices: How many GPUs there are.
        per_thread: The default stream is the per-thread one (``CUPY_CUDA_PER_THREAD_DEFAULT_STREAM=1``).

    Attributes:
        races: What was found, in words.
        calls: How often functions were called, by name.
        label: Names what lies at an address, for :attr:`races`; ``None`` if it does not know.
        eager: Work on the legacy default stream runs at once.
        eagerness: How likely other work is to run before it must, between 0 and 1.
        broken: The ``cudaError_t`` that all calls have from now on, as after a kernel that failed; 0 for none.
        events: The living events by their numbers.
        capturing: The numbers of the streams of which a graph is captured.
    """

    def __init__(self, seed: int, devices: int, per_thread: bool) -> None:
        self.lock = Lock()
        self.races: list[str] = []
        self.calls: Counter[str] = Counter()
        self.label: Callable[[int], str | None] = lambda address: None
        self.host_clock: Clock = {}
        self.accesses = Accesses()
        self.eager = False
        self.broken = SUCCESS
        self.capturing: set[int] = set()
        self.events: weakref.WeakValueDictionary[int, Event] = weakref.WeakValueDictionary()
        self.time = 0  # a microsecond for each thing that is done
        self._random = random.Random(seed)
        self.eagerness = self._random.choice((0.0, 0.0, 0.1, 0.6))
        self._local = threading.local()
        self._legacy = [
            Queue("the computing stream" + (f" of GPU {i}" if i else ""), i) for i in range(devices)
        ]
        self._queues: dict[int, Queue] = {}
        self._of_threads: list[Queue] = []
        self._destroyed: list[int] = []
        self._busy: dict[Queue, None] = {}
        self.external_type = type("ExternalStream", (ExternalStream,), {"schedule": self})
        self._default = Stream(self, PER_THREAD if per_thread else LEGACY, -1)

    # Streams.

    def new_stream(
        self, non_blocking: bool = False, null: bool = False, ptds: bool = False
    ) -> Stream:
        """Make a stream of the current GPU. As the driver does, give it the number of one that is gone."""
        if null or ptds:
            return Stream(self, LEGACY if null else PER_THREAD, -1)
        with self.lock:
            here = self.current_device()
            for ptr in self._destroyed:
                if self._queues[ptr].device_id == here:
                    self._destroyed.remove(ptr)
                    break
            else:
                ptr = 0x1000 + len(self._queues)
                kind = "non-blocking " if non_blocking else ""
                self._queues[ptr] = Queue(f"{kind}stream {len(self._queues) + 1}", here)
            stream = Stream(self, ptr, here)
            # One that its owner has destroyed still does what it was given.
            weakref.finalize(stream, self._destroyed.append, ptr)
            return stream

    def get_current_stream(self, device_id: int = -1) -> Stream:
        """Return the calling thread's current stream on a GPU, the current one by default."""
        streams = self.current_streams(self.current_device() if device_id < 0 else device_id)
        return streams[-1] if streams else self._default

    def current_streams(self, device_id: int) -> list[Stream]:
        """Return the streams that the calling thread has entered on a GPU, the innermost last."""
        table: dict[int, list[Stream]] = self._local.__dict__.setdefault("streams", {})
        return table.setdefault(device_id, [])

    def queue_of(self, ptr: int) -> Queue:
        """Return the queue behind the number of a stream."""
        here = self.current_device()
        if ptr == LEGACY:
            return self._legacy[here]
        if ptr != PER_THREAD:
            if ptr in self._destroyed:
                self.races.append(f"{self._queues[ptr].name} is used after it was destroyed")
                raise CUDARuntimeError("cudaErrorInvalidResourceHandle: the stream is destroyed")
            return self._queues[ptr]
        own: dict[int, Queue] = self._local.__dict__.setdefault("own", {})
        if here not in own:
            with self.lock:
                number = len(self._of_threads) + 1
                own[here] = Queue(f"the default stream of thread {number}", here)
                self._of_threads.append(own[here])
        return own[here]

    def check_working(self) -> None:
        """Raise the error of a kernel that failed before."""
        if self.broken:
            raise CUDARuntimeError(self.broken)

    def is_capturing(self, ptr: int) -> bool:
        """Return whether a graph is captured of a stream."""
        self.check_working()
        self.count("streamIsCapturing")
        return ptr in self.capturing

    @property
    def capture_mode(self) -> int:
        """The calling thread's ``cudaStreamCaptureMode``."""
        return getattr(self._local, "capture_mode", 0)

    @capture_mode.setter
    def capture_mode(self, mode: int) -> None:
        self._local.capture_mode = mode

    def check_no_capture(self, name: str, stream: int | None = None) -> None:
        """Raise, and count a call among :attr:`races`, if a graph is captured: it would belong to it, or spoil it.

        In the relaxed mode a thread may ask and wait, and may use streams that are not captured.
        """
        waits = name in ("deviceSynchronize", "cuCtxSynchronize")
        is_allowed = self.capture_mode == RELAXED and stream not in self.capturing and not waits
        if self.capturing and not is_allowed:
            self.races.append(f"{name} while a graph is captured")
            raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {name}")

    def event_query(self, ptr: int) -> int:
        """Return the status of an event: whether its stream has come so far, or an error."""
        self.check_no_capture("eventQuery")
        event = self.events.get(ptr)
        if self.broken or event is None or event._is_destroyed:
            return self.broken or INVALID_HANDLE
        with self.lock:
            self.pass_time()
            if event.place is not None and event.place[0].executed <= event.place[1]:
                return NOT_READY
            merge(self.host_clock, event.clock)
            return SUCCESS

    def stream_query(self, ptr: int) -> int:
        """Return the status of a stream: whether it has done all that it has been given, or an error."""
        self.check_no_capture("streamQuery")
        queue = self.queue_of(ptr)
        if self.broken:
            return self.broken
        with self.lock:
            self.pass_time()
            if queue.items:
                return NOT_READY
            merge(self.host_clock, queue.clock)
            return SUCCESS

    def arena_of(self, stream: Stream) -> int:
        """Return what CuPy's pool keeps free blocks by: the stream's number, for the per-thread one the thread's."""
        return -id(stream.queue) if stream.ptr == PER_THREAD else stream.ptr

    def current_device(self) -> int:
        """Return the calling thread's current GPU."""
        return int(getattr(self._local, "device", 0))

    @contextlib.contextmanager
    def device(self, device_id: int) -> Iterator[None]:
        """Make a GPU the calling thread's current one."""
        outer, self._local.device = self.current_device(), device_id
        try:
            yield
        finally:
            self._local.device = outer

    # Work.

    def kernel(
        self,
        name: str,
        reads: Spans,
        writes: Spans,
        run: Callable[[], object] = lambda: None,
        queue: Queue | None = None,
    ) -> None:
        """Put work on a stream.

        Args:
            name: For :attr:`races`.
            reads: What it reads.
            writes: What it writes.
            run: Does it.
            queue: That of the current stream if left out.
        """
        with self.lock:
            queue = self.get_current_stream().queue if queue is None else queue
            self.pass_time()
            merge(queue.clock, self.host_clock)
            number = self.tick(queue)
            for spans, is_write in ((reads, False), (writes, True)):
                for address, size in spans:
                    access = Access(name, queue.name, number, is_write, address, address + size)
                    self.note(access, queue.clock)
            self.enqueue(queue, run)

    def note(self, access: Access, clock: Clock) -> None:
        """Count an access, and every earlier one that it races with among :attr:`races`."""
        for other in self.accesses.add(access, clock):
            label = self.label(access.start) or self.label(other.start) or "memory"
            verb = "writes" if access.is_write else "reads"
            was = "writes" if other.is_write else "reads"
            self.races.append(
                f"{access.name} {verb} {label} on {access.actor} while {other.name} {was} it on {other.actor}: "
                f"{access.actor} does not wait for {other.actor}"
            )

    def check(self) -> None:
        """Run all that is put off, and raise an ``AssertionError`` if there were races."""
        self.synchronize()
        assert not self.races, "\n".join(self.races)

    def synchronize(self, device_id: int | None = None) -> None:
        """Wait for one GPU, or for all."""
        with self.lock:
            for queue in (*self._legacy, *self._queues.values(), *self._of_threads):
                if device_id in (None, queue.device_id):
                    self.finish(queue)

    def finish(self, queue: Queue) -> None:
        """Wait for a queue."""
        with self.lock:
            self.run(queue, queue.executed + len(queue.items) - 1)
            merge(self.host_clock, queue.clock)

    def count(self, name: str) -> None:
        """Count a call."""
        self.calls[name] += 1

    def tick(self, queue: Queue) -> int:
        """Count an act of a queue."""
        queue.clock[queue.name] = queue.clock.get(queue.name, 0) + 1
        return queue.clock[queue.name]

    def enqueue(self, queue: Queue, item: Callable[[], object] | tuple[Queue, int]) -> int:
        """Append work. Returns its place."""
        queue.items.append(item)
        self._busy[queue] = None
        index = queue.executed + len(queue.items) - 1
        if self.eager and queue in self._legacy:
            self.run(queue, index)
        return index

    def run(self, queue: Queue, index: int) -> None:
        """Run what a queue was given up to a place, and what that waits for."""
        while queue.executed <= index:
            item = queue.items.popleft()
            queue.executed += 1
            self.time += 1
            if isinstance(item, tuple):
                self.run(*item)
            else:
                item()
        if not queue.items:
            self._busy.pop(queue, None)

    def pass_time(self) -> None:
        """Let some work run that need not yet, or none."""
        while self._random.random() < self.eagerness:
            if not self._busy:
                return
            queue = self._random.choice(list(self._busy))
            item = queue.items[0]
            if not isinstance(item, tuple) or item[0].executed > item[1]:
                self.run(queue, queue.executed)
