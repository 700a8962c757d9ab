"""A few iterations of a network in a process of its own: their times, its peak memory, what moved.

``overhead.py`` and ``limits.py`` use it; by itself it prints one line of JSON:

    python benchmarks/training.py '{"net": "resnet50", "limit": "600MiB", "iterations": 3}'
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(**task: Any) -> dict[str, Any]:
    """Train in a new process.

    Args:
        **task: ``net``, ``iterations``, ``threads`` (default 1), ``disk`` (the swap file moves no more bytes per
            second than that), and for :func:`chainer_ooc.enable` any of its settings; without ``limit`` it is
            stock Chainer.

    Returns:
        ``seconds`` and ``cpu_seconds`` of each iteration, ``peak_bytes`` (``VmHWM``),
        ``system_seconds`` and ``page_faults`` of the whole process, ``digest`` of the
        parameters, and for out-of-core runs ``stats``, ``later`` (of the last iteration alone) and
        ``plans``.
    """
    threads = str(task.pop("threads", 1))
    environment = dict(os.environ, OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads)
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, __file__, json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Name the machine and what runs on it."""
    import numpy
    import psutil

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def print_table(header: list[str], rows: list[list[Any]]) -> None:
    """Print a Markdown table."""
    texts = [[f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *texts]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *texts]:
        cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("| " + " | ".join(cells) + " |", flush=True)


def write(path: str | None, results: Any) -> None:
    """Write the results and the machine as JSON, if there is a path."""
    if path:
        Path(path).write_text(
            json.dumps({"machine": machine(), "results": results}, indent=1) + "\n"
        )


def _slow_down(bytes_per_second: float) -> None:
    """Let the swap file move no more than that, in both directions together."""
    from chainer_ooc.swap.disk import SwapFile

    lock = threading.Lock()

    def slowly(move: Any) -> Any:
        def wrapped(file: Any, offset: int, buffer: memoryview) -> None:
            with lock:
                end = time.perf_counter() + buffer.nbytes / bytes_per_second
                move(file, offset, buffer)
                time.sleep(max(end - time.perf_counter(), 0))

        return wrapped

    SwapFile.write, SwapFile.read = slowly(SwapFile.write), slowly(SwapFile.read)


def _train(
    net: str, iterations: int = 3, disk: float | None = None, **settings: Any
) -> dict[str, Any]:
    import hashlib
    import resource

    import numpy as np
    from nets import NETS

    import chainer_ooc

    import chainer  # isort: skip

    np.random.seed(0)
    if disk is not None:
        _slow_down(disk)
    if "limit" in settings:
        chainer_ooc.enable(**settings)
    model, x, t = NETS[net]()
    optimizer = chainer.optimizers.MomentumSGD(lr=0.001).setup(model)
    seconds, cpu_seconds = [], []
    before = None
    for number in range(iterations):
        if number == iterations - 1 and "limit" in settings:
            before = vars(chainer_ooc.stats())
        start, cpu = time.perf_counter(), time.process_time()
        optimizer.update(model, x, t)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
    digest = hashlib.sha256()
    for parameter in model.params():
        digest.update(np.ascontiguousarray(parameter.array))
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak,
        "system_seconds": resource.getrusage(resource.RUSAGE_SELF).ru_stime,
        "page_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
        "digest": digest.hexdigest(),
        "stats": vars(chainer_ooc.stats()) if before else None,
        "later": {k: v - before[k] for k, v in vars(chainer_ooc.stats()).items()}
        if before
        else None,
        "plans": [vars(plan) for plan in chainer_ooc.plans()] if before else None,
    }


if __name__ == "__main__":
    print(json.dumps(_train(**json.loads(sys.argv[1]))))
