"""What can be set for a training run: one pydantic model for flags, YAML and JSON.

A field here is at once a key of configuration files and a flag of the command line: ``val_batchsize``
is ``--val_batchsize`` and ``--val-batchsize``. To add a setting, add a field.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from arch_names import ARCH_NAMES
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

ArchName = Literal[ARCH_NAMES]
DatasetName = Literal["files", "imagenet", "cifar10", "cifar100", "mnist", "digits"]
AugmentationName = Literal["mean_image", "torch7", "resnet", "cifar", "none"]
CommunicatorName = Literal[
    "pure_nccl",
    "flat",
    "naive",
    "non_cuda_aware",
    "hierarchical",
    "two_dimensional",
    "single_node",
]
OptimizerName = Literal[
    "momentum_sgd", "adam", "rmsprop", "rmsprop_warmup", "srsgd", "radam", "adamw"
]
ScheduleName = Literal["constant", "step", "regime", "slow_start", "polynomial", "cosine"]

N_CLASSES = 1000
"""Number of classes of a network for the user's own lists."""

CLASSES = {"cifar10": 10, "cifar100": 100, "mnist": 10, "digits": 10}
AUGMENTATION: dict[str, AugmentationName] = {
    "files": "mean_image",
    "imagenet": "resnet",
    "cifar10": "cifar",
    "cifar100": "cifar",
}
"""What is used where nothing is said, by data set; without an entry: none."""


def _as_tuple(value: Any) -> Any:
    """Lets one value stand for a list of one: ``gpu: 0``."""
    return (value,) if isinstance(value, int | float | str) else value


def _size(value: Any) -> Any:
    """Reads a size such as 2560x2560 (one number: a square) as (width, height)."""
    if isinstance(value, str | int) and (match := _SIZE.fullmatch(str(value))):
        width = int(match[1])
        return width, int(match[2] or width)
    if isinstance(value, list | tuple) and len(value) == 2:
        return value
    raise PydanticCustomError("size", "is not a size; allowed is WIDTHxHEIGHT, such as 2560x2560")


_SIZE = re.compile(r"([1-9]\d{0,5})(?:[xX]([1-9]\d{0,5}))?!?")

Stage = tuple[
    Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0)], Annotated[float, Field(ge=0)]
]
"""First epoch (from 1), learning rate and weight decay of a part of the training."""


def _option(
    default: Any,
    group: str,
    description: str,
    *,
    short: str | None = None,
    metavar: str | None = None,
    flag: bool = True,
    **constraints: Any,
) -> Any:
    extra = {"group": group, "short": short, "metavar": metavar, "flag": flag}
    return Field(default, description=description, json_schema_extra=extra, **constraints)


class Config(BaseModel):
    """The settings of a training run; each field's description says what it means."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # fmt: off
    # -- data ------------------------------------------------------------------------------------
    train: Path | None = _option(None, "data",
        "list file of training images: a path and a label on each line", flag=False)
    val: Path | None = _option(None, "data", "list file of validation images", flag=False)
    dataset: DatasetName | None = _option(None, "data",
        "a data set by name, from its original files in --data-root; files: what TRAIN and VAL "
        "name (default files with TRAIN and VAL, else digits as JPEG files)")
    data_root: Path = _option(Path("data"), "data", "folder of the files of --dataset",
        metavar="DIR")
    augmentation: AugmentationName | None = _option(None, "data",
        "transform of training images: mean_image: crop and flip, less --mean; torch7: short side "
        "to 256, crop, flip, colours; resnet: random part resized, flip; cifar: padding, crop, "
        "flip; none (default mean_image for files; resnet for imagenet; cifar for cifar10 and "
        "cifar100; else none)")
    normalization: Literal["published", "data"] = _option("published", "data",
        "mean and deviation of the channels, but for mean_image: the usual ones of the data set, "
        "or those of up to 10,000 training images, which are kept in --out")
    nclasses: int | None = _option(None, "data",
        "number of classes; without TRAIN and VAL it names the lists in --root: train.txt and "
        "val.txt for 1000, else such as train016.txt and val016.txt", metavar="N", ge=2)
    root: Path = _option(Path("."), "data", "folder of the paths in the lists",
        short="-R", metavar="DIR")
    mean: Path = _option(Path("mean.npy"), "data",
        "mean of the training images, from compute_mean.py", short="-m", metavar="FILE")
    enlarge: Annotated[tuple[int, int], BeforeValidator(_size)] | None = _option(None, "data",
        "resize every image to this when it is read, as `convert -resize WIDTHxHEIGHT!` does",
        metavar="WIDTHxHEIGHT")
    loadtype: Literal["original", "custom"] = _option("original", "data",
        "original: decode images when they are needed; custom: this rank's images are decoded "
        "into memory once")
    iterator: Literal["serial", "thread", "process"] | None = _option(None, "data",
        "who loads images: the training process itself, --loaderjob threads or processes "
        "(default: process, or serial with --loaderjob 0)")
    loaderjob: int = _option(0, "data", "threads or processes that load images", short="-j",
        metavar="N", ge=0)

    # -- network ---------------------------------------------------------------------------------
    arch: ArchName = _option("nin", "network", "network", short="-a", metavar="NAME")
    insize: int = _option(224, "network", "height and width of the network's input",
        short="-is", metavar="PIXELS", ge=1)
    dtype: Literal["float32", "mixed16"] = _option("float32", "network",
        "mixed16: activations and gradients of half precision, with loss scaling; the optimizer "
        "keeps parameters of single precision")
    initmodel: Path | None = _option(None, "network", "start from the parameters in this file",
        metavar="FILE")

    # -- training --------------------------------------------------------------------------------
    batchsize: int = _option(32, "training", "images per rank and iteration",
        short="-B", metavar="N", ge=1)
    val_batchsize: int = _option(250, "training",
        "images per rank and step of validation; out of core it is divided when it does not fit",
        short="-b", metavar="N", ge=1)
    epoch: int = _option(10, "training", "epochs to train; --iteration comes first",
        short="-E", metavar="N", ge=1)
    iteration: int = _option(0, "training", "iterations to train; 0: by epochs",
        short="-i", metavar="N", ge=0)
    seed: int = _option(0, "training", "seed of initialization, order and augmentation",
        metavar="N", ge=0, lt=2**32)
    recompute_bn: int = _option(0, "training",
        "before validation make the statistics of batch normalization anew of that many training "
        "images per rank; 0: the running ones", metavar="N", ge=0)
    test: bool = _option(False, "training",
        "validate and log every 10 iterations instead of every epoch")
    debug: bool = _option(False, "training", "Chainer's debug mode: check for NaN", short="-d")

    # -- optimizer -------------------------------------------------------------------------------
    optimizer: OptimizerName = _option("momentum_sgd", "optimizer", "rule of the updates")
    lr: float | None = _option(None, "optimizer",
        "learning rate (default 0.01; adam, adamw and radam 0.001; rmsprop_warmup and srsgd 0.1)", metavar="X", gt=0)
    lr_scaling: Literal["none", "linear"] | None = _option(None, "optimizer",
        "linear: --lr is for 256 images per iteration of all ranks, and grows with them "
        "(default none; rmsprop_warmup linear)")
    lr_schedule: ScheduleName | None = _option(None, "optimizer",
        "constant; step: times --lr-gamma at each of --lr_drops; slow_start: of Akiba et al. 2017; "
        "polynomial and cosine: to 0 at the end; regime: the table of a configuration file "
        "(default constant; rmsprop_warmup slow_start)")
    lr_drops: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_as_tuple)] = (
        _option((), "optimizer", "epochs at which a step schedule drops", metavar="EPOCH"))
    lr_gamma: float = _option(0.1, "optimizer", "factor of a drop", metavar="X", gt=0, le=1)
    lr_power: float = _option(2.0, "optimizer", "exponent of a polynomial schedule",
        metavar="X", gt=0)
    lr_warmup: float = _option(0.0, "optimizer",
        "epochs in which the learning rate grows linearly to what the schedule says, from that of "
        "256 images per iteration (linear scaling) or a tenth", metavar="EPOCHS", ge=0)
    regime: tuple[Stage, ...] = _option((), "optimizer",
        "rows of first epoch (from 1), learning rate, weight decay", flag=False)
    momentum: float = _option(0.9, "optimizer", "of momentum_sgd and rmsprop_warmup",
        metavar="X", ge=0, lt=1)
    beta1: float = _option(0.9, "optimizer", "decay of the first moment, of adam, radam and adamw",
        metavar="X", ge=0, lt=1)
    beta2: float = _option(0.999, "optimizer", "of the second moment; of radam at least 2/3",
        metavar="X", ge=0, lt=1)
    weight_decay: float = _option(0.0, "optimizer", "times the parameter is added to its gradient",
        metavar="X", ge=0)
    weight_decay_on: Literal["all", "weights"] = _option("all", "optimizer",
        "weights: not on biases and batch normalization")
    label_smoothing: float = _option(0.0, "optimizer",
        "part of the target that is spread over all classes in training", metavar="X", ge=0, lt=1)
    lars: bool = _option(False, "optimizer",
        "layer-wise adaptive rate scaling, with momentum_sgd")
    lars_coefficient: float = _option(0.001, "optimizer", "trust coefficient of --lars",
        metavar="X", gt=0)
    rmsprop_slope: Literal["continuous", "printed"] = _option("continuous", "optimizer",
        "second half of rmsprop_warmup's change to SGD: the continuous line, or the one printed in "
        "the paper, which overshoots")
    warmup_center: float = _option(10.0, "optimizer",
        "epoch at which rmsprop_warmup is half RMSprop, half SGD", metavar="EPOCH", ge=0)
    warmup_period: float = _option(5.0, "optimizer", "length of that change",
        metavar="EPOCHS", gt=0)

    restarts: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_as_tuple)] = (
        _option((), "optimizer", "restart periods of srsgd in iterations, one for each stage of "
        "the learning rate; the last one stays (default 40)", metavar="F"))
    restart_period: Literal["paper", "authors"] = _option("paper", "optimizer",
        "how srsgd counts: restart after F iterations as in the paper, or after F - 1 as the "
        "authors' programs do")
    restart_shrink: bool = _option(False, "optimizer",
        "in the last stage srsgd's period shrinks linearly, to 1 iteration in the last epoch")

    # -- results ---------------------------------------------------------------------------------
    out: Path = _option(Path("result"), "results", "folder of the results", short="-o",
        metavar="DIR")
    resume: Path | None = _option(None, "results",
        "continue from this snapshot (a folder snapshot_iter_N); auto: from the latest complete "
        "one in --out, or from the beginning when there is none", short="-r", metavar="SNAPSHOT")
    snapshot: int = _option(1, "results",
        "epochs between snapshots; negative: keep only the latest; 0: only one at the end",
        metavar="EPOCHS")
    snapshot_iterations: int | None = _option(None, "results",
        "iterations between snapshots, instead of epochs", metavar="N", ge=1)
    keep_snapshots: int = _option(2, "results", "number of snapshots to keep; 0: all",
        metavar="N", ge=0)

    # -- devices ---------------------------------------------------------------------------------
    gpu: Annotated[tuple[Annotated[int, Field(ge=-1)], ...], BeforeValidator(_as_tuple)] | None = (
        _option(None, "devices", "GPU ids, one per rank on a machine; -1: none; several start as "
        "many ranks (default: all there are)", short="-g", metavar="ID"))
    communicator: CommunicatorName | None = _option(None, "devices",
        "ChainerMN communicator (default pure_nccl; naive without a GPU)")
    allreduce_dtype: Literal["float32", "float16"] | None = _option(None, "devices",
        "precision in which pure_nccl sums gradients (default: theirs)")
    double_buffering: bool = _option(False, "devices",
        "pure_nccl sums gradients while the next iteration runs, which then uses older ones")
    average_bn: bool = _option(True, "devices",
        "average the statistics of batch normalization over the ranks before validation")

    # -- out of core -----------------------------------------------------------------------------
    ooc: bool = _option(False, "out of core", "train out of core")
    ooc_limit: str | None = _option(None, "out of core",
        "memory each rank may use: bytes, 8GiB, or a fraction such as 0.5 of the machine's; for "
        "the digits the default is 64% of a measured in-core step", metavar="SIZE",
        coerce_numbers_to_str=True)
    ooc_host_limit: str | None = _option(None, "out of core",
        "pinned host memory that the ranks of a machine may use together for what leaves their "
        "GPUs (default 80% of what is free)", metavar="SIZE", coerce_numbers_to_str=True)
    ooc_split: Literal["never", "exact", "always"] | None = _option(None, "out of core",
        "without a GPU, functions whose temporaries do not fit under the limit run in pieces: "
        "exact: where the results are the same bits; always: also where they are rounded "
        "differently (default never)")
    # fmt: on

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        from config.checks import check_together

        check_together(self)
        return self

    @property
    def digits(self) -> bool:
        """Whether the bundled digits are used because no list files were given."""
        return self.train is None and self.nclasses is None and self.dataset is None

    @property
    def n_classes(self) -> int:
        """Number of outputs of the network."""
        usual = 10 if self.digits else CLASSES.get(self.dataset or "files", N_CLASSES)
        return self.nclasses or usual

    @property
    def augmentation_name(self) -> AugmentationName:
        """Which transform training images get."""
        return self.augmentation or AUGMENTATION.get(self.dataset or "files", "none")

    @property
    def lists(self) -> tuple[Path, Path]:
        """List files of training and validation, when the bundled digits are not used."""
        if self.train is not None and self.val is not None:
            return self.train, self.val
        number = "" if self.n_classes == N_CLASSES else f"{self.n_classes:03d}"
        return self.root / f"train{number}.txt", self.root / f"val{number}.txt"

    @property
    def iterator_name(self) -> str:
        """Which iterator loads images: serial, thread or process."""
        return self.iterator or ("process" if self.loaderjob else "serial")
