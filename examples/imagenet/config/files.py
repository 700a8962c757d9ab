"""Configuration files, YAML or JSON, with keys that are checked by the schema."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

import yaml
from errors import InputError

from config.job import Job
from config.messages import suggestion
from config.schema import Config

ALIASES = {"mean.npy": "mean", "nnodetype": "nodetype"}
"""Other spellings of keys."""


class _Duplicate(ValueError):
    """A key that occurs twice."""


class _Loader(yaml.SafeLoader):
    """Safe YAML without surprises.

    A key that occurs twice is an error, not silently the last one. What YAML 1.1 reads in ways that
    few expect stays text, as on the command line, and the schema makes of it what the key takes:
    010 (octal 8), 1:30 (90, to base 60), 1_000, yes, no, on, off, 2020-01-01 and 1e-3 (which is
    text there, too).
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        _check_unique(keys)
        return super().construct_mapping(node, deep)


for _tag, _pattern in (
    ("null", r"~|null|Null|NULL|"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), None)
_Loader.add_constructor(  # Python's integers; those of YAML 1.1 would come back by the tag !!int
    "tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node), 0)
)


def _check_unique(keys: list[Any]) -> None:
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise _Duplicate(f"the key {key} occurs twice")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_unique([key for key, _ in pairs])
    return dict(pairs)


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def read(path: Path, option: str = "--config") -> dict[str, Any]:
    """Returns the keys and values of a configuration file, under the names of the schema.

    Args:
        path: A ``.json`` file, or YAML.
        option: What named the file, for errors.

    Raises:
        InputError: The file cannot be read, or has a key that is unknown or occurs twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not a UTF-8 text file"
        raise InputError(f"{option} {path}: {reason}; give a YAML or JSON file") from e
    parse = _parse_json if path.suffix == ".json" else _parse_yaml
    try:
        values = parse(text)
    except _Duplicate as e:
        raise InputError(f"{path}: {e}; remove one") from e
    except RecursionError:
        raise InputError(f"{path}: lists or mappings in it are nested too deeply") from None
    except (ValueError, yaml.YAMLError) as e:
        reason = " ".join(str(e).split())
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise InputError(f"{path}: not valid {kind} ({reason})") from e
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise InputError(f"{path}: must consist of lines `key: value`")
    return _named(values, path)


def _named(values: dict[Any, Any], path: Path) -> dict[str, Any]:
    allowed = [*Config.model_fields, *Job.model_fields]
    named: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for spelling, value in values.items():
        key = ALIASES.get(str(spelling), str(spelling).replace("-", "_"))
        if key not in allowed:
            hint = suggestion(key, [*allowed, *ALIASES])
            raise InputError(
                f"{path}: there is no key {spelling}{hint}; allowed are {', '.join(sorted(allowed))}"
            )
        if key in named:
            raise InputError(f"{path}: {spelled[key]} and {spelling} are the same key; remove one")
        named[key], spelled[key] = value, str(spelling)
    return named


def split(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the training's and the job's part of a file's values."""
    job = {key: value for key, value in values.items() if key in Job.model_fields}
    return {key: value for key, value in values.items() if key not in job}, job
