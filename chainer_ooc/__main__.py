"""The command line: ``python -m chainer_ooc COMMAND``.

For each command one function adds its arguments to a parser and another does the work. ``_COMMANDS`` lists
them.
"""

from __future__ import annotations

import argparse
import os
import runpy
import signal
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


def _estimate(options: argparse.Namespace) -> int:
    """Print an estimate of the memory and the time that training a network takes."""
    from chainer_ooc.errors import OutOfCoreError
    from chainer_ooc.estimating.estimator import estimate

    try:
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
    parser.add_argument("folder", help="folder of a run, with log and ooc.json")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: the run's folder)")


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
    _Command("run", "run a script, unmodified, out of core", _run_arguments, _run),
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
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    If standard output is a pipe and its reader stops reading, as head does, what is left to print is dropped. The
    status is that of a program that SIGPIPE ends. The script of ``run`` gets its error, as without this package.
    """
    parser = argparse.ArgumentParser(prog="python -m chainer_ooc", description=chainer_ooc.__doc__)
    parser.add_argument("--version", action="version", version=chainer_ooc.__version__)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    try:
        try:
            options = parser.parse_args(argv)
            if options.run is not _run:
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
