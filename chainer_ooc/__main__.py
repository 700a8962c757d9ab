"""Command line: ``python -m chainer_ooc COMMAND``.

Each command is one function that adds its arguments to a parser and one that does the work;
``_COMMANDS`` lists them.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import chainer_ooc
from chainer_ooc import compat


class _Command(NamedTuple):
    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit", help="memory limit, like 8GiB (default: what the device or the machine has)"
    )
    parser.add_argument("--swap-dir", metavar="DIR", help="directory of the swap file")
    parser.add_argument(
        "--in-core", action="store_true", help="do not move anything: only run the script"
    )
    parser.add_argument("script", help="Python script to run, unmodified")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the script")


def _run(options: argparse.Namespace) -> int:
    """Run a script as ``python script.py args…`` would, with out-of-core mode on."""
    script = Path(options.script)
    if not script.is_file():
        print(f"chainer_ooc run: no such script: {options.script}", file=sys.stderr)
        return 2
    compat.child_environment()
    if not options.in_core:
        given = {"limit": options.limit, "swap_dir": options.swap_dir}
        chainer_ooc.enable(**{key: value for key, value in given.items() if value is not None})
    sys.argv = [options.script, *options.args]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(options.script, run_name="__main__")
    return 0


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _doctor(options: argparse.Namespace) -> int:
    from chainer_ooc import doctor

    return doctor.main()


_COMMANDS = (
    _Command("run", "run a script, unmodified, out of core", _run_arguments, _run),
    _Command(
        "doctor",
        "show what was found here, and how to install the rest",
        _doctor_arguments,
        _doctor,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m chainer_ooc", description=chainer_ooc.__doc__)
    parser.add_argument("--version", action="version", version=chainer_ooc.__version__)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    options = parser.parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
