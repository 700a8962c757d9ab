"""The settings of out-of-core mode: arguments first, then ``CHAINER_OOC_*`` variables, then defaults."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import psutil

from chainer_ooc.errors import SettingError
from chainer_ooc.swap.disk import EXTENT
from chainer_ooc.wording import repr_of

__all__ = ["Settings", "check_names", "parse_bytes", "parse_limit"]

_IN_MEMORY = ("tmpfs", "ramfs")
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_BYTES = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)
_SPLITS = ("exact", "always", "never")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")

Limit = int | float | None


def parse_bytes(name: str, value: int | float | str) -> int:
    """Return a number of bytes given as a number or as text like ``"8GiB"``, ``"512 MB"``, ``"64k"``.

    ``KiB``, ``MiB``, ``GiB``, ``TiB`` (and the bare letters) are powers of 1024, ``kB``, ``MB``,
    ``GB``, ``TB`` powers of 1000.

    Args:
        name: The setting's name, for the error.
        value: The value.

    Raises:
        SettingError: If it is not a whole number of bytes greater than or equal to zero.
    """
    if isinstance(value, str):
        match = _BYTES.fullmatch(value)
        if match:
            number, unit, binary, byte = match.groups()
            base = 1000 if byte and unit and not binary else 1024
            return int(float(number) * base ** _UNITS[unit.lower()])
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise SettingError(
        f'{name}={repr_of(value)} is not a number of bytes; give an int such as {8 << 30} or text such as "8GiB"'
    )


def parse_limit(value: int | float | str | None) -> Limit:
    """Return a memory limit: bytes (int > 0), a fraction of the device (0 < float <= 1), or ``None``.

    Raises:
        SettingError: If it is none of these.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "auto")):
        return None
    if isinstance(value, str):
        text = value.strip()
        try:
            value = int(text) if text.isdigit() else float(text)
        except ValueError:
            value = parse_bytes("limit", text)
    if isinstance(value, float) and 0 < value <= 1:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise SettingError(
        f'limit={repr_of(value)} is not allowed; give bytes (an int > 0), text such as "8GiB", a fraction of the '
        "device's memory (a float, 0 < fraction <= 1), or None for all that is free"
    )


def _parse_flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        if value.strip().lower() in _TRUE:
            return True
        if value.strip().lower() in _FALSE:
            return False
    raise SettingError(f"{name}={repr_of(value)} is not allowed; give True or False")


def _parse_split(name: str, value: Any) -> str:
    if value not in _SPLITS:
        raise SettingError(f"{name}={repr_of(value)} is not allowed; give one of {_SPLITS}")
    return str(value)


def _parse_directory(name: str, value: Any) -> str:
    path = os.fspath(value)
    if not os.path.isdir(path):
        raise SettingError(
            f"{name}={path!r} is not a directory; create it, or name one that exists"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise SettingError(f"{name}={path!r} cannot be written to; name a directory that can")
    free = shutil.disk_usage(path).free
    if free < EXTENT:
        raise SettingError(
            f"{name}={path!r} is full: {free >> 20} MiB are free, {EXTENT >> 20} MiB are the least that is "
            "taken; free space there or name a directory on a larger disk"
        )
    if (kind := _file_system(path)) in _IN_MEMORY:
        warnings.warn(
            f"{name}={path!r} is a {kind}, that is memory: what is moved there takes memory all the same; "
            "name a directory on a disk",
            RuntimeWarning,
            stacklevel=2,
        )
    return path


def _parse_file(name: str, value: Any) -> str:
    path = os.path.abspath(os.fspath(value))
    directory = os.path.dirname(path)
    if os.path.isdir(path) or not os.access(directory, os.W_OK | os.X_OK):
        raise SettingError(
            f"{name}={os.fspath(value)!r} is not a file that can be written; name one in a directory that exists"
        )
    return path


@functools.cache
def _default_directory(temporary: str) -> str:
    if _file_system(temporary) in _IN_MEMORY and os.access("/var/tmp", os.W_OK | os.X_OK):
        return "/var/tmp"
    return temporary


def _file_system(directory: str) -> str:
    """Return the type of the file system of a directory, such as ``"ext4"``; ``""`` if unknown."""
    path = os.path.realpath(directory)
    mounts = psutil.disk_partitions(all=True)
    over = [m for m in mounts if os.path.commonpath([path, m.mountpoint]) == m.mountpoint]
    return max(over, key=lambda mount: len(mount.mountpoint)).fstype if over else ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What :func:`chainer_ooc.enable` and :func:`chainer_ooc.out_of_core_mode` take.

    Each has an environment variable of its name: ``CHAINER_OOC_LIMIT``, ``CHAINER_OOC_SWAP_DIR``, ...

    Attributes:
        limit: The memory that training may take: bytes (int), text like ``"8GiB"``, or a fraction of
            the device's memory (float). ``None``: what is free on the device, divided by the ranks
            that share it. On a GPU it bounds CuPy's memory pool, on the CPU the process's resident
            memory (RSS). It is per process and per device.
        host_limit: Most pinned host memory (bytes) for arrays of a GPU; what is beyond goes to the
            swap file. ``None``: 80 % of the free host memory, divided by the ranks that share it.
            Not used for NumPy arrays, whose only tier is the swap file.
        swap_dir: Directory of the swap file. ``None``: the directory for temporary files, or
            ``/var/tmp`` where that is a file system in memory.
        strict: CPU only: a function whose working set does not fit under the limit raises
            :class:`~chainer_ooc.errors.OutOfMemoryError`. Default: one warning, and it runs.
        single_backward: Backward runs once per graph: after its last use an array is dropped, with no
            copy written. A second backward through the same graph raises
            :class:`~chainer_ooc.errors.GraphReleasedError`.
        recompute: Functions that give the same bits when they are run again are run again in backward, and their
            results not moved: fewer bytes each way, more computation. Cheap ones (activations, batch
            normalization, additions and the like) are whenever memory is short, convolutions and chains
            where a plan says so.
        plan: From the third iteration on, what moves ahead of need is planned: an iteration is recorded, simulated,
            and played by the plan that takes the least time, as long as that is faster than on demand.
        split: CPU only: convolutions, poolings and other functions of single images whose temporaries do not fit
            under the limit run in pieces: ``"exact"`` where the results are the same bits, ``"always"`` also
            where they may be rounded differently, ``"never"``.
        verify: Take checksums of what is saved: what comes back must be what went out, or
            :class:`~chainer_ooc.errors.CorruptCopyError` is raised; what is modified in place after it was
            saved is reported with the function that saved it. Slow: for finding errors.
        trace: Write a trace of functions, copies, waits and memory to this file, for Perfetto or
            chrome://tracing. With several ranks, each writes its own: its number is added to the name.
        swap_all: Move every saved array out at once, whether memory is short or not. For tests, of small arrays.
        min_bytes: Leave smaller allocations (bytes) where they are. For tests, which set 1.
    """

    limit: Limit = None
    host_limit: int | None = None
    swap_dir: str | None = None
    strict: bool = False
    single_backward: bool = False
    recompute: bool = False
    plan: bool = True
    split: str = "never"
    verify: bool = False
    trace: str | None = None
    swap_all: bool = False
    min_bytes: int = 64 << 10

    @classmethod
    def resolve(cls, given: Mapping[str, Any], base: Settings | None = None) -> Settings:
        """Return settings from arguments, for what they leave out ``base`` or the environment.

        Args:
            given: Values by name.
            base: What holds already, of an outer mode; ``None`` reads ``CHAINER_OOC_*``.

        Raises:
            SettingError: If a value is not allowed.
            TypeError: If there is no such setting.
        """
        check_names(given)
        values = dict(given)
        sources = dict.fromkeys(given, "")
        if base is None:
            for name in _PARSERS.keys() - given.keys():
                variable = f"CHAINER_OOC_{name.upper()}"
                if os.environ.get(variable, ""):
                    values[name], sources[name] = os.environ[variable], f" (from {variable})"
        parsed = {}
        for name, value in values.items():
            try:
                parsed[name] = _PARSERS[name](name, value)
            except SettingError as error:
                raise SettingError(f"{error}{sources[name]}") from None
        return dataclasses.replace(base, **parsed) if base else cls(**parsed)

    @property
    def directory(self) -> str:
        """The directory of the swap file."""
        return self.swap_dir or _default_directory(tempfile.gettempdir())


def check_names(given: Mapping[str, Any]) -> None:
    """Raise a :class:`TypeError` that names what is no setting among ``given``."""
    for name, value in given.items():
        if name not in _PARSERS:
            known = sorted(_PARSERS.keys() - {"swap_all", "min_bytes"})
            raise TypeError(
                f"{name}={repr_of(value)}: there is no setting {name!r}; there are {known}"
            )


def _optional(parse: Any) -> Any:
    return lambda name, value: None if value is None else parse(name, value)


_PARSERS = {
    "limit": lambda name, value: parse_limit(value),
    "swap_all": _parse_flag,
    "min_bytes": parse_bytes,
    "host_limit": _optional(parse_bytes),
    "swap_dir": _optional(_parse_directory),
    "strict": _parse_flag,
    "single_backward": _parse_flag,
    "recompute": _parse_flag,
    "plan": _parse_flag,
    "split": _parse_split,
    "verify": _parse_flag,
    "trace": _optional(_parse_file),
}
