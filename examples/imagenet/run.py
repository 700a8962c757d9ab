"""One training run: data, model, trainer, results."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import chainer
import devices
import models
import numpy
import out_of_core
import reports
from chainer import iterators, training
from chainer.training import extensions
from config import Config
from datasets import digits
from datasets.labeled import LabeledImages, Pair, read_list
from datasets.preprocessed import EpochOrder, PreprocessedImages
from errors import InputError
from reports import megabytes
from snapshots import RankState, Snapshots, load_npz
from tqdm import tqdm
from training import At, Evaluator, Stop, Updater
from transforms import CropAndNormalize, load_mean
from world import World


class Run:
    """A run of the trainer on this rank.

    Args:
        config: The settings.
        world: The ranks.
        gpu: Whether to train on GPUs.
        description: What to say about threads and devices.
    """

    def __init__(self, config: Config, world: World, gpu: bool, description: str) -> None:
        self.config = config
        self.world = world
        self.gpu = gpu
        self.description = description
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
        self.device.use()
        chainer.set_debug(config.debug)
        random.seed(config.seed * 65536 + world.rank)
        numpy.random.seed([config.seed, world.rank])
        train, val, n_train = self._datasets()
        model = self._model()
        in_core_peak = self._enable_out_of_core()
        trainer = self._trainer(train, val, n_train, model)
        if config.resume:
            with world.together():
                self.snapshots.load(trainer, config.resume)
            self.say(f"resumed from {config.resume} at iteration {trainer.updater.iteration}")
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

    # -- data ------------------------------------------------------------------------------------

    def _paths(self) -> tuple[Path, Path, Path, Path]:
        """Returns train list, val list, mean and root; writes the digits when needed (rank 0)."""
        config = self.config
        if not config.digits:
            return *config.lists, config.mean, config.root
        size = digits.image_size(config.insize)
        folder = config.out / "data" / f"digits-{size}"
        with self.world.together():
            if self.world.rank == 0:
                folder.parent.mkdir(exist_ok=True)
                digits.write_digits(folder, size, tqdm)
        return folder / "train.txt", folder / "val.txt", folder / "mean.npy", folder

    def _datasets(self) -> tuple[PreprocessedImages, PreprocessedImages, int]:
        """Returns this rank's training and validation images, and how many all ranks train on."""
        config, world = self.config, self.world
        train_path, val_path, mean_path, root = self._paths()
        lists: list[Any] = [None, None]
        with world.together():
            mean = load_mean(mean_path, config.insize)
            transform = CropAndNormalize(mean, config.insize)
            if world.rank == 0:
                for i, path in enumerate((train_path, val_path)):
                    pairs = read_list(path, config.n_classes)
                    # The most common mistakes (root, sizes, mean) show at the first image.
                    PreprocessedImages(LabeledImages(pairs[:1], root), transform, None).get(0)
                    lists[i] = pairs
        n_train, n_val = world.broadcast([len(x) if x else 0 for x in lists])
        self.say(f"data: {n_train} training and {n_val} validation images of {train_path} and "
                 f"{val_path}" + (" (handwritten digits)" if config.digits else ""))  # fmt: skip
        train_pairs = self._scatter(lists[0], shuffle=True)
        val_pairs = self._scatter(lists[1], shuffle=False)
        train = PreprocessedImages(
            LabeledImages(train_pairs, root), transform, (config.seed, world.rank, 1)
        )
        return train, PreprocessedImages(LabeledImages(val_pairs, root), transform, None), n_train

    def _scatter(self, pairs: list[Pair] | None, shuffle: bool) -> Any:
        if self.world.comm is None:
            return pairs
        import chainermn

        # Training shards have one length, so that epochs end together; validation counts each
        # image once.
        return chainermn.scatter_dataset(
            pairs,
            self.world.comm,
            shuffle=shuffle,
            seed=self.config.seed,
            force_equal_length=shuffle,
        )

    def _iterator(self, dataset: PreprocessedImages, batchsize: int, repeat: bool) -> Any:
        options: dict[str, Any] = {"repeat": repeat}
        if repeat:
            seed = (self.config.seed, self.world.rank, 0)
            options["order_sampler"] = EpochOrder(len(dataset), seed)
        else:
            options["shuffle"] = False
        if self.config.loaderjob and len(dataset):
            return iterators.MultiprocessIterator(
                dataset, batchsize, n_processes=self.config.loaderjob, **options
            )
        return iterators.SerialIterator(dataset, batchsize, **options)

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
        peak = out_of_core.enable(
            self.config, self.world, self.device.device.id if self.gpu else -1
        )
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

    def _trainer(
        self,
        train: PreprocessedImages,
        val: PreprocessedImages,
        n_train: int,
        model: chainer.Chain,
    ) -> training.Trainer:
        config, world = self.config, self.world
        train_iter = self._iterator(train, config.batchsize, repeat=True)
        val_iter = self._iterator(val, config.val_batchsize, repeat=False)
        optimizer = chainer.optimizers.MomentumSGD(lr=0.01, momentum=0.9)
        if world.comm is not None:
            import chainermn

            optimizer = chainermn.create_multi_node_optimizer(optimizer, world.comm)
        optimizer.setup(model)
        if world.comm is not None:
            # The parameters are equal already. Otherwise the first update, also after --resume,
            # would be a broadcast instead of an update.
            optimizer.is_changed(model)

        meta = {
            "arch": config.arch,
            "ranks": world.size,
            "training images": n_train,
            "classes": config.n_classes,
        }
        self.snapshots = Snapshots(
            world, config.out, RankState(train_iter, model), meta, config.seed, self.gpu
        )
        self.stop = Stop(config.epoch, config.iteration)
        updater = Updater(train_iter, optimizer, self.device, world, self.snapshots)
        trainer = training.Trainer(updater, self.stop, config.out)
        every = (10, "iteration") if config.test else (1, "epoch")

        trainer.extend(
            Evaluator(val_iter, model, self.device, world, self.snapshots),
            trigger=At(every, self.stop),
        )
        self.synchronize = reports.Synchronize(world, self.stop, self.gpu)
        trainer.extend(self.synchronize, trigger=(1, "iteration"))
        trainer.extend(self.snapshots, trigger=At((1, "epoch"), self.stop, on_signal=True))
        self.history = reports.History()
        if world.rank == 0:
            trainer.extend(self.history, trigger=(1, "iteration"))
            trainer.extend(
                extensions.LogReport(
                    trigger=At(every, self.stop), postprocess=self.synchronize.add_to_log
                )
            )
            trainer.extend(extensions.observe_lr(), trigger=(1, "iteration"))
            trainer.extend(reports.print_report(), trigger=At(every, self.stop))
            trainer.extend(
                reports.Progress(self.stop, len(train) / config.batchsize),
                trigger=(1, "iteration"),
            )
        return trainer

    # -- results ---------------------------------------------------------------------------------

    def _finish(
        self, trainer: training.Trainer, model: chainer.Chain, in_core_peak: int | None
    ) -> int:
        """Writes the results; returns the exit status."""
        config, updater = self.config, trainer.updater
        if self.world.rank != 0:
            return 128 + self.stop.agreed if self.stop.agreed else 0
        rate = updater.n_updates / updater.seconds if updater.seconds else None
        summary = reports.summarize(self.history, self.synchronize, self.world, rate, in_core_peak)
        reports.write_summary(summary, config.out)
        if self.history.train:
            reports.write_plots(self.history, config.out)
        reports.print_summary(summary, config.out)
        if self.stop.agreed:
            number = self.stop.agreed
            self.say(
                f"stopped by signal {number} at iteration {updater.iteration}; "
                f"continue with --resume {self.snapshots.latest}"
            )
            return 128 + number
        model_path = config.out / f"model_iter_{updater.iteration}"
        chainer.serializers.save_npz(str(model_path), model, compression=False)
        return 0
