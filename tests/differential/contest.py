"""A program runs on stock Chainer and out of core: what differs, and with how few steps it still does."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.differential.program import Program, make_program

__all__ = ["Arena", "Failure"]

#: What ``verify`` says of an array that has been written to.
TOLD = re.compile(r"has been modified in place since|^  \w+\.check_unchanged\(")
FORK = re.compile(r"DeprecationWarning: This process \(pid=\d+\) is multi-threaded")
TIMEOUT = 60.0  #: of one program (seconds)


@dataclasses.dataclass
class Failure:
    """A program whose outcomes differ.

    Attributes:
        program: It.
        differences: What differs.
        stderr: What it printed there out of core.
    """

    program: Program
    differences: list[str]
    stderr: str

    def __str__(self) -> str:
        text = "\n".join(f"  {line}" for line in self.differences[:6])
        tail = "\n".join(f"    | {line}" for line in self.stderr.splitlines()[:80])
        return f"seed {self.program.seed}:\n{text}\n{self.program}\n  stderr out of core:\n{tail}"


class Zygote:
    """A process that runs one program at a time."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CHAINER_OOC")}
        environment.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), PYTHONWARNINGS="default")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.differential.zygote"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, program: Program, contender: str, plant: str | None) -> dict[str, Any]:
        """Return the outcome of a program."""
        with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
            directory = Path(name)
            (directory / "program.json").write_text(json.dumps(dataclasses.asdict(program)))
            request = {
                "directory": name,
                "contender": contender,
                "timeout": TIMEOUT,
                "plant": plant,
            }
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            outcome: dict[str, Any] = {"exit status": self.process.stdout.readline().strip()}
            for part in ("stdout", "stderr", "record"):
                path = directory / part
                outcome[part] = path.read_text(errors="replace") if path.exists() else ""
            outcome["record"] = [json.loads(line) for line in outcome["record"].splitlines()]
            return outcome

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Arena:
    """Runs programs on stock Chainer and on a contender. A context manager.

    Args:
        contender: ``"out of core"``, ``"no hook"``, or ``"stock"`` itself, to see that programs are deterministic.
        jobs: How many at a time.
        plant: The name of an error that is planted in the contender.
    """

    def __init__(
        self, contender: str = "out of core", jobs: int | None = None, plant: str | None = None
    ) -> None:
        self.contender, self.plant = contender, plant
        self.jobs = jobs or len(os.sched_getaffinity(0))
        self._local = threading.local()
        self._zygotes: list[Zygote] = []

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *error: object) -> None:
        for zygote in self._zygotes:
            zygote.close()

    def fight(self, program: Program) -> Failure | None:
        """Run one program on both. Returns what differs, ``None`` if nothing does."""
        zygote = getattr(self._local, "zygote", None)
        if zygote is None:
            zygote = self._local.zygote = Zygote()
            self._zygotes.append(zygote)
        stock = zygote.run(program, "stock", None)
        other = zygote.run(program, self.contender, self.plant)
        found = list(differences(stock, other, program.edits))
        return Failure(program, found, other["stderr"]) if found else None

    def failures(self, seeds: Iterable[int]) -> Iterator[tuple[int, Failure | None]]:
        """Yield each seed with what its program's failure is."""
        with ThreadPoolExecutor(self.jobs) as pool:
            yield from zip(
                seeds, pool.map(lambda seed: self.fight(make_program(seed)), seeds), strict=True
            )

    def shrunk(self, failure: Failure, patience: int = 200) -> Failure:
        """Leave out steps as long as the program still fails.

        Args:
            failure: What failed.
            patience: At most so many programs are run for it.
        """
        size = max(len(failure.program.steps) // 2, 1)
        while patience > 0:
            has_shrunk = False
            start = 0
            while start < len(failure.program.steps) and patience > 0:
                steps = failure.program.steps
                fewer = dataclasses.replace(
                    failure.program, steps=steps[:start] + steps[start + size :]
                )
                patience -= 1
                smaller = self.fight(fewer)
                if smaller is None:
                    start += size
                else:
                    failure, has_shrunk = smaller, True
            if size == 1 and not has_shrunk:
                break
            size = max(size // 2, 1)
        for change in ({"last": ""}, {"keeps": False}, {"keeps": True}):
            if any(getattr(failure.program, name) != value for name, value in change.items()):
                smaller = self.fight(dataclasses.replace(failure.program, **change))
                if smaller is not None:
                    failure = smaller
                    break
        return failure


def differences(stock: dict[str, Any], other: dict[str, Any], edits: bool) -> Iterator[str]:
    """Yield what differs between two outcomes; ``edits``: ``verify`` may tell of what the program writes."""
    for number, (a, b) in enumerate(zip(stock["record"], other["record"], strict=False)):
        if a[:2] == b[:2]:
            continue
        if a[0] == "the end":
            yield f"left behind: {', '.join(b[1]) if b[1] else b}"
        elif a[1] != b[1]:
            yield f"step {number}: raises {b[1]} ({b[2]}) instead of {a[1]} ({a[2]})"
        elif len(a[0]) == len(b[0]):
            wrong = next(i for i in range(len(a[0])) if a[0][i] != b[0][i])
            yield f"step {number}: value {wrong} is {b[0][wrong]} instead of {a[0][wrong]}"
        else:
            yield f"step {number}: shows {b[0]} instead of {a[0]}"
    if len(stock["record"]) != len(other["record"]):
        yield f"{len(other['record'])} steps were run instead of {len(stock['record'])}"
    if stock["exit status"] != other["exit status"]:
        yield f"exit status {other['exit status']} instead of {stock['exit status']}"
    if stock["stdout"] != other["stdout"]:
        yield f"stdout {other['stdout'][-300:]!r} instead of {stock['stdout'][-300:]!r}"
    printed, expected = (essence(outcome["stderr"]) for outcome in (other, stock))
    if edits:
        printed = [line for line in printed if not TOLD.search(line)]
    if printed != expected:
        changed = [line for line in difflib.ndiff(expected, printed) if line[0] in "+-"]
        yield f"stderr has more (+) and less (-): {changed[:6]}"


def essence(stderr: str) -> list[str]:
    """Return the lines of stderr, but for tracebacks' places and addresses: our functions are among them.

    From Python 3.12 on a fork warns if other threads are alive at that moment, which is a matter of chance, and of the
    threads that copy.
    """
    lines = []
    for line in stderr.splitlines():
        if line.startswith(("  File ", "    ", "  pid = os.fork()")) or FORK.search(line):
            continue
        lines.append(re.sub(r"0x[0-9a-f]+", "0x", line))
    return lines
