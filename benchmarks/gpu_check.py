"""Check on a GPU what no other machine can tell, most telling first, in eight minutes, and write one file.

    python benchmarks/gpu_check.py              # or: make gpu-check
    python benchmarks/gpu_check.py --on-double  # real CuPy without a GPU: each step's code runs, nothing is computed

It takes Python, CuPy and what chainer_ooc needs, with this tree in PYTHONPATH: no network, no make. Without pytest the
steps that are tests are skipped, without torch those that compare with it, each by name. Each step is a process of its
own with a time limit: one that fails, crashes or hangs is written down with the end of its output, and the rest goes
on. The file is written after each step. Ctrl-C ends the check with what is there.

The exit status is 0 when each step passed or was skipped for a reason that has a name.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS_FILE = Path(__file__).with_name("gpu_steps.py")
DOCS = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- gpu_check.py --docs: begin -->", "<!-- gpu_check.py --docs: end -->"
#: What docs/cuda.md tells of, where it is there.
RESULTS = {
    name: ROOT / "benchmarks" / "results" / f"{name}.json"
    for name in ("gpu_check_double", "gpu_check")
}
#: The exit status of a step that skips itself.
SKIPPED = 77
#: Bytes of the output of a failed step that are kept.
TAIL = 3000
GOOD = ("passed", "ran, nothing computed", "skipped")


@dataclasses.dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: Of the function in ``gpu_steps.py``, and its arguments.
        title: What it tells.
        limit: The most seconds that it may take.
        reserve: Seconds that the steps before leave for it.
    """

    name: str
    title: str
    limit: float
    reserve: float


STEPS = (
    Step("doctor", "`python -m chainer_ooc doctor` finds CuPy, CUDA, cuDNN and the GPU", 60, 10),
    Step(
        "stream_rules",
        "streams, events and the pool are as the simulated GPU takes them to be",
        60,
        15,
    ),
    Step("equal_bits", "ResNet-50 under a limit ends with the bits of training in core", 60, 20),
    Step(
        "out_of_core",
        "limits held, shortages survived, streams, pools and threads of the user's",
        60,
        15,
    ),
    Step(
        "gpu_memory",
        "ResNet-50 at 0.5 and 0.3 of its memory: collections, failures, the driver's peak",
        60,
        25,
    ),
    Step("pages", "the price of mapping and unmapping pages of GPU memory, idle and busy", 30, 8),
    Step("cudnn", "every function on cuDNN against the CPU, and against torch", 80, 30),
    Step(
        "run_again",
        "fingerprints; convolutions and products that run again give equal bits",
        80,
        35,
    ),
    Step(
        "times resnet50 224",
        "ResNet-50 at 224 px: time in core and under limits",
        75,
        30,
    ),
    Step("torch_times resnet50 224", "the same in torch: eager, checkpoint, save_on_cpu", 45, 20),
    Step("times googlenet 224", "GoogLeNet at 224 px", 60, 20),
    Step("torch_times googlenet 224", "the same in torch", 45, 15),
    Step("times resnet50 1120", "ResNet-50 at 1120 px", 75, 25),
    Step("torch_times resnet50 1120", "the same in torch", 45, 15),
    Step("times googlenet 1120", "GoogLeNet at 1120 px", 60, 20),
    Step("torch_times googlenet 1120", "the same in torch", 45, 15),
    Step("unified", "both networks in unified memory, half of what they need on the GPU", 60, 15),
    Step("link", "bandwidth between the host and the GPU: in, out, both; of locking memory", 25, 8),
    Step("workspace", "ResNet-50 with 8, 64 and 512 MiB for cuDNN's workspace", 45, 15),
    Step("rnn", "n-step RNN, LSTM and GRU on cuDNN against CuPy: results, time", 45, 12),
    Step("nccl", "NCCL and `pure_nccl` with one rank", 40, 10),
)


class Check:
    """Runs steps and keeps what they told.

    Args:
        path: The file of results, written after each step.
        on_double: Whether the GPU is CUDA's double.
        budget: Seconds for all.
        script: The program that runs a step: its arguments are the step's name.
    """

    def __init__(
        self, path: Path, on_double: bool, budget: float, script: Path = STEPS_FILE
    ) -> None:
        self.path, self.on_double, self.script = path, on_double, script
        self.end = time.monotonic() + budget
        self.about: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
            "on_double": on_double,
            "budget_seconds": budget,
            **source(),
        }
        self.results: list[dict[str, Any]] = []

    def run(self, steps: Sequence[Step]) -> None:
        """Run the steps that there is time for."""
        with tempfile.TemporaryDirectory() as self.kernels:
            self._run(steps)

    def _run(self, steps: Sequence[Step]) -> None:
        machine = self.process("machine", min(60, self.end - time.monotonic()))
        self.about["machine"] = machine["records"][0] if machine["records"] else None
        self.about["machine_error"] = machine.get("tail")
        usable = machine["status"] in GOOD
        reason = None if usable else "nothing can run here"
        for number, step in enumerate(steps):
            later = sum(one.reserve for one in steps[number + 1 :])
            seconds = min(step.limit, max(self.end - time.monotonic() - later, step.reserve))
            seconds = min(seconds, self.end - time.monotonic())
            told = {"step": step.name, "title": step.title}
            if reason is None and self.end - time.monotonic() < 1:
                reason = "the budget was used up"
            if reason is not None and not (step.name == "doctor" and not usable):
                result = {"status": "not reached", "reason": reason, "seconds": 0.0, "records": []}
            else:
                print(f"{step.name:28}", end="", flush=True)
                try:
                    result = self.process(step.name, seconds)
                except KeyboardInterrupt:
                    result = {"status": "interrupted", "seconds": None, "records": []}
                    reason = "the check was interrupted"
                print(f"{result['seconds'] or 0:6.1f} s  {result['status']}", flush=True)
            self.results.append(told | result)
            self.write()

    def process(self, name: str, seconds: float) -> dict[str, Any]:
        """Run one step in a process of its own, for so many seconds at most."""
        with tempfile.TemporaryDirectory() as folder:
            records, log = Path(folder) / "records", Path(folder) / "log"
            environment = self.environment() | {
                "GPU_CHECK_RECORDS": str(records),
                "GPU_CHECK_END": str(time.monotonic() + seconds),
            }
            start = time.monotonic()
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, str(self.script), *name.split()],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                try:
                    code: int | None = process.wait(seconds)
                except subprocess.TimeoutExpired:
                    code = None
                finally:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
            return self.outcome(code, time.monotonic() - start, seconds, records, log)

    def outcome(
        self, code: int | None, taken: float, seconds: float, records: Path, log: Path
    ) -> dict[str, Any]:
        """Return what a process told before it ended with a status, ``None`` if it had to be ended."""
        told = list(_lines(records))
        reason = next((one["reason"] for one in told if "reason" in one), None)
        result = {"status": "passed", "seconds": round(taken, 1)}
        if code is None:
            result |= {"status": "timed out", "reason": f"took more than {seconds:.0f} s"}
        elif code == SKIPPED and reason is not None:
            result |= {"status": "skipped", "reason": reason}
        elif code < 0:
            result |= {"status": "crashed", "reason": signal.Signals(-code).name}
        elif code:
            result |= {"status": "failed", "reason": f"exit status {code}"}
        elif self.on_double:
            result["status"] = "ran, nothing computed"
        if result["status"] not in GOOD:
            result["tail"] = log.read_bytes()[-TAIL:].decode(errors="replace")
        return result | {"records": [one for one in told if "reason" not in one]}

    def environment(self) -> dict[str, str]:
        """Return the environment of all steps."""
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        if self.on_double:
            paths.insert(0, str(ROOT / "tests" / "doubles" / "cuda_runtime" / "site"))
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)))
        environment["GPU_CHECK_ON_DOUBLE"] = str(int(self.on_double))
        environment.setdefault(
            "CUPY_CACHE_DIR", self.kernels
        )  # what one step compiles serves the next
        environment.pop("CUPY_CACHE_IN_MEMORY", None)
        return environment

    def write(self) -> None:
        """Write what is there, so that nobody ever reads half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (self.path, json.dumps({**self.about, "steps": self.results}, indent=1) + "\n"),
            (self.path.with_suffix(".md"), markdown(self.about, self.results)),
        ):
            scratch = path.with_name(path.name + ".part")
            scratch.write_text(text, encoding="utf-8")
            os.replace(scratch, path)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:  # the process ended while it wrote
            return


def source() -> dict[str, Any]:
    """Return which source this is: git's commit, where git is there, and a sum of the package's files."""
    total = hashlib.sha256()
    for path in sorted((ROOT / "chainer_ooc").rglob("*.py")):
        total.update(path.read_bytes())
    command = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    except OSError:
        commit = None
    return {"commit": commit, "sha256_of_package": total.hexdigest()[:16]}


def cell(value: Any) -> str:
    """Return a value as text: three digits of a number, what a table may have of a text."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return " ".join(str(value).split()).replace("|", "\\|")


def words(record: Mapping[str, Any]) -> str:
    """Return a record as text, such as ``limit 1/2: ms 312, host_ms 98.2``."""
    measured = record.get("measured") or {}
    said = [f"{key} {cell(value)}" for key, value in measured.items()]
    said += [cell(record[key])[:400] for key in ("text", "skipped", "error") if record.get(key)]
    kind = "**failed** " if record.get("error") else "skipped: " if record.get("skipped") else ""
    return f"{record['what']}: {kind}{', '.join(said) or 'not measured'}"


def markdown(about: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as Markdown: a table of the steps, then what each told."""
    machine = (about["machine"] or {}).get("measured") or {}
    lines = [f"# GPU check, {about['date']}", ""]
    if about["on_double"]:
        lines += [
            "**No GPU: CUDA was a double that computes nothing. Nothing here was measured.**",
            "",
        ]
    lines += [f"commit {about['commit']}, sha256 of the package {about['sha256_of_package']}", ""]
    lines += [f"- {key}: {cell(value)}" for key, value in machine.items()]
    if about["machine_error"]:
        lines += ["Nothing can run here:", "", "```text", about["machine_error"].strip(), "```"]
    lines += ["", "| step | status | seconds | |", "|---|---|---|---|"]
    for one in results:
        seconds = "" if about["on_double"] or one["seconds"] is None else cell(one["seconds"])
        text = f"{one['title']}{': ' + one['reason'] if one.get('reason') else ''}"
        lines.append(f"| {one['step']} | {one['status']} | {seconds} | {cell(text)} |")
    for one in results:
        if one["records"] or one.get("tail"):
            lines += ["", f"## {one['step']}", ""]
            lines += [f"- {words(record)}" for record in one["records"]]
        if one.get("tail"):
            lines += ["", "```text", one["tail"].replace("```", "'''").strip(), "```"]
    return "\n".join(lines) + "\n"


def docs_table() -> str:
    """Return the table of docs/cuda.md, from the results in ``benchmarks/results``."""
    found = {name: json.loads(path.read_text()) for name, path in RESULTS.items() if path.exists()}

    def told(name: str, step: Step) -> str:
        results = found.get(name, {"steps": []})
        for one in results["steps"]:
            if one["step"] == step.name and one["status"] != "not reached":
                reason = f" ({cell(one['reason'])})" if one.get("reason") else ""
                gpu = "" if results["on_double"] else f", {results['machine']['measured']['gpu']}"
                return f"{one['status']}{reason}, {results['date'][:10]}{gpu}"
        return "**not yet**"

    lines = ["| step | what it tells | real CuPy, no GPU | on a GPU |", "|---|---|---|---|"]
    for step in STEPS:
        both = [told(name, step) for name in ("gpu_check_double", "gpu_check")]
        lines.append(f"| `{step.name}` | {step.title} | {both[0]} | {both[1]} |")
    return "\n".join(lines)


def write_docs() -> None:
    """Put the table into docs/cuda.md."""
    text = DOCS.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    DOCS.write_text(f"{before}{BEGIN}\n{docs_table()}\n{END}{after}", encoding="utf-8")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the check. Return 0 when each step passed or was skipped for a reason."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=ROOT / "result" / "gpu_check.json",
        help="the file of results (result/gpu_check.json); Markdown is written beside it",
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds for all (480)")
    parser.add_argument("--only", nargs="+", help="names of steps, or their beginnings")
    parser.add_argument("--on-double", action="store_true", help="on a machine without a GPU")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="write the table of docs/cuda.md from benchmarks/results",
    )
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return 0
    steps = [s for s in STEPS if not options.only or s.name.startswith(tuple(options.only))]
    if not steps:
        parser.error(f"--only {options.only}: the steps are {', '.join(s.name for s in STEPS)}")
    if options.on_double and any(Path("/dev").glob("nvidia[0-9]*")):
        parser.error("--on-double is for a machine without a GPU, and this one has one")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    check = Check(options.json, options.on_double, options.budget)
    try:
        check.run(steps)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    print(f"\n{options.json.with_suffix('.md').read_text()}\n{options.json}")
    return int(any(one["status"] not in GOOD for one in check.results))


if __name__ == "__main__":
    sys.exit(main())
