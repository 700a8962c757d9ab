"""Snapshots from which a run continues bit for bit.

A snapshot is a folder ``snapshot_iter_N``: ``trainer.npz`` from rank 0 (model, optimizer, updater,
extensions), ``rank_K.npz`` from each rank (order and position of its examples, its random states,
its batch-normalization statistics), and ``manifest.json`` with the sizes and checksums of these
files. It is written under another name and renamed when every rank has written its part, and
renamed again before it is removed: whenever ranks die, a folder of this name is complete.
"""

from __future__ import annotations

import json
import random
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chainer
import numpy
from chainer import training
from errors import InputError
from snapshot_files import (
    MANIFEST,
    find_snapshots,
    fingerprint,
    load_npz,
    remove,
    sync_folder,
    write_npz,
)
from world import World


def _persistents(model: chainer.Link) -> Iterator[tuple[str, chainer.Link, str]]:
    for path, link in model.namedlinks():
        for name in sorted(link._persistent):
            yield f"{path}/{name}", link, name


class Damaged(InputError):
    """A snapshot is not as it was written."""


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
        name, keys, *rest = numpy.random.get_state(legacy=True)
        keys = states("numpy_keys", keys)
        position, has_gauss, gauss = json.loads(states("numpy", json.dumps(rest)))
        version, numbers, normal = json.loads(states("python", json.dumps(random.getstate())))
        if isinstance(serializer, chainer.Deserializer):
            if type(position) is not int or not 0 <= position <= len(keys):
                # NumPy does not look, and would read behind the numbers
                raise ValueError(f"random numbers cannot go on from position {position}")
            numpy.random.set_state((name, keys, position, has_gauss, gauss))
            random.setstate((version, tuple(numbers), normal))


class Snapshots(training.Extension):
    """Writes and reads snapshots; as an extension it writes one whenever its trigger fires.

    Args:
        world: The ranks.
        out: Folder in which to write, which all ranks see.
        state: This rank's state.
        meta: What a run that continues must have in common with this one: JSON values.
        seed: The run's seed.
        gpu: Whether the model is on a GPU.
        keep: Number of snapshots to keep; 0: all.
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
        keep: int,
    ) -> None:
        self._world = world
        self._out = out
        self._state = state
        self._meta = meta
        self._seed = seed
        self._gpu = gpu
        self._keep = keep
        self._written: list[Path] = []
        self.latest: Path | None = None
        if world.rank == 0:  # what ranks that were killed have left
            for pattern in (".snapshot_iter_*.partial", ".snapshot_iter_*.removed"):
                for folder in out.glob(pattern):
                    shutil.rmtree(folder, ignore_errors=True)

    def __call__(self, trainer: training.Trainer) -> None:
        """Writes a snapshot of ``trainer``. Collective.

        Raises:
            InputError: It cannot be written, for instance because the disk is full.
        """
        final = self._out / f"snapshot_iter_{trainer.updater.iteration}"
        if final == self.latest:
            return
        token = self._world.broadcast(secrets.token_hex(8))
        partial = self._out / f".{final.name}.{token}.partial"
        try:
            self._write(trainer, partial, final)
        except InputError:
            if self._world.rank == 0:  # a disk that is full has room again for the reports
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _write(self, trainer: training.Trainer, partial: Path, final: Path) -> None:
        """Writes a snapshot as ``partial``, and renames it when it is complete. Collective."""
        world, iteration = self._world, trainer.updater.iteration
        self._reseed_gpu(iteration)
        mine: dict[str, list[int]] = {}
        with world.together():
            try:
                partial.mkdir(exist_ok=True)
                name = f"rank_{world.rank}.npz"
                mine[name] = write_npz(partial / name, self._state)
                if world.rank == 0:
                    mine["trainer.npz"] = write_npz(partial / "trainer.npz", trainer)
            except OSError as e:
                raise InputError(self._cannot_write(e)) from e
        files = {name: f for part in world.gather(mine) for name, f in part.items()}
        with world.together():
            if world.rank == 0:
                self._publish(
                    partial, final, {"iteration": iteration, **self._meta, "files": files}
                )
        self.latest = final

    def _publish(self, partial: Path, final: Path, manifest: dict[str, Any]) -> None:
        """Gives a complete snapshot its name, and removes old ones."""
        for name, (size, _) in manifest["files"].items():
            path = partial / name
            if not path.is_file() or path.stat().st_size != size:
                raise InputError(
                    f"--out {self._out}: rank 0 does not see {name} of another rank; use a folder "
                    f"that all machines share"
                )
        try:
            with open(partial / MANIFEST, "x") as f:
                f.write(json.dumps(manifest, indent=1) + "\n")
            sync_folder(partial)
            remove(final)
            partial.rename(final)
            sync_folder(self._out)
        except OSError as e:
            raise InputError(self._cannot_write(e)) from e
        self._written.append(final)
        while self._keep and len(self._written) > self._keep:
            remove(self._written.pop(0))

    def _cannot_write(self, e: OSError) -> str:
        return (
            f"--out {self._out}: cannot write a snapshot ({e.strerror or e}); free space or correct "
            f"the folder, and run the same command with --resume auto"
        )

    def load(self, trainer: training.Trainer, path: Path) -> None:
        """Continues from the snapshot ``path``. Collective.

        Raises:
            InputError: It is not a snapshot, is damaged, or is of a different run; the same error
                on every rank.
        """
        with self._world.together():
            try:
                self._check(path)
            except Damaged as e:
                raise InputError(
                    f"{e}; continue from another snapshot, or with --resume auto"
                ) from e
            load_npz(path / "trainer.npz", trainer, "--resume")
            load_npz(path / f"rank_{self._world.rank}.npz", self._state, "--resume")
        self._reseed_gpu(trainer.updater.iteration)
        if path.parent.resolve() == self._out.resolve():
            self.latest = path
            number = trainer.updater.iteration
            older = [p for p in find_snapshots(self._out) if int(p.name.split("_")[-1]) <= number]
            self._written = older[::-1]

    def load_latest(self, trainer: training.Trainer) -> tuple[Path | None, list[str]]:
        """Continues from the latest snapshot in the folder that is complete on all ranks. Collective.

        Returns:
            The snapshot, None if there is none, and why later ones cannot be used.

        Raises:
            InputError: It is of a different run.
        """
        damaged = []
        for path in self._world.broadcast(find_snapshots(self._out)):
            error = None
            try:
                self._verify(path)
            except InputError as e:
                error = str(e)
            try:
                self._world.agree(error)
            except InputError as e:
                damaged.append(str(e))
                continue
            self.load(trainer, path)
            return path, damaged
        return None, damaged

    def _manifest(self, path: Path) -> dict[str, Any]:
        if not (path / MANIFEST).is_file():  # a pipe, or a device, would be read for ever
            raise InputError(
                f"--resume {path}: not a snapshot; give a folder snapshot_iter_N of a result, or auto"
            )
        try:
            manifest = json.loads((path / MANIFEST).read_text())
        except (OSError, ValueError, RecursionError) as e:
            raise Damaged(f"--resume {path}: {MANIFEST} in it is damaged") from e
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
            raise Damaged(f"--resume {path}: {MANIFEST} in it is damaged")
        return manifest

    def _verify(self, path: Path) -> None:
        """Raises Damaged when what this rank needs is not as it was written."""
        files = self._manifest(path)["files"]
        for name in ("trainer.npz", f"rank_{self._world.rank}.npz"):
            if name not in files and name != "trainer.npz":
                continue  # a snapshot of fewer ranks, which `_check` says
            if not (path / name).is_file():
                raise Damaged(f"--resume {path / name}: damaged (no such file)")
            try:
                if fingerprint(path / name) != files.get(name):
                    raise Damaged(f"--resume {path / name}: damaged")
            except OSError as e:
                raise Damaged(f"--resume {path / name}: damaged ({e.strerror})") from e

    def _check(self, path: Path) -> None:
        """Raises InputError when the snapshot is of another run or damaged."""
        manifest = self._manifest(path)
        for key, mine in self._meta.items():
            if manifest.get(key) != mine:
                raise InputError(
                    f"--resume {path}: was made with {key} {manifest.get(key)}, this run has "
                    f"{mine}; use the same {key}"
                )
        self._verify(path)

    def _reseed_gpu(self, iteration: int) -> None:
        # cuRAND's state cannot be read. Seeding at each snapshot, whether it is written or read,
        # lets a run that continues draw what the uninterrupted one draws.
        if self._gpu:
            sequence = numpy.random.SeedSequence([self._seed, self._world.rank, iteration])
            chainer.backends.cuda.cupy.random.seed(int(sequence.generate_state(1)[0]))
