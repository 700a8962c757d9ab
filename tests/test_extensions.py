"""OutOfCoreReport: the figures of each iteration in LogReport's file and PrintReport's table."""

from __future__ import annotations

import io
import json

import chainer
import numpy as np

import chainer_ooc
from chainer_ooc.extensions import OutOfCoreReport


def test_figures_of_each_iteration_are_logged(tmp_path):
    model = chainer.links.Classifier(
        chainer.Sequential(
            chainer.links.Linear(50, 400), chainer.functions.relu, chainer.links.Linear(400, 10)
        )
    )
    optimizer = chainer.optimizers.SGD().setup(model)
    data = chainer.datasets.TupleDataset(
        np.random.rand(600, 50).astype("f"), np.zeros(600, np.int32)
    )
    iterator = chainer.iterators.SerialIterator(data, 200)
    updater = chainer.training.StandardUpdater(iterator, optimizer)
    trainer = chainer.training.Trainer(updater, (6, "iteration"), str(tmp_path))
    extensions = chainer.training.extensions
    trainer.extend(OutOfCoreReport())
    trainer.extend(extensions.LogReport(trigger=(2, "iteration")))
    table = io.StringIO()
    names = ["iteration", "main/loss", "ooc/bytes_out", "ooc/stall_seconds"]
    trainer.extend(extensions.PrintReport(names, out=table))
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1):
        before = chainer_ooc.stats()
        trainer.run()
        after = chainer_ooc.stats()
    log = json.loads((tmp_path / "log").read_text())
    assert len(log) == 3
    for name in ("bytes_out", "bytes_in", "storages_out", "stall_fetch_seconds"):
        total = 2 * sum(entry[f"ooc/{name}"] for entry in log)
        assert np.isclose(total, getattr(after, name) - getattr(before, name)), name
        assert total > 0
    for entry in log:
        assert entry["ooc/bytes_out"] >= 200 * 400 * 4
        assert entry["ooc/peak_bytes"] > 50 << 20
        assert entry["ooc/stall_seconds"] >= entry["ooc/stall_fetch_seconds"]
        assert 0 <= entry["ooc/overlap_percent"] <= 100
    assert "ooc/bytes_out" in table.getvalue()
