"""Trains a small net on every rank with most of ChainerMN; run under mpiexec by test_chainermn.py.

Prints one JSON line per rank, preceded by a line break as ranks share one output.
"""

import json
import os
import sys
import warnings

import chainer
import chainermn
import numpy as np
from chainer import datasets, iterators, optimizers, training
from chainer import links as L


def main(name: str, out: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        comm = chainermn.create_communicator(name)
    rng = np.random.RandomState(0)
    data = None
    if comm.rank == 0:
        x = rng.randn(48, 5).astype(np.float32)
        data = datasets.TupleDataset(x, (x[:, 0] > 0).astype(np.int32))
    data = chainermn.scatter_dataset(data, comm, shuffle=True, seed=0)

    model = L.Classifier(L.Linear(5, 2))
    optimizer = chainermn.create_multi_node_optimizer(optimizers.SGD(0.5), comm).setup(model)
    updater = training.StandardUpdater(iterators.SerialIterator(data, 4), optimizer)
    trainer = training.Trainer(updater, (4, "epoch"), out=out)
    validation = iterators.SerialIterator(data, 8, repeat=False, shuffle=False)
    evaluator = training.extensions.Evaluator(validation, model)
    trainer.extend(chainermn.create_multi_node_evaluator(evaluator, comm))
    trainer.extend(chainermn.extensions.AllreducePersistent(model, comm))
    checkpointer = chainermn.create_multi_node_checkpointer("test", comm, path=out)
    trainer.extend(checkpointer, trigger=(2, "epoch"))
    log = training.extensions.LogReport(filename=f"log{comm.rank}")
    trainer.extend(log)
    saved: list[str] = []  # the checkpointer removes them when the training is over
    trainer.extend(lambda _: saved.extend(os.listdir(out)), trigger=(4, "epoch"), name="saved")
    trainer.run()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Chainer calls it experimental
        shared = chainermn.iterators.create_multi_node_iterator(
            iterators.SerialIterator(np.arange(6, dtype=np.float32), 3, shuffle=False), comm
        )
    batch = [float(value) for value in shared.next()]
    result = {
        "rank": comm.rank,
        "size": comm.size,
        "communicator": type(comm).__name__,
        "warnings": [str(w.message) for w in caught if w.category is UserWarning],
        "weight": model.predictor.W.array.tolist(),
        "iterations": optimizer.t,
        "accuracy": [entry["validation/main/accuracy"] for entry in log.log],
        "saved": [file for file in saved if file.startswith(f"test.{comm.rank}.")],
        "batch": batch,
        "chainer": chainer.__version__,
    }
    comm.mpi_comm.Barrier()
    sys.stdout.write("\n" + json.dumps(result) + "\n")


main(*sys.argv[1:])
