"""Iterators: the same examples in the same order, whoever loads them.

``serial`` loads in the training process, ``thread`` in threads of it, which is best for large
JPEGs (decoding does not hold the interpreter's lock, and nothing is copied), ``process`` in
processes, which is best where augmentation in Python takes most of the time. Chainer's
iterators do the work; examples come back from processes through shared memory.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from typing import Any

import stop_signals
from chainer import iterators
from errors import InputError

from datasets.preprocessed import EpochOrder, PreprocessedImages
from datasets.process_iterator import ProcessIterator

ITERATORS = ("serial", "thread", "process")


def start_worker_server() -> None:
    """Starts the server that loader processes are forked from.

    Forking a process that has an MPI communicator or has used a GPU is not safe, so this
    comes before either, and before threads; calling it again does nothing.
    """
    if multiprocessing.get_start_method(allow_none=True) != "forkserver":
        multiprocessing.set_start_method("forkserver", force=True)
    # What the server has imported its workers need not import. It sees no sys.path, only the
    # environment, before Python 3.13.
    multiprocessing.set_forkserver_preload(["chainer_ooc", "chainer", "datasets.iterators"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        with stop_signals.kept_from_children():
            forkserver.ensure_running()
        process = multiprocessing.Process()
        process.start()
        process.join()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def make_iterator(
    dataset: PreprocessedImages,
    batchsize: int,
    *,
    iterator: str = "serial",
    workers: int = 1,
    repeat: bool = True,
    seed: tuple[int, ...] = (0,),
) -> Any:
    """Returns a Chainer iterator.

    Order and augmentation depend on the seeds, the epoch and the index alone, not on the kind
    of the iterator nor on the number of workers.

    Args:
        dataset: The examples.
        batchsize: Examples per batch.
        iterator: One of ``ITERATORS``; ``process`` under MPI needs ``start_worker_server`` first.
        workers: Number of threads or processes.
        repeat: Whether it goes on for ever, shuffled anew for each epoch; else once, in order.
        seed: Seeds of the order, e.g. (seed, rank).

    Raises:
        InputError: There is no such kind, or no worker.
    """
    if iterator not in ITERATORS:
        raise InputError(f"iterator {iterator!r}: allowed are {', '.join(ITERATORS)}")
    if iterator != "serial" and workers < 1:
        raise InputError(f"loaderjob {workers}: iterator {iterator} needs 1 or more")
    options: dict[str, Any] = {"repeat": repeat}
    if repeat:
        options["order_sampler"] = EpochOrder(len(dataset), seed)
    else:
        options["shuffle"] = False
    if iterator == "serial" or not len(dataset):
        return iterators.SerialIterator(dataset, batchsize, **options)
    if iterator == "thread":
        return iterators.MultithreadIterator(dataset, batchsize, n_threads=workers, **options)
    return ProcessIterator(dataset, batchsize, n_processes=workers, **options)
