"""Settings that exclude or need each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from config.schema import Config

REMOVED_COMMUNICATORS = ("hierarchical", "two_dimensional", "single_node")
"""Names that ChainerMN 7 removed: they mean what there is for the machine."""

_WARMUP = ("rmsprop_slope", "warmup_center", "warmup_period")
_RESTARTS = ("restarts", "restart_period", "restart_shrink")
_DECOUPLED = ("adamw", "radam")
_WITH_BETAS = ("adam", "radam", "adamw")
_WITH_MOMENTUM = ("momentum_sgd", "rmsprop_warmup")


def _problem(config: Config) -> str | None:
    # A file of resolved settings names all of them: what is at its default is not wrong.
    fields = type(config).model_fields
    given = {name for name in fields if getattr(config, name) != fields[name].default}
    if (config.train is None) != (config.val is None):
        return "give both list files, TRAIN and VAL, or none for the bundled digits"
    if config.dataset == "files" and config.train is None and config.nclasses is None:
        return "--dataset files: give TRAIN and VAL"
    if config.dataset not in (None, "files"):
        if config.train is not None:
            return f"--dataset {config.dataset}: takes its files from --data-root; leave out TRAIN and VAL"
        if config.augmentation == "mean_image":
            return (
                f"--augmentation mean_image: not with --dataset {config.dataset}; only with files"
            )
    if config.ooc_limit is not None and not config.ooc:
        return f"--ooc-limit {config.ooc_limit}: only with --ooc; add --ooc"
    if config.ooc_host_limit is not None and not config.ooc:
        return f"--ooc-host-limit {config.ooc_host_limit}: only with --ooc; add --ooc"
    if config.ooc_split is not None and not config.ooc and not config.digits:
        return f"--ooc-split {config.ooc_split}: only with --ooc; add --ooc"
    if config.gpu is not None:
        ids = " ".join(map(str, config.gpu))
        on_gpus = [gpu for gpu in config.gpu if gpu >= 0]
        if not config.gpu:
            return "--gpu: give GPU ids, or -1 for none"
        if len(set(on_gpus)) != len(on_gpus) or (on_gpus and -1 in config.gpu):
            return f"--gpu {ids}: give different GPU ids, or only -1 (once per rank) for none"
    if config.iterator in ("thread", "process") and config.loaderjob == 0:
        return f"--iterator {config.iterator}: needs --loaderjob/-j 1 or more"
    return _optimizer_problem(config, given) or _devices_problem(config)


def _optimizer_problem(config: Config, given: set[str]) -> str | None:
    name = config.optimizer
    if "momentum" in given and name not in _WITH_MOMENTUM:
        return f"--momentum {config.momentum}: {name} has none; only {' and '.join(_WITH_MOMENTUM)}"
    for option in ("beta1", "beta2"):
        if option in given and name not in _WITH_BETAS:
            allowed = ", ".join(_WITH_BETAS)
            return f"--{option} {getattr(config, option)}: {name} has none; only {allowed}"
    if name == "radam" and config.beta2 < 2 / 3:
        return f"--beta2 {config.beta2}: radam needs 2/3 or more"
    if config.lars and name != "momentum_sgd":
        return f"--lars: only with --optimizer momentum_sgd, not {name}"
    for option, owner, used in (
        *((f, "--optimizer rmsprop_warmup", name == "rmsprop_warmup") for f in _WARMUP),
        *((f, "--optimizer srsgd", name == "srsgd") for f in _RESTARTS),
        ("lars_coefficient", "--lars", config.lars),
    ):
        if option in given and not used:
            flag = option.replace("_", "-")
            return f"--{flag} {getattr(config, option)}: only with {owner}"
    if config.restart_shrink and config.iteration:
        return f"--restart-shrink: counts epochs; leave out --iteration {config.iteration}"
    if name in _DECOUPLED and config.weight_decay_on == "weights":
        return f"--weight-decay-on weights: not with --optimizer {name}, which decays everything"
    if name in _DECOUPLED and config.regime:
        return f"regime: its weight decays are not those of --optimizer {name}"
    if config.lr_schedule == "regime" and not config.regime:
        return "--lr-schedule regime: needs the table `regime` in a configuration file"
    if config.regime:
        if config.lr_schedule not in (None, "regime"):
            return f"--lr-schedule {config.lr_schedule}: cannot be together with a table `regime`"
        if "lr" in given or "weight_decay" in given:
            return "regime: the table says learning rates and weight decays; leave out the others"
        starts = [row[0] for row in config.regime]
        if starts[0] != 1 or sorted(set(starts)) != starts:
            return f"regime: first epochs {starts} must begin with 1 and increase"
    if config.lr_schedule == "step" and not config.lr_drops:
        return "--lr-schedule step: needs --lr-drops, the epochs at which to drop"
    if config.lr_drops:
        drops = " ".join(f"{drop:g}" for drop in config.lr_drops)
        if config.lr_schedule not in (None, "step") or config.regime:
            return f"--lr-drops {drops}: only with --lr-schedule step"
        if tuple(sorted(set(config.lr_drops))) != config.lr_drops:
            return f"--lr-drops {drops}: must increase"
    return None


def _devices_problem(config: Config) -> str | None:
    allowed = (None, "pure_nccl", *REMOVED_COMMUNICATORS)
    for flag, used in (
        ("--double-buffering", config.double_buffering),
        (f"--allreduce-dtype {config.allreduce_dtype}", config.allreduce_dtype == "float16"),
    ):
        if used and config.communicator not in allowed:
            return f"{flag}: only pure_nccl can do it, not --communicator {config.communicator}"
        if used and config.gpu is not None and -1 in config.gpu:
            return f"{flag}: only pure_nccl can do it, which needs GPUs, not --gpu -1"
    return None


def check_together(config: Config) -> None:
    """Raises an error of pydantic when settings exclude each other; its message is the line."""
    problem = _problem(config)
    if problem is not None:
        raise PydanticCustomError("together", "{line}", {"line": problem})
