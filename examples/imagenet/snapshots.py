"""Snapshots from which a run continues bit for bit.

A snapshot is a folder ``snapshot_iter_N``: ``trainer.npz`` from rank 0 (model, optimizer, updater,
extensions), ``rank_K.npz`` from each rank (order and position of its examples, its random states,
its batch-normalization statistics), and ``meta.json``. It is written under another name and
renamed when every rank has written its part.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chainer
import numpy
from chainer import training
from errors import InputError
from world import World

KEEP = 2
"""Number of snapshots of a run to keep."""


def _persistents(model: chainer.Link) -> Iterator[tuple[str, chainer.Link, str]]:
    for path, link in model.namedlinks():
        for name in sorted(link._persistent):
            yield f"{path}/{name}", link, name


class RankState:
    """What differs from rank to rank, in the form of Chainer's serializers.

    Args:
        iterator: Iterator of the training examples.
        model: The model, whose persistent values (such as running means) each rank has for itself.
    """

    def __init__(self, iterator: chainer.dataset.Iterator, model: chainer.Chain) -> None:
        self._iterator = iterator
        self._model = model

    def serialize(self, serializer: Any) -> None:
        """Saves or loads the state."""
        self._iterator.serialize(serializer["iterator"])
        values = serializer["persistent"]
        for key, link, name in _persistents(self._model):
            link.__dict__[name] = values(key, link.__dict__[name])
        states = serializer["random"]
        name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
        keys = states("numpy_keys", keys)
        rest = json.loads(states("numpy", json.dumps([position, has_gauss, gauss])))
        version, internal, gauss_next = random.getstate()
        python = json.loads(states("python", json.dumps([version, internal, gauss_next])))
        if isinstance(serializer, chainer.Deserializer):
            numpy.random.set_state((name, keys, *rest))
            random.setstate((python[0], tuple(python[1]), python[2]))


def _write_npz(path: Path, target: Any) -> None:
    with open(path, "wb") as f:
        # Uncompressed: parameters hardly compress, and the time is the training's.
        chainer.serializers.save_npz(f, target, compression=False)
        f.flush()
        os.fsync(f.fileno())


def load_npz(path: Path, target: Any, option: str) -> None:
    """Loads ``target`` from ``path``.

    Args:
        path: The file.
        target: An object with Chainer's ``serialize``.
        option: The option that named the file, for the error.

    Raises:
        InputError: The file is missing, damaged or of another model.
    """
    try:
        chainer.serializers.load_npz(str(path), target)
    except FileNotFoundError as e:
        raise InputError(f"{option} {path}: no such file") from e
    except KeyError as e:
        raise InputError(f"{option} {path}: is of another model: it has no {e}") from e
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{option} {path}: damaged, or not a file of this model ({reason})") from e


class Snapshots(training.Extension):
    """Writes and reads snapshots; as an extension it writes one whenever its trigger fires.

    Args:
        world: The ranks.
        out: Folder in which to write.
        state: This rank's state.
        meta: What a run that continues must have in common with this one: JSON values.
        seed: The run's seed.
        gpu: Whether the model is on a GPU.
    """

    priority = -100  # after everything that changes the trainer's state
    name = "Snapshots"

    def __init__(
        self,
        world: World,
        out: Path,
        state: RankState,
        meta: dict[str, Any],
        seed: int,
        gpu: bool,
    ) -> None:
        self._world = world
        self._out = out
        self._state = state
        self._meta = meta
        self._seed = seed
        self._gpu = gpu
        self._written: list[Path] = []
        self.latest: Path | None = None

    def __call__(self, trainer: training.Trainer) -> None:
        """Writes a snapshot of ``trainer``. Collective."""
        world = self._world
        iteration = trainer.updater.iteration
        final = self._out / f"snapshot_iter_{iteration}"
        if final == self.latest:
            return
        partial = self._out / f".{final.name}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        self._reseed_gpu(iteration)
        _write_npz(partial / f"rank_{world.rank}.npz", self._state)
        if world.rank == 0:
            _write_npz(partial / "trainer.npz", trainer)
            (partial / "meta.json").write_text(json.dumps(self._meta, indent=1))
        world.barrier()
        if world.rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._written.append(final)
            while len(self._written) > KEEP:
                shutil.rmtree(self._written.pop(0), ignore_errors=True)
        self.latest = final
        world.barrier()

    def load(self, trainer: training.Trainer, path: Path) -> None:
        """Continues from the snapshot ``path``.

        Raises:
            InputError: It is not a snapshot, is damaged, or is of a different run.
        """
        if not (path / "meta.json").is_file():
            raise InputError(
                f"--resume {path}: not a snapshot; give a folder snapshot_iter_N of a result"
            )
        try:
            meta = json.loads((path / "meta.json").read_text())
        except ValueError as e:
            raise InputError(f"--resume {path}: meta.json in it is damaged") from e
        for key, mine in self._meta.items():
            if meta.get(key) != mine:
                raise InputError(
                    f"--resume {path}: was made with {key} {meta.get(key)}, this run has {mine}; "
                    f"use the same {key}"
                )
        load_npz(path / "trainer.npz", trainer, "--resume")
        load_npz(path / f"rank_{self._world.rank}.npz", self._state, "--resume")
        self._reseed_gpu(trainer.updater.iteration)
        self.latest = path if path.parent.resolve() == self._out.resolve() else None

    def _reseed_gpu(self, iteration: int) -> None:
        # cuRAND's state cannot be read. Seeding at each snapshot, whether it is written or read,
        # lets a run that continues draw what the uninterrupted one draws.
        if self._gpu:
            sequence = numpy.random.SeedSequence([self._seed, self._world.rank, iteration])
            chainer.backends.cuda.cupy.random.seed(int(sequence.generate_state(1)[0]))
