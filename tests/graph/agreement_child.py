"""Trains on every rank under a limit; run under mpiexec by test_agreement.py.

Prints one JSON line per rank: the plan that the last iteration followed, and the parameters.
"""

import json

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.extensions import AgreeOnPlans
from chainer_ooc.graph.iteration import tracker_of
from chainer_ooc.planning import plan_cache
from chainer_ooc.swap.devices.ram import RamDevice

OTHER, LIMIT = 8 << 20, (8 << 20) + (1300 << 10)


def forward(model, x):
    for link in model[:-1]:
        x = F.relu(link(x))
    return F.sum(model[-1](x))


def main() -> None:
    plan_cache._WORSE = float("inf")  # on a busy machine any iteration may be slow
    RamDevice.used_bytes = lambda self: (
        OTHER
        + sum(
            storage.nbytes
            for storage in state.process.managers["ram"].storages()
            if storage.owner is not None
        )
    )
    communicator = chainermn.create_communicator("naive")
    model = chainer.Sequential(*[L.Convolution2D(8, 8, 3, pad=1) for _ in range(8)])
    optimizer = chainermn.create_multi_node_optimizer(
        chainer.optimizers.SGD(1e-4), communicator
    ).setup(model)
    data = np.random.RandomState(communicator.rank).rand(64, 8, 32, 32).astype("f")
    updater = chainer.training.StandardUpdater(
        chainer.iterators.SerialIterator(data, 4),
        optimizer,
        loss_func=lambda x: forward(model, x),
    )
    trainer = chainer.training.Trainer(updater, (9, "iteration"), "out")
    trainer.extend(AgreeOnPlans(communicator))
    with chainer_ooc.out_of_core_mode(limit=LIMIT, min_bytes=1):
        trainer.run()
    (entry,) = tracker_of(state.process.managers["ram"]).plan_cache.entries.values()
    result = {
        "plan": json.loads(entry.plan.to_json()),
        "bytes_in": chainer_ooc.stats().bytes_in,
        "parameters": [float(abs(p.array).sum()) for p in model.params()],
    }
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
