"""Chainer's iterator of worker processes, with less to hand over and no waiting for dead workers.

Order, state, prefetching thread and pool are Chainer's. Two things are not:

- Workers put examples where they belong in a batch that lies in shared memory, and send back nothing.
  Chainer's send a pickled description of each array; for small images that takes longer than loading.
- Chainer waits for ever for an example whose worker was killed, by the system when memory ran
  out for instance. Here the batch is then one ``BadExample``.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import threading
from multiprocessing.sharedctypes import RawArray
from typing import Any, NamedTuple

import numpy
from chainer.iterators import MultiprocessIterator, _statemachine, multiprocess_iterator
from errors import InputError

from datasets.preprocessed import BadExample, PreprocessedImages

_POLL = 0.2
"""Seconds between two looks at the workers."""


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


_dataset: Any = None
_slab: Any = None
_arrays: list[numpy.ndarray] = []


def _start_worker(dataset: PreprocessedImages, slab: _Slab) -> None:
    global _dataset, _slab, _arrays
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process
    _dataset, _slab, _arrays = dataset, slab, slab.arrays()


def _load(task: tuple[int, list[int]]) -> list[tuple[int, Any]]:
    """Puts examples into the rows from the first on; returns those that are no such arrays."""
    first, indices = task
    others = []
    for row, index in enumerate(indices, first):
        try:
            example = _dataset[index]
        except Exception as e:  # it would end the thread that waits for the batch
            example = BadExample(f"example {index}: {type(e).__name__}: {e}")
        if _slab.fits(example):
            for batch, array in zip(_arrays, example, strict=True):
                batch[row] = array
        else:
            others.append((row, example))
    return others


class _Loop(multiprocess_iterator._PrefetchLoop):
    """Chainer's prefetching, with the batch in a slab."""

    def __init__(self, slab: _Slab, *args: Any) -> None:
        self.slab = slab
        self.workers: list[Any] = []
        super().__init__(*args)

    def measure_required(self) -> bool:
        return False

    def _allocate_shared_memory(self) -> None:
        pass  # the slab is there already

    def launch_thread(self) -> threading.Thread:
        self._pool = multiprocessing.Pool(
            self.n_processes, _start_worker, (self.dataset, self.slab)
        )
        self.workers = list(self._pool._pool)
        self._thread = threading.Thread(target=self._run, name="prefetch_loop", daemon=True)
        self._thread.start()
        return self._thread

    def worker_died(self) -> bool:
        """Whether the pool had to replace a worker; the example that it was loading is lost."""
        return any(worker not in self._pool._pool for worker in self.workers)

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
            others = self._fetch(indices.tolist())
            if others is None:
                return False
            # One copy of each array of the whole batch: the workers go on to the next.
            arrays = [array[: len(indices)].copy() for array in self.slab.arrays()]
            batch = [tuple(array[i, ...] for array in arrays) for i in range(len(indices))]
            for row, example in others:
                batch[row] = example
        self._comm.put(batch, self.prefetch_state, reset_count)
        return True

    def _fetch(self, indices: list[int]) -> list[tuple[int, Any]] | None:
        """Lets the workers fill the slab; returns what did not fit, or None if it is over."""
        share = -(-len(indices) // (4 * self.n_processes))
        tasks = [(i, indices[i : i + share]) for i in range(0, len(indices), max(share, 1))]
        future = self._pool.map_async(_load, tasks, chunksize=1)
        while True:
            try:
                return [other for others in future.get(_POLL) for other in others]
            except multiprocessing.TimeoutError:
                if self._comm.is_terminated:
                    return None


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

    def __next__(self) -> list[Any]:
        """Returns the next batch."""
        loop = self._prefetch_loop
        if loop.thread is None:
            loop.launch_thread()
        if not self._wait(loop):
            return [
                BadExample(
                    "a loader process was killed, perhaps because memory ran out; use fewer of "
                    "them (--loaderjob/-j), or threads"
                )
            ]
        return super().__next__()

    next = __next__

    def _wait(self, loop: _Loop) -> bool:
        """Waits for a batch; returns False if a worker died."""
        communicator = self._comm
        while True:
            with communicator._lock:
                if communicator._batch_queue or communicator._not_empty_cond.wait(_POLL):
                    return True
            if loop.worker_died():
                loop._pool.terminate()  # joining it would wait for the lost example
                return False
