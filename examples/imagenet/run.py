"""One training run: data, model, trainer, results."""

from __future__ import annotations

import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import chainer
import data
import devices
import models
import numpy
import optimizers
import out_of_core
import provenance
import reports
from chainer import training
from config import Config
from datasets.build import Data
from datasets.classes import fingerprint
from errors import InputError
from evaluation import AverageStatistics, Evaluator, RecomputeStatistics
from files import is_newer, whole_file
from folder_lock import FolderLock
from reports import KeepConfusion, megabytes
from snapshot_files import MANIFEST, find_snapshots, load_npz
from snapshots import RankState, Snapshots
from training import At, Stop, Updater
from world import World

from chainer_ooc.extensions import AgreeOnPlans


class Run:
    """A run of the trainer on this rank.

    Args:
        config: The settings.
        world: The ranks.
        gpu: Whether to train on GPUs.
        description: What to say about threads and devices.
        measurement: The measurement of an in-core step that has begun, if there is one.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        gpu: bool,
        description: str,
        measurement: out_of_core.Measurement | None = None,
    ) -> None:
        self.config = config
        self.world = world
        self.gpu = gpu
        self.description = description
        self._measurement = measurement
        self._lock = FolderLock(config.out)
        self.device = chainer.get_device(devices.device_name(config.gpu, world, gpu))

    def say(self, text: str) -> None:
        """Prints a line on rank 0."""
        if self.world.rank == 0:
            print(text, flush=True)

    def main(self) -> int:
        """Trains; returns the exit status. Collective.

        Raises:
            InputError: An input cannot be used; the same one on every rank.
        """
        config, world = self.config, self.world
        ranks = f"{world.size} rank{'s' if world.size > 1 else ''}"
        self.say(f"{ranks}, {self.description}")
        with world.together():
            models.check_insize(config.arch, config.insize)
            self._make_out()
            if world.rank == 0:
                self._lock.acquire()
        try:
            return self._main()
        finally:
            self._lock.release()

    def _main(self) -> int:
        config, world = self.config, self.world
        self.device.use()
        chainer.set_debug(config.debug)
        if config.dtype == "mixed16":
            chainer.global_config.dtype = chainer.mixed16
            # The loss scale grows until that happens, and then shrinks; it is no fault.
            warnings.filterwarnings("ignore", "Non finite number found in param.grad")
        chainer.global_config.label_smoothing = config.label_smoothing
        random.seed(config.seed * 65536 + world.rank)
        numpy.random.seed([config.seed, world.rank])
        images = data.load(config, world, self.say)
        model = self._model()
        in_core_peak = self._enable_out_of_core()
        trainer = self._trainer(images, model)
        snapshot = self._resume(trainer)
        if snapshot is not None and self.stop.reached(trainer):
            self.say(f"the training is done: {trainer.updater.iteration} iterations")
            self._complete(trainer, model, in_core_peak, snapshot)
            return 0
        self._save_provenance(images)
        self.stop.listen()
        trainer.run(show_loop_exception_msg=False)
        return self._finish(trainer, model, in_core_peak)

    def _make_out(self) -> None:
        try:
            self.config.out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(
                f"--out {self.config.out}: cannot make this folder ({e.strerror}); choose another"
            ) from e
        try:
            with tempfile.TemporaryFile(dir=self.config.out):
                pass
        except OSError as e:
            raise InputError(
                f"--out {self.config.out}: cannot write into this folder ({e.strerror}); choose another"
            ) from e

    def _save_provenance(self, images: Data) -> None:
        with self.world.together():
            if self.world.rank == 0:
                self.environment = provenance.environment(self.world, self.gpu)
                provenance.save(self.config, self.environment, self.config.out)
                provenance.save_classes(images.classes, self.config.out)

    # -- model and trainer -----------------------------------------------------------------------

    def _model(self) -> chainer.Chain:
        config = self.config
        model = models.create(config.arch, config.insize, config.n_classes)
        if config.initmodel:
            with self.world.together():
                load_npz(config.initmodel, model, "--initmodel")
            self.say(f"model: parameters from {config.initmodel}")
        model.to_device(self.device)
        if self.world.comm is not None:
            self.world.comm.bcast_data(model)  # every rank starts from rank 0's parameters
        self.say(
            f"model: {config.arch}, insize {config.insize}, {model.count_params() / 1e6:.1f} M "
            f"parameters; {config.batchsize} images per rank and iteration"
        )
        return model

    def _enable_out_of_core(self) -> int | None:
        peak = out_of_core.enable(self.config, self.world, self._measurement)
        if self.config.ooc:
            limit = megabytes(out_of_core.limit_bytes())
            if peak is not None:
                self.say(f"out of core: an in-core step peaks at {megabytes(peak)} (measured); "
                         f"limit {limit} per rank")  # fmt: skip
            else:
                given = "--ooc-limit" if self.config.ooc_limit else "default"
                self.say(
                    f"out of core: in-core peak not measured; limit {limit} per rank ({given})"
                )
        return peak

    def _multi_node(self, optimizer: Any, model: chainer.Chain) -> Any:
        """Returns the optimizer that averages gradients over the ranks."""
        double_buffering = self.config.double_buffering
        if self.world.comm is None:
            if double_buffering:
                raise InputError("--double-buffering: only with several ranks; use mpiexec")
            return optimizer
        import chainermn

        try:
            multi = chainermn.create_multi_node_optimizer(
                optimizer, self.world.comm, double_buffering=double_buffering
            )
        except ValueError as e:
            raise InputError(
                "--double-buffering: only pure_nccl can do it; it needs GPUs and NCCL"
            ) from e
        if not double_buffering:
            # The parameters are equal already. Otherwise the first update, also after --resume,
            # would be a broadcast instead of an update.
            multi.is_changed(model)
        return multi

    def _trainer(self, images: Data, model: chainer.Chain) -> training.Trainer:
        config, world = self.config, self.world
        train_iter = data.iterator(config, world, images.train, repeat=True)
        val_iter = data.iterator(config, world, images.val, repeat=False)
        optimizer, control = optimizers.create(config, world.size, model)
        self.snapshots = Snapshots(
            world,
            config.out,
            RankState(train_iter, model),
            self._meta(images),
            config.seed,
            self.gpu,
            keep=1 if config.snapshot < 0 else config.keep_snapshots,
        )
        self.stop = Stop(config.epoch, config.iteration)
        updater = Updater(
            train_iter,
            self._multi_node(optimizer, model),
            self.device,
            world,
            self.snapshots,
            control,
        )
        trainer = training.Trainer(updater, self.stop, config.out)
        every = (10, "iteration") if config.test else (1, "epoch")
        if config.recompute_bn:
            recompute = RecomputeStatistics(
                model,
                images.train,
                config.recompute_bn,
                config.val_batchsize,
                self.device,
                world,
                self.snapshots,
            )
            trainer.extend(recompute, trigger=At(every, self.stop))
        if config.average_bn and world.size > 1:
            trainer.extend(AverageStatistics(model, world), trigger=At(every, self.stop))
        evaluator = Evaluator(val_iter, model, self.device, world, self.snapshots)
        trainer.extend(evaluator, trigger=At(every, self.stop))
        if world.rank == 0:
            trainer.extend(KeepConfusion(config.out, evaluator), trigger=At(every, self.stop))
        trainer.extend(
            self.snapshots, trigger=At(self._snapshot_period(), self.stop, on_signal=True)
        )
        self.reports = reports.extensions(
            out=config.out,
            world=world,
            stop=self.stop,
            gpu=self.gpu,
            batchsize=config.batchsize,
            iterations_per_epoch=len(images.train) / config.batchsize,
            every=lambda: At(every, self.stop),
        )
        self.reports.attach(trainer)
        if config.ooc and world.comm is not None:
            trainer.extend(AgreeOnPlans(world.comm))
        return trainer

    def _meta(self, images: Data) -> dict[str, Any]:
        """Returns what a run that continues another one must have in common with it."""
        config = self.config
        return {
            "arch": config.arch,
            "dtype": config.dtype,
            "optimizer": config.optimizer,
            "ranks": self.world.size,
            "training images": images.n_train,
            "classes": config.n_classes,
            "names of classes": images.classes and fingerprint(images.classes),
        }

    def _snapshot_period(self) -> tuple[int, str] | None:
        if self.config.snapshot_iterations is not None:
            return self.config.snapshot_iterations, "iteration"
        return (abs(self.config.snapshot), "epoch") if self.config.snapshot else None

    def _resume(self, trainer: training.Trainer) -> Path | None:
        """Returns the snapshot that the run continues from, None if it starts anew."""
        config = self.config
        if config.resume is None:
            if find_snapshots(config.out):
                self.say(
                    f"note: {config.out} has snapshots of an earlier run; this run starts anew "
                    f"(--resume auto would continue)"
                )
            return None
        if config.resume == Path("auto"):
            path, damaged = self.snapshots.load_latest(trainer)
            for reason in damaged:
                self.say(f"warning: {reason}; going back to an earlier snapshot")
            if path is None:
                self.say(f"nothing to resume in {config.out}: starting from the beginning")
                return None
        else:
            path = config.resume
            self.snapshots.load(trainer, path)
        self.say(f"resumed from {path} at iteration {trainer.updater.iteration}")
        return path

    # -- results ---------------------------------------------------------------------------------

    def _finish(
        self, trainer: training.Trainer, model: chainer.Chain, in_core_peak: int | None
    ) -> int:
        """Writes the results; returns the exit status. Collective."""
        iteration = trainer.updater.iteration
        stopped = 0 if self.stop.reached(trainer) else self.stop.agreed
        self.reports.synchronize.note_peaks()  # of the last validation and snapshot
        with self.world.others_wait() as is_first:
            if is_first and not stopped:
                self._save_model(model, iteration)
            if is_first:
                versions = self.environment["versions"]
                self._report(trainer.updater, in_core_peak, versions, draws_all=not stopped)
        if stopped:
            self.say(
                f"stopped by signal {stopped} at iteration {iteration}; "
                f"continue with --resume {self.snapshots.latest}"
            )
        return 128 + stopped if stopped else 0

    def _complete(
        self,
        trainer: training.Trainer,
        model: chainer.Chain,
        in_core_peak: int | None,
        snapshot: Path,
    ) -> None:
        """Writes what the run that made its last snapshot has not come to write. Collective."""
        since = (snapshot / MANIFEST).stat().st_mtime_ns
        iteration = trainer.updater.iteration
        with self.world.others_wait() as is_first:
            if is_first and not is_newer(self._model_file(iteration), since):
                self._save_model(model, iteration)
            if is_first and not all(is_newer(path, since) for path in self.reports.files()):
                self.reports.synchronize.go_back(trainer.updater)
                self._report(trainer.updater, in_core_peak, provenance.versions(self.gpu))

    def _report(
        self,
        updater: Any,
        in_core_peak: int | None,
        versions: dict[str, str | None],
        draws_all: bool = True,
    ) -> None:
        settings = provenance.settings(self.config)
        self.reports.finish(updater, in_core_peak, settings, versions, draws_all)

    def _model_file(self, iteration: int) -> Path:
        return self.config.out / f"model_iter_{iteration}"

    def _save_model(self, model: chainer.Chain, iteration: int) -> None:
        with whole_file(self._model_file(iteration)) as partial:
            chainer.serializers.save_npz(str(partial), model, compression=False)
