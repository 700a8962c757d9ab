"""The settings of out-of-core mode: from arguments, then ``CHAINER_OOC_*`` variables, then defaults."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypedDict, TypeVar, get_args, get_type_hints

import psutil

from chainer_ooc.compat import run
from chainer_ooc.errors import SettingError
from chainer_ooc.wording import repr_of, warn_user

__all__ = [
    "Arguments",
    "Settings",
    "check_names",
    "described",
    "parse_bytes",
    "parse_limit",
    "show_settings",
]

#: Variables of the environment that are no settings of this module.
_OTHER_VARIABLES = (
    *("CUDNN", "CUDNN_MATH", "CUDNN_RNN", "CUDNN_WORKSPACE"),
    *("PARENT", "RUN", "WITHOUT_EXTENSION"),
)

#: What the variables of settings begin with, also where it is misspelt.
_PREFIX = re.compile(r"chainer[\W_]*ooc[\W_]*", re.IGNORECASE)

#: A limit that is given as a number below this was meant in another unit (bytes).
_UNLIKELY = 1 << 20

#: A swap file grows by this many bytes, or by one block if that is larger.
EXTENT = 64 << 20

_IN_MEMORY = ("tmpfs", "ramfs")
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_BYTES = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")

Limit = int | float | None
Split = Literal["exact", "always", "never"]
Recompute = Literal["auto", "never"]
Parameters = Literal["auto", "stay"]
F = TypeVar("F", bound=Callable[..., Any])
#: The part of a docstring that the descriptions of the settings replace.
_PLACE = re.compile(r" +limit: .*\n +\*\*settings: .*")


def _number(value: Any) -> int | float | None:
    """Return a number, also one of NumPy's, as Python's; ``None`` for anything else, infinity and not-a-number."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value) and not isinstance(value, bool):
        return float(value)
    return None


def parse_bytes(name: str, value: int | float | str) -> int:
    """Return a number of bytes given as a number or as text like ``"8GiB"``, ``"512 MB"``, ``"64k"``.

    ``KiB``, ``MiB``, ``GiB``, ``TiB`` (and the bare letters) are powers of 1024, ``kB``, ``MB``,
    ``GB``, ``TB`` powers of 1000.

    Args:
        name: The name of the setting, for the error.
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
    elif (number := _number(value)) is not None and number == int(number) >= 0:
        return int(number)
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
    number: int | float | None
    if isinstance(value, str):
        text = value.strip()
        try:
            number = _number(int(text) if text.isdecimal() else float(text))
        except ValueError:
            return _parse_text(value)
    else:
        number = _number(value)
    if isinstance(number, float) and 0 < number <= 1:
        return number
    if isinstance(number, float) and number >= _UNLIKELY:
        number = int(number)  # bytes, as in 8e9
    if isinstance(number, int) and number > 0:
        if number < _UNLIKELY:
            warn_user(
                f"limit={repr_of(value)} is {number:,} byte{'s' * (number > 1)}, less than any training takes; "
                f'units are given as in "{number}GiB"'
            )
        return number
    raise _refused(value)


def _parse_text(text: str) -> int:
    with contextlib.suppress(SettingError):
        if (nbytes := parse_bytes("limit", text)) > 0:
            return nbytes
    raise _refused(text)


def _refused(limit: Any) -> SettingError:
    return SettingError(
        f'limit={repr_of(limit)} is not allowed; give bytes (an int > 0), text such as "8GiB", a fraction of the '
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


def _shares() -> int:
    """Return among how many a child of ``run`` divides the limit: it, its brothers and the process that made them."""
    own = psutil.Process()
    brothers = 0
    for process in psutil.Process(os.getppid()).children():
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline()[1:])
            helper = "resource_tracker" in command or (
                "forkserver" in command and "forkserver" not in " ".join(own.cmdline())
            )
            brothers += process.exe() == own.exe() and not helper
    return max(brothers, 1) + 1


def _one_of(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def parse(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise SettingError(f"{name}={repr_of(value)} is not allowed; give one of {choices}")
        return value

    return parse


def _parse_path(name: str, value: Any) -> str:
    """Return an absolute path: the program may change its directory."""
    try:
        path = os.fsdecode(value)
    except TypeError:
        path = ""
    if not path or "\0" in path:
        raise SettingError(f"{name}={repr_of(value)} is not a path; give text or a pathlib.Path")
    return os.path.abspath(path)


def _parse_directory(name: str, value: Any) -> str:
    path = _parse_path(name, value)
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
        warn_user(
            f"{name}={path!r} is a {kind}, that is memory: what is moved there takes memory all the same; "
            "name a directory on a disk"
        )
    return path


def _parse_file(name: str, value: Any) -> str:
    path = _parse_path(name, value)
    directory = os.path.dirname(path)
    if os.path.isdir(path) or not os.access(directory, os.W_OK | os.X_OK):
        raise SettingError(
            f"{name}={os.fsdecode(value)!r} is not a file that can be written; name one in a directory that exists"
        )
    return path


@functools.cache
def _default_directory(temporary: str) -> str:
    if _file_system(temporary) in _IN_MEMORY and os.access("/var/tmp", os.W_OK | os.X_OK):
        return "/var/tmp"
    return temporary


def _file_system(directory: str) -> str:
    """Return the type of a directory's file system, such as ``"ext4"``; ``""`` if unknown."""
    path = os.path.realpath(directory)
    mounts = psutil.disk_partitions(all=True)
    over = [m for m in mounts if os.path.commonpath([path, m.mountpoint]) == m.mountpoint]
    return max(over, key=lambda mount: len(mount.mountpoint)).fstype if over else ""


def _optional(parse: Any) -> Any:
    return lambda name, value: None if value is None else parse(name, value)


def _setting(default: Any, parse: Callable[[str, Any], Any], doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"parse": parse, "doc": doc})


class Arguments(TypedDict, total=False):
    """The settings that users may give, for type checkers. Other fields of :class:`Settings` are internal."""

    limit: int | float | str | None
    swap_dir: str | bytes | os.PathLike[str] | None
    host_limit: int | str | None
    strict: bool
    single_backward: bool
    recompute: Recompute
    parameters: Parameters
    split: Split
    plan: bool
    verify: bool
    trace: str | bytes | os.PathLike[str] | None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings in force, each with its default, its parser and its description."""

    limit: int | float | None = _setting(
        None,
        lambda name, value: parse_limit(value),
        """The memory that training may take: bytes (int), text such as ``"8GiB"``, or a fraction of the device's memory
        (float, 0 < limit <= 1). ``None``: what is free on the device, divided by the ranks that share it. On a GPU it
        bounds arrays' memory, on the CPU the process's resident memory (RSS). It is per process and per device.""",
    )
    swap_dir: str | None = _setting(
        None,
        _optional(_parse_directory),
        """Directory of the swap file. ``None``: the directory for temporary files, or ``/var/tmp`` where that is a file
        system in memory.""",
    )
    host_limit: int | None = _setting(
        None,
        _optional(parse_bytes),
        """Most pinned host memory for arrays of a GPU: bytes (int), or text; what is beyond goes to the swap file.
        ``None``: 80 % of the free host memory, divided by the ranks that share it; the rest stays free, whoever takes
        memory later. Not used for NumPy arrays, whose only tier is the swap file.""",
    )
    strict: bool = _setting(
        False,
        _parse_flag,
        """CPU only: raise :class:`~chainer_ooc.errors.OutOfMemoryError` for a function whose working set does not fit
        under the limit, instead of one warning.""",
    )
    single_backward: bool = _setting(
        False,
        _parse_flag,
        """Backward runs once per graph: after its last use an array is dropped, with no copy written. A second backward
        through the same graph raises :class:`~chainer_ooc.errors.GraphReleasedError`.""",
    )
    recompute: str = _setting(
        "auto",
        _one_of(get_args(Recompute)),
        """``"auto"``: run functions again in backward instead of moving their results, bit for bit, where a plan finds
        that this makes the iteration shorter. ``"never"``: only move.""",
    )
    parameters: str = _setting(
        "stay",
        _one_of(get_args(Parameters)),
        """``"auto"``: on the CPU, where it does not suffice to move what backward needs, parameters, their gradients
        and the optimizer's state move, too, and come back for each use. ``"stay"``: they stay in memory.""",
    )
    split: str = _setting(
        "never",
        _one_of(get_args(Split)),
        """CPU only: convolutions, poolings and other functions of single images whose temporaries do not fit under the
        limit run in pieces: ``"exact"`` where the results are the same bits, ``"always"`` also where they may be
        rounded differently, ``"never"``.""",
    )
    plan: bool = _setting(
        True,
        _parse_flag,
        """Record the first iteration, plan it, and from the next one on move ahead of need by the plan that takes the
        least time, as long as that is faster than on demand.""",
    )
    verify: bool = _setting(
        False,
        _parse_flag,
        """Take checksums of what is saved: what comes back must be what went out, or
        :class:`~chainer_ooc.errors.CorruptCopyError` is raised; what is modified in place after it was saved is
        reported with the function that saved it. Slow: for finding errors.""",
    )
    trace: str | None = _setting(
        None,
        _optional(_parse_file),
        """Write a trace of functions, copies, waits and memory to this file, for Perfetto or chrome://tracing, while
        they happen. With several ranks, each writes its own: its number is added to the name; so does a child.""",
    )
    # For tests only, to move arrays of any size at any time. Not shown to users.
    swap_all: bool = _setting(False, _parse_flag, "Move every saved array out at once.")
    swap_parameters: bool = _setting(
        False, _parse_flag, "Move every parameter, gradient and state of an optimizer out at once."
    )
    discard_all: bool = _setting(
        False, _parse_flag, "Without a plan, run again what is cheap instead of moving it."
    )
    min_bytes: int = _setting(64 << 10, parse_bytes, "Leave smaller allocations where they are.")
    # For children of ``run``.
    shares: int = _setting(
        1,
        lambda name, value: max(parse_bytes(name, value), 1),
        "The limit is divided among so many processes.",
    )

    @classmethod
    def resolve(cls, given: Mapping[str, Any], base: Settings | None = None) -> Settings:
        """Return settings from arguments, and from ``base`` or the environment for those that are not given.

        Args:
            given: Values by name.
            base: The settings of an outer mode; ``None`` reads ``CHAINER_OOC_*``.

        Raises:
            SettingError: If a value is not allowed.
            TypeError: If there is no such setting.
        """
        check_names(given)
        if base is None:
            check_environment()
        values = dict(given)
        if base is None and "limit" not in given and run.is_started() and run.is_child():
            values["shares"] = _shares()
        elif base is not None and "limit" in given:
            values["shares"] = 1
        sources = dict.fromkeys(values, "")
        if base is None:
            for name in _FIELDS.keys() - values.keys():
                variable = variable_of(name)
                if os.environ.get(variable, ""):
                    values[name], sources[name] = os.environ[variable], f" (from {variable})"
        parsed: dict[str, Any] = {}
        for name, value in values.items():
            try:
                parsed[name] = _FIELDS[name].metadata["parse"](name, value)
            except SettingError as error:
                raise SettingError(f"{error}{sources[name]}") from None
        return dataclasses.replace(base, **parsed) if base else cls(**parsed)

    def environment(self, names: Iterable[str]) -> dict[str, str]:
        """Return the ``CHAINER_OOC_*`` variables from which :meth:`resolve` reads these settings again."""

        def text(value: Any) -> str:
            if isinstance(value, int) and not isinstance(value, bool):
                return f"{value}B"  # with its unit, of which nothing needs to be said
            return str(int(value) if isinstance(value, bool) else value)

        return {variable_of(name): text(getattr(self, name)) for name in names}

    @property
    def directory(self) -> str:
        """The directory of the swap file."""
        return self.swap_dir or _default_directory(tempfile.gettempdir())


_FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"CHAINER_OOC_{name.upper()}"


def check_names(given: Mapping[str, Any]) -> None:
    """Raise a :class:`TypeError` if a name in ``given`` is not that of a setting."""
    for name, value in given.items():
        if name not in _FIELDS:
            known = [*Arguments.__annotations__]
            nearest = _nearest(name, known)
            raise TypeError(
                f"{name}={repr_of(value)}: there is no setting {name!r}; "
                + (f"did you mean {nearest!r}?" if nearest else f"there are {known}")
            )


def check_environment() -> None:
    """Raise an error if a variable of the environment looks like a setting and is none.

    Raises:
        SettingError: If there is one. It names the variable that comes closest.
    """
    known = {variable_of(name) for name in (*_FIELDS, *_OTHER_VARIABLES)}
    public = [*Arguments.__annotations__, *(name.lower() for name in _OTHER_VARIABLES)]
    for variable, value in os.environ.items():
        looks_like_one = _PREFIX.match(variable)
        if looks_like_one and value and variable not in known:
            nearest = _nearest(variable[looks_like_one.end() :], public)
            names = [variable_of(name) for name in ([nearest] if nearest else public)]
            raise SettingError(
                f"{variable}={value!r} is in the environment, but there is no such setting; "
                + (f"did you mean {names[0]}?" if nearest else f"there are {', '.join(names)}")
            )


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name.lower(), known, 1)), None)


def show_settings(function: F) -> F:
    """Show the public settings in place of ``**settings``: in the signature, with types and defaults.

    In the docstring, their descriptions replace the line of ``limit`` and the next line.
    """
    own = inspect.signature(function, eval_str=True)
    types = get_type_hints(Arguments)
    settings = {
        name: inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_FIELDS[name].default,
            annotation=types[name],
        )
        for name in types
    }
    first, last = [], []
    for parameter in own.parameters.values():
        if parameter.name in settings:  # may be given by position
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            first.append(settings.pop(parameter.name).replace(kind=kind))
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            last.append(parameter)
        elif parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            first.append(parameter)
    shown = own.replace(parameters=[*first, *settings.values(), *last])
    function.__signature__ = shown  # type: ignore[attr-defined]
    described = "\n".join(_described(name) for name in types)
    if function.__doc__:  # not with python -OO
        function.__doc__ = _PLACE.sub(lambda match: described, inspect.cleandoc(function.__doc__))
    return function


def described(name: str) -> str:
    """Return the description of a setting, in reStructuredText, on one line."""
    return " ".join(_FIELDS[name].metadata["doc"].split())


def _described(name: str) -> str:
    text = f"{name}: {described(name)}"
    wrap = functools.partial(textwrap.fill, break_long_words=False, break_on_hyphens=False)
    return wrap(text, 100, initial_indent=" " * 4, subsequent_indent=" " * 8)
