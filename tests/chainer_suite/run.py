"""Run Chainer 7.8.1's own tests, directory by directory, and count.

    git clone --depth 1 --branch v7.8.1 https://github.com/chainer/chainer /path/to/chainer
    python tests/chainer_suite/run.py /path/to/chainer

Prints a Markdown table of passed, failed and skipped tests, and the failures; its exit status tells whether there are
others than docs/compatibility.md knows. ``chainermn_tests`` run under ``mpiexec``, file by file. With
``--force-copies`` each test runs out of core; what was moved is counted on the standard error. Only tests that
need no GPU and no ChainerX run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEFT_OUT = ("gpu", "cudnn", "multi_gpu", "ideep", "chainerx", "slow", "theano", "nccl")
# Of chainermn_tests: they download MNIST in one rank while the others wait.
DOWNLOADS = "not mnist and not multinode_autoload"
# Fail on NumPy 2 by what the tests themselves compute: docs/compatibility.md.
KNOWN = r"test_pad_sequence\..*::test_forward_cpu|::test_det_scaling_cpu|test_softmax_cross_entropy\..*::test_forward\b"
MARKERS = " and ".join(f"not {name}" for name in LEFT_OUT)


def main() -> int:
    options = arguments()
    tests = options.source.resolve() / "tests"
    if not (tests / "chainer_tests").is_dir():
        sys.exit(f"{options.source} is no checkout of Chainer: it has no tests/chainer_tests")
    failures: list[str] = []
    print("| Directory | Passed | Failed | Skipped |\n|---|---|---|---|", flush=True)
    for name, runs in groups(tests, options):
        total: Counter[str] = Counter()
        for targets, ranks in runs:
            total += run(targets, ranks, tests, options, failures)
        print(
            f"| {name} | {total['passed']} | {total['failed']} | {total['skipped']} |", flush=True
        )
    unknown = [failure for failure in failures if not re.search(KNOWN, failure)]
    print(f"\n{len(failures)} failures", *failures, sep="\n")
    print(f"{len(unknown)} of them are not those of docs/compatibility.md")
    return bool(unknown)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="checkout of Chainer v7.8.1")
    parser.add_argument("--stock", action="store_true", help="without chainer_ooc's edits")
    parser.add_argument(
        "--force-copies", action="store_true", help="out of core, see chainer_ooc.testing"
    )
    parser.add_argument("--only", nargs="*", help="directories, like functions_tests chainermn")
    parser.add_argument("--ranks", type=int, default=2, help="ranks for chainermn_tests")
    parser.add_argument("--timeout", type=int, default=1500, help="seconds for a directory")
    parser.add_argument("--mpi-timeout", type=int, default=180, help="seconds for a file with MPI")
    parser.add_argument("--pytest", default="", help="more arguments for pytest")
    return parser.parse_args()


def groups(
    tests: Path, options: argparse.Namespace
) -> Iterator[tuple[str, list[tuple[list[Path], int]]]]:
    """Yield a name and what to run for it: targets and a number of ranks, 0 for no mpiexec."""
    chainer = tests / "chainer_tests"
    found = {d.name: [([d], 0)] for d in sorted(chainer.glob("*_tests"))}
    found["the rest of chainer"] = [(sorted(chainer.glob("test_*.py")), 0)]
    for directory in sorted((tests / "chainermn_tests").glob("*_tests")):
        files = sorted(directory.rglob("test_*.py"))
        found[f"chainermn {directory.name}"] = [([file], options.ranks) for file in files]
    for name, runs in found.items():
        if not options.only or any(name.startswith(wanted) for wanted in options.only):
            yield name, runs


def run(
    targets: list[Path], ranks: int, tests: Path, options: argparse.Namespace, failures: list[str]
) -> Counter[str]:
    """Run one pytest, or one on each of several ranks, and return the sum of their counts."""
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    env = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(filter(None, paths)),
        CHAINER_SUITE_STOCK=str(int(options.stock)),
        PYTHONDONTWRITEBYTECODE="1",
    )
    env.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as directory:
        # Run elsewhere: in the checkout, its unbuilt chainer/ would be the one to be imported.
        command = [sys.executable, "-P", "-m", "pytest", *map(str, targets), "-q", "-m", MARKERS]
        command += ["-c", str(HERE / "pytest.ini"), "--rootdir", str(tests)]
        command += ["-p", "tests.chainer_suite.plugin", "-p", "no:cacheprovider"]
        command += ["-W", "default"] if options.stock else []  # it warns while it is imported
        command += ["-p", "tests.chainer_suite.forced"] if options.force_copies else []
        command += options.pytest.split()
        if ranks:
            command = [mpiexec(), "-n", str(ranks), *command, "-k", DOWNLOADS]
        try:
            done = subprocess.run(
                command,
                cwd=directory,
                env=env | {"CHAINER_SUITE_XML": directory},
                timeout=options.mpi_timeout if ranks else options.timeout,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                check=False,
            )
            output = done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            output = "no end within the timeout"
        reports = sorted(Path(directory).glob("*.xml"))
        for line in output.splitlines():
            if line.startswith("forced:"):
                print(f"{targets[0].relative_to(tests)}: {line}", file=sys.stderr, flush=True)
        total: Counter[str] = Counter()
        for report in reports:
            total += count(report, failures)
        for _ in range(len(reports), max(ranks, 1)):
            total["failed"] += 1
            errors = [line for line in output.splitlines() if line.startswith("E  ")]
            last = (errors or output.splitlines() or [""])[0]
            failures.append(f"{targets[0].relative_to(tests)}: ended without a report: {last}")
        return total


def mpiexec() -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which("mpiexec", path=path) or sys.exit("no mpiexec: pip install mpich mpi4py")


def count(report: Path, failures: list[str]) -> Counter[str]:
    """Count the tests of one JUnit report."""
    total: Counter[str] = Counter()
    for case in ET.parse(report).getroot().iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        if bad:
            total["failed"] += 1
            reason = (bad[0].text or "").strip().splitlines()[-1:] or [""]
            test = f"{case.get('classname')}::{case.get('name')}".lstrip(":")
            failures.append(f"{test}: {reason[0].removeprefix('E').strip()}")
        elif any(child.tag == "skipped" for child in case):
            total["skipped"] += 1
        else:
            total["passed"] += 1
    return total


if __name__ == "__main__":
    sys.exit(main())
