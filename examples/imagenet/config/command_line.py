"""The command line, made from the schema, and how it, a file and the defaults become one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import launcher
from errors import InputError

from config import defaults, files, recipes
from config.job import NULLS, Job
from config.messages import choices, kinds_of, suggestion, validate
from config.schema import Config

DESCRIPTION = (
    "Train a convolutional network on ImageNet or any other labelled images, alone or under "
    "mpiexec. Without list files it trains on real handwritten digits."
)


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, and under MPI only once."""

    def error(self, message: str) -> NoReturn:
        if launcher.rank() == 0:
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def print_help(self, file: Any = None) -> None:
        if launcher.rank() == 0:
            super().print_help(file)


def flag_name(name: str) -> str:
    """Returns the flag of a field as it is documented."""
    return "--val_batchsize" if name == "val_batchsize" else f"--{name.replace('_', '-')}"


def _other_spelling(name: str) -> list[str]:
    both = {f"--{name.replace('_', '-')}", f"--{name}"}
    return sorted(both - {flag_name(name)})


def _kind(name: str) -> Any:
    return kinds_of(Config.model_fields[name].annotation)[0]


def _default_text(name: str) -> str:
    field = Config.model_fields[name]
    usual = field.default
    if "(default" in (field.description or "") or usual in (None, (), False, True):
        return ""
    digits = defaults.DIGITS.get(name, usual)
    text = f"default {usual}" if usual == digits else f"default {usual}; for the digits {digits}"
    return f" ({text})"


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of train.py's command line; all values stay text for the schema."""
    parser = _Parser(
        prog="train.py",
        usage="train.py [TRAIN VAL] [--config FILE] [options]",
        description=DESCRIPTION,
        epilog="TRAIN and VAL are list files: a path and a label on each line. Every option is "
        "also a key of the configuration file; what the command line says counts more.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    parser.add_argument(
        "--config", "-c", type=Path, metavar="FILE", help="YAML or JSON file of settings"
    )
    parser.add_argument(
        "--recipe", metavar="NAME", help="settings of an experiment by its name; what --config and "
        "the command line say counts more (docs/recipes.md lists them)",
    )  # fmt: skip
    parser.add_argument(
        "--smoke", action="store_true", help="the recipe's network, optimizer and schedule for a "
        "few iterations on the bundled digits, in less than a minute",
    )  # fmt: skip
    for name, field in Config.model_fields.items():
        extra: Any = field.json_schema_extra
        if not extra["flag"]:
            continue
        if extra["group"] not in groups:
            groups[extra["group"]] = parser.add_argument_group(extra["group"])
        group = groups[extra["group"]]
        names = [flag_name(name), *filter(None, [extra["short"]])]
        text = f"{field.description}{_default_text(name)}".replace("%", "%%")
        allowed = choices(field)
        if allowed and extra["metavar"]:  # too many for both
            text += f": {', '.join(allowed)}"
        if _kind(name) is bool:
            _add_switch(group, name, names, text, bool(field.default))
            continue
        options: dict[str, Any] = {"dest": name, "help": text}
        options["metavar"] = extra["metavar"] or "{" + ",".join(allowed) + "}"
        if get_origin(_kind(name)) is tuple and ... in get_args(_kind(name)):
            options["nargs"] = "+"
        group.add_argument(*names, **options)
        if other := _other_spelling(name):
            group.add_argument(*other, **{**options, "help": argparse.SUPPRESS})
    return parser


def _add_switch(group: Any, name: str, names: list[str], text: str, default: bool) -> None:
    """Adds --name and --no-name, and shows the one that is not the default."""
    off = f"--no-{name.replace('_', '-')}"
    hidden = argparse.SUPPRESS
    on_help, off_help = (hidden, f"do not {text}") if default else (text, hidden)
    group.add_argument(*names, dest=name, action="store_true", help=on_help)
    group.add_argument(off, dest=name, action="store_false", help=off_help)
    if other := _other_spelling(name):
        group.add_argument(*other, dest=name, action="store_true", help=hidden)


def _parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Returns what the command line gives: text, lists of text and booleans."""
    # The list files are what is left over: argparse takes optional positionals only where the
    # first of them could be, but S0's command line has them last.
    known, rest = parser.parse_known_args(argv)
    flags = vars(known)
    unknown = next((word for word in rest if word.startswith("-") and word != "--"), None)
    if unknown is not None:
        name = unknown.split("=")[0]
        options = [o for action in parser._actions for o in action.option_strings]
        parser.error(f"unrecognized arguments: {name}{suggestion(name, options)}")
    lists = [word for word in rest if word != "--"]
    if len(lists) > 2:
        parser.error(f"{lists[2]}: more than two list files; give TRAIN and VAL only")
    flags.update(zip(("train", "val"), lists, strict=False))
    words = {name for name, field in Config.model_fields.items() if "none" in choices(field)}
    for name, value in flags.items():
        if value == "none" and name in words:
            continue  # one of the values that this flag takes
        word = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(word, str) and word.lower() in ("none", "null"):
            flags[name] = None  # takes back what the file says
    return flags


def merge(
    layers: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Puts layers of settings on one another; None in a layer takes back what is below it.

    Args:
        layers: Values, and what to call each in an error; the lowest first.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer, names in layers:
        for key, value in layer.items():
            values.pop(key, None)
            if value is not None:
                values[key], origins[key] = value, names[key]
    return values, origins


def resolve(
    flags: Mapping[str, Any], file: Path | None, recipe: str | None = None, smoke: bool = False
) -> tuple[Config, Job]:
    """Returns the settings of flags, a configuration file, a recipe and the defaults.

    Args:
        flags: Values by name, which count more than the file's.
        file: The configuration file, or None; it counts more than the recipe.
        recipe: Name of a recipe, or None.
        smoke: Whether to take the recipe's small form.

    Raises:
        InputError: A key or a value is not allowed.
    """
    from_file = files.read(file) if file is not None else {}
    names = {key: f"{file}: {key}" for key in from_file}
    training, job = files.split(from_file)
    shown = {
        key: flag_name(key) if Config.model_fields[key].json_schema_extra["flag"] else key.upper()
        for key in flags
    }
    if smoke and recipe is None:
        raise InputError("--smoke: only with --recipe NAME")
    layers = [(training, names), (flags, shown)]
    if recipe is not None:
        layers.insert(0, recipes.load(recipe, smoke))
    values, origins = merge(layers)
    if not {"train", "val", "nclasses", "dataset"} & values.keys():
        values = {**defaults.for_digits(set(values)), **values}
    if "epoch" in flags and "iteration" not in flags:
        values.pop("iteration", None)  # the later word on the length counts
    if (flags.get("lr") or flags.get("lr_schedule")) and flags.get("lr_schedule") != "regime":
        values.pop("regime", None)  # the later word on the learning rate
    if flags.get("lr_schedule") not in (None, "step") and "lr_drops" not in flags:
        values.pop("lr_drops", None)
    job = {key: value for key, value in job.items() if value is not None or key in NULLS}
    return validate(Config, values, origins), validate(Job, job, names)


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Parses the command line; a bad value ends the process with one line and status 2."""
    parser = build_parser()
    flags = _parse_flags(parser, argv)
    file, recipe = flags.pop("config", None), flags.pop("recipe", None)
    smoke = flags.pop("smoke", False)
    try:
        return resolve(flags, file, recipe, smoke)[0]
    except InputError as e:
        parser.error(str(e))


def read_file(path: Path) -> tuple[Config, Job]:
    """Returns the training's and the job's settings of a configuration file.

    Raises:
        InputError: The file cannot be read, or a key or value is not allowed.
    """
    return resolve({}, path)
