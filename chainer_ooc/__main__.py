"""The command line: ``chainer-ooc COMMAND``, or ``python -m chainer_ooc COMMAND``.

For each command one function adds its arguments to a parser and another does the work. ``_COMMANDS`` lists
them.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

import chainer_ooc
from chainer_ooc import compat, wording
from chainer_ooc.compat import run as compat_run

#: A role in a docstring, with the name that it shows.
_ROLE = re.compile(r":\w+:`(?:~[\w.]+\.)?(\w+)`")


#: What completes a path, by shell, for shtab.
_PATHS = {
    "bash": "_shtab_compgen_files",
    "fish": "(__fish_complete_path (commandline -ct))",
    "powershell": "_shtab_powershell_compgen_files",
    "tcsh": "f",
    "zsh": "_files",
}


class _Parser(argparse.ArgumentParser):
    """A parser that tells of an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help tells what there is\n")


class _Command(NamedTuple):
    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    from chainer_ooc.settings import Arguments, described

    parser.usage = "%(prog)s [settings] (SCRIPT | DIRECTORY | -m MODULE | -c CODE | -) [arguments of the program]"
    parser.description = (
        "Run a program as Python does, unmodified, out of core. Options of Python's own come before: "
        "python -u -m chainer_ooc run script.py"
    )
    settings = parser.add_argument_group("settings", "of out-of-core mode")
    for name, kind in get_type_hints(Arguments).items():
        flag = f"--{name.replace('_', '-')}"
        text = _ROLE.sub(r"\1", described(name)).replace("``", "").replace("%", "%%")
        if kind is bool:
            action = argparse.BooleanOptionalAction
            settings.add_argument(flag, action=action, default=None, help=text)
        else:
            choices = get_args(kind) if get_origin(kind) is Literal else None
            argument = settings.add_argument(flag, choices=choices, help=text)
            if name in ("swap_dir", "trace"):
                _completes_paths(argument)
    parser.add_argument(
        "--in-core", action="store_true", help="do not move anything: only run the program"
    )
    _completes_paths(parser.add_argument("program", nargs="*", help="what Python is to run"))


def _completes_paths(action: argparse.Action) -> None:
    action.complete = _PATHS  # type: ignore[attr-defined]


def _split_program(arguments: Sequence[str]) -> int:
    """Return how many of the arguments of ``run`` are its own. The program's begin there, whatever they look like."""
    from chainer_ooc.settings import Arguments

    kinds = get_type_hints(Arguments)
    valued = {f"--{name.replace('_', '-')}" for name, kind in kinds.items() if kind is not bool}
    index = 0
    while index < len(arguments):
        one = arguments[index]
        if one in ("-", "--") or one[:1] != "-" or one[:2] in ("-m", "-c"):
            return index
        index += 2 if one in valued else 1
    return len(arguments)


def _run(options: argparse.Namespace) -> int:
    """Become the interpreter that runs the program, with the settings in the environment.

    So everything is as Python makes it: ``sys.path``, ``__main__``, standard input, what the program's end looks like.
    """
    from chainer_ooc.errors import SettingError
    from chainer_ooc.settings import Arguments, Settings

    os.environ.pop(compat_run.VARIABLE, None)
    if not options.in_core:
        given = {name: getattr(options, name) for name in Arguments.__annotations__}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            with warnings.catch_warnings(record=True, action="always") as told:
                settings = Settings.resolve(given)
        except SettingError as error:
            print(f"chainer_ooc run: {error}", file=sys.stderr)
            return 2
        for warning in told:
            if options.limit and str(warning.message).startswith("limit="):
                print(f"chainer_ooc run: {warning.message}", file=sys.stderr)
            # The program warns of all others.
        os.environ.update(settings.environment(given), **{compat_run.VARIABLE: str(os.getpid())})
    compat.child_environment()
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *_options_of_python(), *options.program])


def _options_of_python() -> list[str]:
    """Return what stands between this interpreter's name and this program's: options such as ``-u``, or a debugger."""
    before = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    # It ends with -m chainer_ooc, also glued to it or to other letters, or with the console script.
    if len(before) > 1 and re.fullmatch("-[A-Za-z]*m", before[-2]):
        last = before[-2][:-1]
        before = before[:-2]
    else:
        glued = re.fullmatch(r"(-[A-Za-z]*)m\s*chainer_ooc(\.__main__)?", before[-1])
        last = glued[1] if glued else ""
        before = before[:-1]
    return [*before, last] if len(last) > 1 else before


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _doctor(options: argparse.Namespace) -> int:
    from chainer_ooc import doctor

    return doctor.main(options.json)


def _version_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _version(options: argparse.Namespace) -> int:
    print(chainer_ooc.__version__)
    return 0


def _estimate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "net",
        help="network: a name such as resnet50, module:callable or file.py:callable "
        "(a wrong name lists the known ones)",
    )
    parser.add_argument("--insize", type=int, default=224, help="height and width of images (224)")
    parser.add_argument("--batchsize", type=int, default=32, help="items per step (32)")
    parser.add_argument("--limit", help="memory limit, like 16GiB (default: what the device has)")
    parser.add_argument(
        "--device", default="cpu", help="cpu (this machine, measured), or a GPU such as h200, v100"
    )
    parser.add_argument(
        "--optimizer",
        default="momentum_sgd",
        help="one of chainer.optimizers, or none (momentum_sgd)",
    )
    parser.add_argument(
        "--single-backward", action="store_true", help="backward runs once per graph, as usual"
    )
    parser.add_argument(
        "--recompute", default="auto", help="auto, or never: plans only move (auto)"
    )
    parser.add_argument(
        "--no-search", action="store_true", help="do not look for the largest batchsize and insize"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


class _Line(logging.Formatter):
    """Shows progress in one line of a terminal, each message in the place of the one before; warnings stay."""

    CLEAR = "\r\033[K"

    def format(self, record: logging.LogRecord) -> str:
        """Return the message, preceded by what clears the line."""
        end = "\n" if record.levelno > logging.INFO else ""
        return f"{self.CLEAR}{super().format(record)}{end}"


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """Show what is logged while the block runs, if standard error is a terminal."""
    stream = sys.stderr
    if stream is None or not stream.isatty():
        yield
        return
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Line())
    handler.terminator = ""
    wording.logger.addHandler(handler)
    wording.logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        print(end=_Line.CLEAR, file=stream, flush=True)


def _estimate(options: argparse.Namespace) -> int:
    """Print an estimate of the memory and the time that training a network takes."""
    from chainer_ooc.errors import OutOfCoreError
    from chainer_ooc.estimating.estimator import estimate

    try:
        with _progress():
            result = estimate(
                options.net,
                (options.insize, options.batchsize),
                limit=options.limit,
                device=options.device,
                optimizer=options.optimizer,
                single_backward=options.single_backward,
                recompute=options.recompute,
                search=not options.no_search,
            )
    except OutOfCoreError as error:
        print(f"chainer_ooc estimate: {error}", file=sys.stderr)
        return 2
    print(result.to_json() if options.json else result)
    return 0


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    folder = parser.add_argument("folder", help="folder of a run, with log and ooc.json")
    out = parser.add_argument(
        "--out", metavar="DIR", help="where to write (default: the run's folder)"
    )
    _completes_paths(folder)
    _completes_paths(out)


def _report(options: argparse.Namespace) -> int:
    """Write the report of a run and print its path."""
    from chainer_ooc.errors import OutOfCoreError
    from chainer_ooc.report.page import write_report

    try:
        written = write_report(options.folder, options.out)
    except (OutOfCoreError, OSError) as error:
        print(f"chainer_ooc report: {error}", file=sys.stderr)
        return 2
    print(*written, sep="\n")
    return 0


_COMMANDS = (
    _Command("run", "run a program, unmodified, out of core", _run_arguments, _run),
    _Command(
        "doctor",
        "show what was found here, and how to install the rest",
        _doctor_arguments,
        _doctor,
    ),
    _Command(
        "estimate",
        "tell, without training, whether a network fits, how fast it is, and why",
        _estimate_arguments,
        _estimate,
    ),
    _Command(
        "report",
        "write one page about a run: memory, timeline, what moved and why, waits",
        _report_arguments,
        _report,
    ),
    _Command("version", "print the version", _version_arguments, _version),
)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. shtab makes completions for shells from it."""
    return _parsers()[0]


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """Return the parser, and that of each command."""
    of_module = os.path.basename(sys.argv[0]) == "__main__.py"
    program = "python -m chainer_ooc" if of_module else "chainer-ooc"
    parser = _Parser(prog=program, description=chainer_ooc.__doc__)
    parser.add_argument("--version", action="version", version=chainer_ooc.__version__)
    subparsers: Any = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        subparser = subparsers.add_parser(
            command.name, help=command.help, description=command.help, allow_abbrev=False
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser, subparsers.choices


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    If standard output is a pipe and its reader stops reading, as head does, what is left to print is dropped. The
    status is that of a program that SIGPIPE ends. The script of ``run`` gets its error, as without this package.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parsers()
    try:
        try:
            if arguments[:1] == ["run"]:
                own = 1 + _split_program(arguments[1:])
                options = parser.parse_args(arguments[:own])
                options.program = arguments[own:]
                if not options.program:
                    commands["run"].error("a script, -m, -c or - is missing")
            else:
                options = parser.parse_args(arguments)
                os.environ.pop(compat_run.VARIABLE, None)
                return options.run(options)
        finally:
            # Here, not when the interpreter ends: that would tell of a broken pipe.
            print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return _run(options)


if __name__ == "__main__":
    sys.exit(main())
