"""What the CUDA benchmarks share: timing, the machine in words, subprocesses, tables and JSON."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

#: Math modes: Chainer's dtype and this project's mode, torch's dtype and TF32 flag.
MODES = {
    "fp32": {"dtype": "float32", "math": "fp32", "tf32": False},
    "tf32": {"dtype": "float32", "math": "tf32", "tf32": True},
    "mixed16": {"dtype": "float16", "math": "fp32", "tf32": False},
}


def need_gpu() -> None:
    """Exit with one line when there is no GPU to measure on."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        sys.exit(f"This benchmark needs an NVIDIA GPU and CuPy: {error}")
    if not count:
        sys.exit("This benchmark needs an NVIDIA GPU: CUDA sees none")


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    import chainer_ooc  # noqa: F401  before Chainer, which it edits

    import chainer  # isort: skip
    import cupy  # isort: skip

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "gpu": properties["name"].decode(),
        "memory_bytes": properties["totalGlobalMem"],
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "cuda": cupy.cuda.runtime.runtimeGetVersion(),
        "cupy": cupy.__version__,
        "python": platform.python_version(),
        "cudnn": chainer.backends.cuda._cudnn_version,
        "cudnn_modules": getattr(getattr(chainer.backends.cuda, "cudnn", None), "__name__", None),
    }
    try:
        found["torch"] = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        found["torch"] = None
    return found


def milliseconds(function: Callable[[], Any], repeat: int, warm_up: int = 3) -> float:
    """Return the median time of a call on the current device, by CUDA events, in milliseconds.

    Both frameworks' work goes to the null stream, which these events are recorded on.
    """
    import cupy

    for _ in range(warm_up):
        function()
    times = []
    for _ in range(repeat):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return statistics.median(times)


def timed(
    step: Callable[[], Any], synchronize: Callable[[], Any], settled: int, repeat: int
) -> dict[str, float]:
    """Run a step some times, then time it.

    Returns:
        The medians of ``ms``, from the call to the end of the GPU's work, and ``host_ms``, to the call's return.
    """
    for _ in range(settled):
        step()
    synchronize()
    whole, host = [], []
    for _ in range(repeat):
        start = time.perf_counter()
        step()
        returned = time.perf_counter()
        synchronize()
        whole.append(1000 * (time.perf_counter() - start))
        host.append(1000 * (returned - start))
    return {"ms": statistics.median(whole), "host_ms": statistics.median(host)}


def set_mode(mode: str, workspace: int | None, autotune: bool) -> None:
    """Set Chainer and, if it is there, torch to a math mode."""
    import chainer
    import cupy

    cupy.cudnn.set_math_mode(MODES[mode]["math"])
    chainer.global_config.autotune = autotune
    if workspace is not None:
        chainer.backends.cuda.set_max_workspace_size(workspace)
    try:
        import torch
    except ImportError:
        return
    torch.backends.cudnn.allow_tf32 = MODES[mode]["tf32"]
    torch.backends.cuda.matmul.allow_tf32 = MODES[mode]["tf32"]
    torch.backends.cudnn.benchmark = autotune


def common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, nargs="+", default=[32], help="batch sizes")
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--repeat", type=int, default=20, help="calls that are timed")
    parser.add_argument("--workspace", type=int, help="cuDNN workspace limit, bytes")
    parser.add_argument(
        "--no-autotune", action="store_true", help="cuDNN's heuristics in both frameworks"
    )
    parser.add_argument(
        "--without-cudnn", action="store_true", help="also time Chainer without cuDNN"
    )
    parser.add_argument("--json", metavar="FILE", help="write machine and results there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def in_worker(script: str, options: argparse.Namespace, task: dict[str, Any]) -> Any:
    """Run one task in a process of its own (its memory, its environment) and return its result."""
    arguments = [sys.executable, script, "--worker", json.dumps(task)]
    arguments += ["--repeat", str(options.repeat)]
    arguments += ["--workspace", str(options.workspace)] if options.workspace is not None else []
    arguments += ["--no-autotune"] if options.no_autotune else []
    arguments += ["--without-cudnn"] if options.without_cudnn else []
    # CuPy's matrix products follow this variable.
    environment = {**os.environ, "CUPY_TF32": str(int(MODES[task["mode"]]["tf32"]))}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"{task}: failed: {last}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table; numbers get three significant digits."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(cell, row)) + " |")


def write(path: str | None, results: Any, about: dict[str, Any]) -> None:
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"machine": about, "results": results}, file, indent=1)


def ratio(upper: float | None, lower: float | None) -> float | None:
    """Return ``upper / lower``, ``None`` when one of them was not measured."""
    return upper / lower if upper and lower else None
