"""A few iterations of a network in a process of its own: their times, its peak memory, what moved.

``turns.py``, ``limits.py`` and ``fewer_bytes.py`` use it; by itself it prints one line of JSON:

    python benchmarks/training.py '{"net": "resnet50", "limit": "600MiB", "iterations": 3}'
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
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
    with Training(**task) as training:
        return training.end()


class Training:
    """Trains in a process of its own, a few iterations whenever it is their turn.

    Args:
        **task: As for :func:`run`. With ``iterations=None`` each :meth:`turn` says how many.
    """

    def __init__(self, **task: Any) -> None:
        threads = str(task.pop("threads", 1))
        environment = dict(os.environ, OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads)
        paths = [str(ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._task = task
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(task)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            file.close()

    def turn(self, iterations: int) -> dict[str, Any]:
        """Train so many iterations. Return what :func:`run` does of these, but for ``digest`` and ``plans``."""
        print(iterations, file=self._process.stdin, flush=True)
        return self._answer()

    def end(self) -> dict[str, Any]:
        """End it. Return what :func:`run` does."""
        self._process.stdin.close()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise SystemExit(f"{self._task} failed:\n{self._errors.read()}")
        return json.loads(line)


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
    from chainer_ooc.swap.tiers.swap_file import SwapFile

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
    net: str, iterations: int | None = 3, disk: float | None = None, **settings: Any
) -> dict[str, Any]:
    import hashlib

    import numpy as np
    from nets import NETS

    import chainer_ooc
    from chainer_ooc.swap.transfers import Counters

    import chainer  # isort: skip

    np.random.seed(0)
    if disk is not None:
        _slow_down(disk)
    if "limit" in settings:
        chainer_ooc.enable(**settings)
    model, x, t = NETS[net]()
    optimizer = chainer.optimizers.MomentumSGD(lr=0.001).setup(model)

    def train(count: int) -> dict[str, Any]:
        seconds, cpu_seconds = [], []
        before = None
        for number in range(count):
            if number == count - 1 and "limit" in settings:
                before = vars(chainer_ooc.stats())
            start, cpu = time.perf_counter(), time.process_time()
            optimizer.update(model, x, t)
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu)
        after = vars(chainer_ooc.stats()) if before else None
        counted = [field.name for field in dataclasses.fields(Counters)]
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_bytes": _peak_bytes(),
            "system_seconds": resource.getrusage(resource.RUSAGE_SELF).ru_stime,
            "page_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
            "stats": after,
            "later": {k: after[k] - before[k] for k in counted} if before else None,
        }

    done: dict[str, Any] = {}
    if iterations is None:
        for line in sys.stdin:
            done = train(int(line))
            print(json.dumps(done), flush=True)
    else:
        done = train(iterations)
    digest = hashlib.sha256()
    for parameter in model.params():
        digest.update(np.ascontiguousarray(parameter.array))
    plans = [vars(plan) for plan in chainer_ooc.plans()] if "limit" in settings else None
    return {**done, "digest": digest.hexdigest(), "plans": plans}


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))
    return peak


if __name__ == "__main__":
    print(json.dumps(_train(**json.loads(sys.argv[1]))))
