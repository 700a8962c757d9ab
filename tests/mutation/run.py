"""Change the package in one place, and see that the tests notice: one mutant after the other.

    python tests/mutation/run.py                  # the planted ones: errors that a change could well bring
    python tests/mutation/run.py --generic 60     # and 60 of the generic ones
    python tests/mutation/run.py --generic all    # and all of them: an hour or two
    python tests/mutation/run.py WORD...          # those whose names begin with one of the words
    python tests/mutation/run.py --list [WORD...] # their names only
    python tests/mutation/run.py --verbose WORD...# with what the tests print
    python tests/mutation/run.py --jobs 2 ...     # two at a time

Generic ones are found in the syntax trees by what the code does and not by where it is. In the swap engine: calls
whose result nobody uses, assignments to attributes, conditions and the parts of those, handlers of errors, errors
raised, events recorded and waited for, the table of legal transitions. In the graph: each statement, each condition.
What no test notices, and is not in ``EQUIVALENT`` with its reason, makes the script fail.

Each mutant runs in a child process of its own, in which the code of one function is replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # in place of this folder

from tests.mutation.mutants import PACKAGE, Mutant, apply, function_of, mutants  # noqa: E402
from tests.mutation.targets import TESTS  # noqa: E402

#: To look which tests run what takes as long as all of them: it is worth it for more mutants than this.
FEW = 20
#: A test that takes longer than so many seconds and its own time so many times hangs: the mutant is noticed.
PATIENCE = 20, 10

_KILLED, _SURVIVED, _BROKEN = 0, 1, 3


class _Run(NamedTuple):
    """One run of a test: how long it took (seconds), and the files and outermost functions of the package that ran.

    The latter are ``None`` where nobody has looked.
    """

    seconds: float
    functions: set[tuple[str, str]] | None


@contextlib.contextmanager
def _functions_run() -> Iterator[set[tuple[str, str]]]:
    codes: dict[int, types.CodeType] = {}
    functions: set[tuple[str, str]] = set()

    def note(frame: types.FrameType, *_: object) -> None:
        codes[id(frame.f_code)] = frame.f_code

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield functions
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        for code in codes.copy().values():
            if code.co_filename.startswith(str(PACKAGE)):
                functions.add((code.co_filename, code.co_qualname.split(".<locals>")[0]))


class Runner:
    """A plugin of pytest that runs the tests, once they are collected, against one mutant after the other.

    Args:
        chosen: The mutants.
        verbose: Print what the tests print.

    Attributes:
        survivors: The names of those that no test noticed.
    """

    def __init__(self, chosen: list[Mutant], verbose: bool = False) -> None:
        self.chosen, self.verbose = chosen, verbose
        self.survivors: list[str] = []
        self._killers: dict[str, int] = {}  # tests, and how many mutants each has noticed
        self._runs: dict[str, _Run] = {}

    def pytest_runtestloop(self, session: Any) -> bool:
        """Run them."""
        gc.collect()
        gc.freeze()  # or each collection in a child looks at all modules
        self._runs = {item.nodeid: _Run(1.0, None) for item in session.items}
        if len(self.chosen) > FEW:
            self._look_on(session.items)
        for index, mutant in enumerate(self.chosen):
            start = time.monotonic()
            killed = self._is_noticed(session.items, mutant)
            word, seconds = "killed" if killed else "SURVIVED", time.monotonic() - start
            print(
                f"{index + 1}/{len(self.chosen)} {word} {mutant.name} ({seconds:.1f} s)", flush=True
            )
            if not killed:
                self.survivors.append(mutant.name)
        return True

    def _is_noticed(self, items: list[Any], mutant: Mutant) -> bool:
        while True:
            status, killer = self._run(self._in_order(items, mutant), mutant)
            if status not in (_KILLED, _SURVIVED):
                raise RuntimeError(f"the tests could not be run against {mutant.name}")
            if status == _SURVIVED:
                return False
            if killer in self._killers or self._passes_by_itself(items, killer):
                self._killers[killer] = self._killers.get(killer, 0) + 1
                return True
            print(f"{killer} fails with no mutant, too: it does not count", flush=True)
            del self._runs[killer]

    def _passes_by_itself(self, items: list[Any], name: str) -> bool:
        return self._run([item for item in items if item.nodeid == name], None)[0] == _SURVIVED

    def _run(self, items: list[Any], mutant: Mutant | None) -> tuple[int, str]:
        """Run tests in a child. Returns how it ended, and which test was the last."""

        def tests(told: IO[bytes]) -> int:
            if mutant is not None:
                apply(mutant)
            for item in items:
                signal.alarm(round(PATIENCE[0] + PATIENCE[1] * self._runs[item.nodeid].seconds))
                told.write(f"{item.nodeid}\n".encode())
                told.flush()
                if not self._passes(item):
                    return _KILLED
            return _SURVIVED

        status, names = _in_child(tests, self.verbose)
        return status, names.decode().splitlines()[-1] if names else ""

    def _in_order(self, items: list[Any], mutant: Mutant) -> list[Any]:
        """Return the tests that run what is changed: those that are fast and notice much come first."""
        place = mutant.file, mutant.function
        # What is at the top, or remembered, is of use to tests that do not run it.
        everywhere = not mutant.function or hasattr(function_of(mutant), "cache_info")
        able = [
            item
            for item in items
            if item.nodeid.startswith(TESTS[mutant.part])
            and (run := self._runs.get(item.nodeid))
            and (everywhere or run.functions is None or place in run.functions)
        ]

        def key(item: Any) -> float:
            return self._runs[item.nodeid].seconds / (1 + self._killers.get(item.nodeid, 0))

        return sorted(able, key=key)

    def _look_on(self, items: list[Any]) -> None:
        """Run the tests against no mutant, to see what each runs and how long it takes."""

        def tests(told: IO[bytes]) -> int:
            runs = {}
            for item in items:
                start = time.monotonic()
                with _functions_run() as functions:
                    self._passes(item)
                runs[item.nodeid] = _Run(time.monotonic() - start, functions)
            pickle.dump(runs, told)
            return 0

        self._runs = pickle.loads(_in_child(tests)[1])

    def _passes(self, item: Any) -> bool:
        from _pytest.runner import runtestprotocol

        reports = runtestprotocol(item, log=False)
        failed = [report for report in reports if report.failed]
        if self.verbose:
            print(item.nodeid, *[report.longreprtext for report in failed], sep="\n")
        return not failed


def _in_child(run: Callable[[IO[bytes]], int], verbose: bool = False) -> tuple[int, bytes]:
    """Run in a child process, which exits with what is returned. Returns that, and what was written to the file."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            status = _BROKEN
            try:
                os.setpgid(0, 0)
                if not verbose:
                    silence = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(silence, 1)
                    os.dup2(silence, 2)
                status = run(told)
                told.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it has left behind
        told.seek(0)
        # A crash is noticed by whoever runs the tests; so is an alarm.
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else _KILLED, told.read()


def run(chosen: list[Mutant], verbose: bool = False) -> list[str]:
    """Run the tests against mutants. Returns the names of those that no test noticed."""
    import hypothesis
    import pytest

    os.chdir(ROOT)
    hypothesis.settings.register_profile(
        "mutants", phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate), database=None
    )
    hypothesis.settings.load_profile("mutants")
    runner = Runner(chosen, verbose)
    parts = {mutant.part: None for mutant in chosen}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-s", "--no-header"]
    status = pytest.main(
        [*options, *(test for part in parts for test in TESTS[part])], plugins=[runner]
    )
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(f"the run was cut short: {status!r}")
    return runner.survivors


def chosen_of(options: argparse.Namespace) -> list[Mutant]:
    """Return the mutants that the command line asks for."""
    everything = mutants()
    if options.words:
        found = [one for one in everything if one.name.startswith(tuple(options.words))]
        if not found:
            raise SystemExit(f"no mutant's name begins with {' or '.join(options.words)}")
        return found if options.list else [one for one in found if not one.reason()]
    found = [one for one in everything if one.name.startswith("planted: ")]
    generic = [one for one in everything if one not in found and (options.list or not one.reason())]
    if options.generic not in ("all", "") and not options.list:
        random.Random(options.seed).shuffle(generic)
        generic = generic[: int(options.generic)]
    return found + (generic if options.generic or options.list else [])


def main() -> int:
    """Run the command line. Returns 0 if no mutant survived that should not have."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="mutants whose names begin so")
    parser.add_argument("--generic", default="", help="how many generic mutants, or 'all'")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    parser.add_argument("--list", action="store_true", help="print their names and run nothing")
    parser.add_argument("--verbose", action="store_true", help="print what the tests print")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--job", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.jobs > 1 and not options.job:
        command = [sys.executable, *sys.argv]
        jobs = [subprocess.Popen([*command, "--job", str(n)]) for n in range(1, options.jobs + 1)]
        return max([job.wait() for job in jobs])
    chosen = chosen_of(options)
    if options.list:
        for mutant in chosen:
            print(mutant.name, f"[{why}]" if (why := mutant.reason()) else "")
        return 0
    if options.job:
        chosen = chosen[options.job - 1 :: options.jobs]
    survivors = run(chosen, options.verbose)
    print(f"{len(chosen)} mutants, {len(survivors)} survived", *survivors, sep="\n")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
