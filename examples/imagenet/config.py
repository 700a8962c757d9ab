"""The trainer's settings: command line, defaults and checks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import launcher

ARCH_NAMES = ("alex", "googlenet", "googlenetbn", "nin", "resnet50", "resnext50")
COMMUNICATORS = (
    "pure_nccl",
    "flat",
    "naive",
    "non_cuda_aware",
    "hierarchical",
    "two_dimensional",
    "single_node",
)

N_CLASSES = 1000
"""Number of classes of a network for the user's own lists."""

DEFAULTS: dict[str, Any] = {
    "arch": "nin",
    "insize": 224,
    "batchsize": 32,
    "epoch": 10,
    "iteration": 0,
    "val_batchsize": 250,
}
DIGITS_DEFAULTS: dict[str, Any] = {
    "arch": "googlenetbn",
    "insize": 96,
    "batchsize": 40,
    "epoch": 10,
    "iteration": 14,
    "val_batchsize": 15,
}
"""Defaults without list files: a few minutes for four ranks on two cores."""


@dataclass(frozen=True)
class Config:
    """Resolved settings of a run; see ``build_parser`` for what each one means."""

    train: Path | None
    val: Path | None
    arch: str
    insize: int
    batchsize: int
    epoch: int
    iteration: int
    initmodel: Path | None
    loaderjob: int
    mean: Path
    resume: Path | None
    out: Path
    root: Path
    val_batchsize: int
    gpu: tuple[int, ...] | None
    communicator: str | None
    ooc: bool
    ooc_limit: str | None
    seed: int
    test: bool
    debug: bool

    @property
    def digits(self) -> bool:
        """Whether the bundled digits are used because no list files were given."""
        return self.train is None

    @property
    def n_classes(self) -> int:
        """Number of outputs of the network."""
        return 10 if self.digits else N_CLASSES


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, and under MPI only once."""

    def error(self, message: str) -> NoReturn:
        if launcher.rank() == 0:
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def print_help(self, file: Any = None) -> None:
        if launcher.rank() == 0:
            super().print_help(file)


def _integer(minimum: int) -> Any:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {minimum}")
        return value

    return integer


def _default(name: str) -> str:
    usual, digits = DEFAULTS[name], DIGITS_DEFAULTS[name]
    return f"default {usual}" if usual == digits else f"default {usual}; for the digits {digits}"


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of train.py's command line."""
    parser = _Parser(
        prog="train.py",
        description="Train a convolutional network on ImageNet or any other labelled images, alone "
        "or under mpiexec. Without list files it trains on real handwritten digits.",
    )
    add = parser.add_argument
    # fmt: off
    add("train", nargs="?", type=Path, help="list file of training images: a path and a label "
        "on each line")
    add("val", nargs="?", type=Path, help="list file of validation images")
    add("--arch", "-a", choices=ARCH_NAMES, help=f"network ({_default('arch')})")
    add("--insize", "-is", type=_integer(1), metavar="PIXELS",
        help=f"height and width of the network's input ({_default('insize')})")
    add("--batchsize", "-B", type=_integer(1), metavar="N",
        help=f"images per rank and iteration ({_default('batchsize')})")
    add("--epoch", "-E", type=_integer(1), metavar="N",
        help=f"epochs to train ({_default('epoch')}); --iteration comes first")
    add("--iteration", "-i", type=_integer(0), metavar="N",
        help=f"iterations to train; 0: by epochs ({_default('iteration')})")
    add("--initmodel", type=Path, metavar="FILE", help="start from the parameters in this file")
    add("--loaderjob", "-j", type=_integer(0), default=0, metavar="N",
        help="processes that load images; 0: the training process itself (default)")
    add("--mean", "-m", type=Path, default=Path("mean.npy"), metavar="FILE",
        help="mean of the training images, from compute_mean.py (default mean.npy)")
    add("--resume", "-r", type=Path, metavar="SNAPSHOT",
        help="continue from this snapshot (a folder snapshot_iter_N)")
    add("--out", "-o", type=Path, default=Path("result"), metavar="DIR",
        help="folder of the results (default result)")
    add("--root", "-R", type=Path, default=Path("."), metavar="DIR",
        help="folder of the paths in the lists (default .)")
    add("--val_batchsize", "-b", type=_integer(1), metavar="N",
        help=f"images per rank and step of validation ({_default('val_batchsize')})")
    add("--gpu", "-g", type=_integer(-1), nargs="+", metavar="ID",
        help="GPU ids, one per rank on a machine; -1: none (default: all there are)")
    add("--communicator", choices=COMMUNICATORS,
        help="ChainerMN communicator (default pure_nccl; naive without a GPU)")
    add("--ooc", action="store_true", help="train out of core")
    add("--ooc-limit", metavar="SIZE",
        help="memory each rank may use: bytes, 8GiB, or a fraction such as 0.5 of the machine's; "
        "for the digits the default is 60%% of a measured in-core step")
    add("--seed", type=_integer(0), default=0, metavar="N",
        help="seed of initialization, order and augmentation (default 0)")
    add("--test", action="store_true",
        help="validate and log every 10 iterations instead of every epoch")
    add("--debug", "-d", action="store_true", help="Chainer's debug mode: check for NaN")
    # fmt: on
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Parses the command line; a bad value ends the process with one line and status 2."""
    parser = build_parser()
    args = vars(parser.parse_args(argv))
    if (args["train"] is None) != (args["val"] is None):
        parser.error("give both list files, TRAIN and VAL, or none for the bundled digits")
    defaults = DIGITS_DEFAULTS if args["train"] is None else DEFAULTS
    if args["epoch"] is not None and args["iteration"] is None:
        args["iteration"] = 0  # who asks for epochs does not get the digits' iterations
    args.update({name: value for name, value in defaults.items() if args[name] is None})
    if args["ooc_limit"] is not None and not args["ooc"]:
        parser.error(f"--ooc-limit {args['ooc_limit']}: only with --ooc; add --ooc")
    if args["gpu"] is not None:
        gpus = args["gpu"] = tuple(args["gpu"])
        if len(set(gpus)) != len(gpus) or (-1 in gpus and len(gpus) > 1):
            ids = " ".join(map(str, gpus))
            parser.error(f"--gpu {ids}: give different GPU ids, or -1 alone for none")
    return Config(**args)
