"""Chainer's iterator of worker processes, with less to hand over and no waiting for dead workers.

Order, state and prefetching thread are Chainer's. Two things are not:

- Workers put examples where they belong in a batch that lies in shared memory, and send back nothing.
  Chainer's send a pickled description of each array; for small images that takes longer than loading.
- Chainer waits for ever for an example whose worker was killed, by the system when memory ran
  out for instance, and so do the other workers of a pool if it held their lock. Here each has a pipe of its own, and
  when one ends, every batch from then on is one ``BadExample`` that says so.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection, util
from multiprocessing.sharedctypes import RawArray
from typing import Any, NamedTuple

import numpy
import stop_signals
from chainer.iterators import MultiprocessIterator, _statemachine, multiprocess_iterator
from errors import InputError
from launcher import STOP_SIGNALS

from datasets.preprocessed import BadExample, PreprocessedImages

_POLL = 0.2
"""Seconds between two looks whether it is over."""
_DYING = 5.0
"""Seconds after which a killed worker, in the hands of a storage perhaps, is not waited for any longer."""
_AHEAD = 2
"""Tasks that a worker has at a time, so that it need not wait for the next."""

Others = list[tuple[int, Any]]
"""Rows of a batch and their examples, where these are not the arrays that there is room for."""


class _Field(NamedTuple):
    """Where the batch of one array of the examples is.

    Attributes:
        shape: Of one example.
        dtype: Its type.
        offset: Byte at which the batch begins.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int


class _Slab:
    """A batch in shared memory.

    Args:
        example: What the examples are like: a tuple of arrays.
        n: Number of examples.
    """

    def __init__(self, example: tuple[numpy.ndarray, ...], n: int) -> None:
        self.n = n
        self.fields: list[_Field] = []
        size = 0
        for array in example:
            self.fields.append(_Field(array.shape, array.dtype.str, size))
            size += -(-n * array.nbytes // 64) * 64
        self.memory = RawArray(ctypes.c_uint8, max(size, 1))

    def arrays(self) -> list[numpy.ndarray]:
        """Returns the batch of each array of the examples, (n, ...)."""
        return [
            numpy.ndarray((self.n, *f.shape), f.dtype, self.memory, f.offset) for f in self.fields
        ]

    def fits(self, example: Any) -> bool:
        """Whether an example has the arrays that there is room for."""
        if not isinstance(example, tuple) or len(example) != len(self.fields):
            return False
        return all(
            isinstance(a, numpy.ndarray) and a.shape == f.shape and a.dtype.str == f.dtype
            for a, f in zip(example, self.fields, strict=True)
        )


def _work(pipe: connection.Connection, dataset: PreprocessedImages, slab: _Slab) -> None:
    """Loads what the pipe asks for, in a worker, until the training process is gone."""
    for number in STOP_SIGNALS:  # they are for the training process
        signal.signal(number, signal.SIG_IGN)
    arrays = slab.arrays()
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    with suppress(EOFError, OSError):
        while pipe in connection.wait([pipe, trainer.sentinel]):
            pipe.send(_load(dataset, slab, arrays, *pipe.recv()))


def _load(
    dataset: PreprocessedImages,
    slab: _Slab,
    arrays: list[numpy.ndarray],
    first: int,
    indices: list[int],
) -> Others:
    """Puts examples into the rows from the first on; returns those that are no such arrays."""
    others = []
    for row, index in enumerate(indices, first):
        try:
            example = dataset[index]
        except Exception as e:  # it would end the worker
            example = BadExample(f"example {index}: {type(e).__name__}: {e}")
        if slab.fits(example):
            for batch, array in zip(arrays, example, strict=True):
                batch[row] = array
        else:
            others.append((row, example))
    return others


class _Workers:
    """Processes that load examples.

    Args:
        n: How many.
        dataset: The examples.
        slab: Where to put them.
    """

    def __init__(self, n: int, dataset: PreprocessedImages, slab: _Slab) -> None:
        self._of: dict[connection.Connection, Any] = {}
        processes: list[Any] = []
        # They ignore SIGTERM, by which Python would end them, and then wait for ever.
        self.terminate = util.Finalize(self, _kill, (processes,), exitpriority=15)
        for _ in range(n):
            pipe, theirs = multiprocessing.Pipe()
            process = multiprocessing.Process(
                target=_work, args=(theirs, dataset, slab), daemon=True
            )
            with stop_signals.kept_from_children():
                process.start()
            theirs.close()
            processes.append(process)
            self._of[pipe] = process

    def load(
        self, tasks: list[tuple[int, list[int]]], stopped: Callable[[], bool]
    ) -> Others | None:
        """Lets the workers fill the slab.

        Args:
            tasks: First row, and indices of the examples from there on.
            stopped: Whether to leave off.

        Returns:
            What did not fit; None if it was stopped.

        Raises:
            ChildProcessError: A worker has ended; the message says which one and how.
        """
        others: Others = []
        left = iter(tasks)
        free, busy = [*self._of] * _AHEAD, []
        while True:
            for pipe, task in zip(free, left, strict=False):
                self._use(pipe, pipe.send, task)
                busy.append(pipe)
            if not busy:
                return others
            while not (free := connection.wait({*busy}, _POLL)):
                if stopped():
                    return None
            for pipe in free:
                others += self._use(pipe, pipe.recv)
                busy.remove(pipe)

    def _use(self, pipe: connection.Connection, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except (EOFError, OSError) as e:
            raise ChildProcessError(_obituary(self._of[pipe])) from e


def _obituary(process: Any) -> str:
    process.join(_DYING)
    name, status = f"loader process {process.pid}", process.exitcode
    if status == -signal.SIGKILL:
        return (
            f"{name} was killed, perhaps because memory ran out; use fewer of them (--loaderjob/-j), "
            f"or threads"
        )
    how = f"exit status {status}" if status is None or status >= 0 else f"signal {-status}"
    return f"{name} ended ({how}); load with --iterator serial to see why"


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(_DYING)


class _Loop(multiprocess_iterator._PrefetchLoop):
    """Chainer's prefetching, with the batch in a slab."""

    def __init__(self, slab: _Slab, *args: Any) -> None:
        self.slab = slab
        self._error: BadExample | None = None
        super().__init__(*args)

    def measure_required(self) -> bool:
        return False

    def _allocate_shared_memory(self) -> None:
        pass  # the slab is there already

    def launch_thread(self) -> threading.Thread:
        self._pool = _Workers(self.n_processes, self.dataset, self.slab)
        self._thread = threading.Thread(target=self._run, name="prefetch_loop", daemon=True)
        self._thread.start()
        return self._thread

    def _run(self) -> None:
        while not self._terminating and self._task():
            pass

    def _task(self) -> bool:
        status, state, reset_count = self._comm.check()
        if status == self._comm.STATUS_TERMINATE:
            return False
        if status == self._comm.STATUS_RESET:
            self.prefetch_state = state
        self.prefetch_state, indices = _statemachine.iterator_statemachine(
            self.prefetch_state, self.batch_size, self.repeat, self.order_sampler, len(self.dataset)
        )
        batch = None
        if indices is not None:
            batch = self._load(indices.tolist())
            if batch is None:
                return False
        self._comm.put(batch, self.prefetch_state, reset_count)
        return True

    def _load(self, indices: list[int]) -> list[Any] | None:
        """Returns the batch, or None if it is over."""
        share = max(-(-len(indices) // (4 * self.n_processes)), 1)
        tasks = [(i, indices[i : i + share]) for i in range(0, len(indices), share)]
        if self._error is None:
            try:
                others = self._pool.load(tasks, lambda: self._comm.is_terminated)
            except Exception as e:  # it would end the thread that the training waits for
                self._error = BadExample(str(e) or type(e).__name__)
        if self._error is not None:
            return [self._error]
        if others is None:
            return None
        # One copy of each array of the whole batch: the workers go on to the next.
        arrays = [array[: len(indices)].copy() for array in self.slab.arrays()]
        batch = [tuple(array[i, ...] for array in arrays) for i in range(len(indices))]
        for row, example in others:
            batch[row] = example
        return batch


class ProcessIterator(MultiprocessIterator):
    """The iterator; see ``chainer.iterators.MultiprocessIterator`` for its arguments.

    Args:
        dataset: The examples; workers get copies of it.
        batch_size: Examples per batch.
        **options: ``n_processes``, ``repeat``, ``shuffle``, ``order_sampler``, ``n_prefetch``.

    Raises:
        InputError: Processes would be forked although there is an MPI communicator.
    """

    def __init__(self, dataset: PreprocessedImages, batch_size: int, **options: Any) -> None:
        if "mpi4py.MPI" in sys.modules and multiprocessing.get_start_method() == "fork":
            raise InputError(
                "iterator process: worker processes cannot be forked once there is an MPI "
                "communicator; call start_worker_server() before, or use iterator thread"
            )
        # A slow storage is not a fault, and a dead worker is noticed otherwise.
        super().__init__(dataset, batch_size, dataset_timeout=None, **options)

    def _initialize_loop(self) -> None:
        super()._initialize_loop()
        examples = (self.dataset[i] for i in range(min(len(self.dataset), 8)))
        example = next((e for e in examples if not isinstance(e, BadExample)), ())
        self._prefetch_loop = _Loop(
            _Slab(example, self.batch_size),
            self.dataset,
            self.batch_size,
            self.repeat,
            self.n_processes,
            self.n_prefetch,
            0,
            self._comm,
            self.order_sampler,
            False,
            None,
        )
