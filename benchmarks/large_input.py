"""How memory and time grow with the size of the images, in core and under a limit.

    python benchmarks/large_input.py [--nets googlenet resnet50] [--sizes 224 448 896 1120 2240]
        [--fraction 0.5] [--batchsize 1] [--repeat 3] [--most 8GiB] [--json large_input.json]
    python benchmarks/large_input.py --quick

The networks are those of examples/imagenet, whose number of parameters does not depend on the size. Each run
is a process of its own and peaks are its ``VmHWM``, one at a time. In-core and limited processes take turns:
"time" is the median over the rounds of the limited one's time over that of the in-core one beside it, with
the least and the most in brackets; each is the best iteration but the first. The last bits of the parameters
are compared. The limit is ``--fraction`` of the way from the floor, which is what the process holds before
the first iteration and its gradients and momenta, to the in-core peak. Where an in-core step is foreseen to
need more than ``--most``, from the two sizes before, it does not run: its peak is marked ~, and there is no
ratio.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from limits import disk_bandwidth
from training import ROOT, machine, print_table, write

MIB = 1 << 20
SIZES = [224, 448, 896, 1120, 2240]


def run(**task: Any) -> dict[str, Any] | None:
    """Train in a new process; see ``_train`` for the arguments.

    Returns:
        ``seconds`` of each iteration, ``peak_bytes``, ``digest`` of the parameters and, under a limit, ``stats``;
        None when the system ended the process for want of memory.
    """
    threads = str(task.pop("threads", 1))
    environment = dict(os.environ, OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads)
    paths = [str(ROOT), str(ROOT / "examples" / "imagenet"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode in (-9, 137) or "MemoryError" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _train(
    net: str, size: int, batchsize: int, iterations: int, limit: int | None = None
) -> dict[str, Any]:
    import numpy as np

    import chainer_ooc

    import chainer  # isort: skip
    import models  # isort: skip

    np.random.seed(0)
    # The parameters do not depend on the size: a pass at the full one, to make them, would count in the peak.
    model = models.create(net, 224)
    model.insize = size
    floor = floor_bytes(model)
    if limit is not None:
        chainer_ooc.enable(limit=limit, single_backward=True)
    optimizer = chainer.optimizers.MomentumSGD(lr=0.001).setup(model)
    rng = np.random.default_rng(0)
    x = rng.random((batchsize, 3, size, size), np.float32) - 0.5
    t = rng.integers(1000, size=batchsize, dtype=np.int32)
    seconds = []
    for _ in range(iterations):
        start = time.perf_counter()
        optimizer.update(model, x, t)
        seconds.append(time.perf_counter() - start)
    digest = hashlib.sha256()
    for parameter in model.params():
        digest.update(parameter.array.tobytes())
    return {
        "seconds": seconds,
        "peak_bytes": status_bytes("VmHWM:"),
        "floor_bytes": floor,
        "digest": digest.hexdigest(),
        "parameters": int(model.count_params()),
        "stats": None if limit is None else vars(chainer_ooc.stats()),
    }


def status_bytes(name: str) -> int:
    """Return a line of this process's status: ``VmRSS:``, ``VmHWM:`` (bytes)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (int(line.split()[1]) << 10 for line in lines if line.startswith(name))
    return value


def floor_bytes(model: Any) -> int:
    """Return what this process holds with ``model``, its gradients and its momenta (bytes), before it trains."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what making the parameters left behind is no floor
    return status_bytes("VmRSS:") + 2 * sum(p.array.nbytes for p in model.params())


def foresee(points: list[tuple[int, int]], size: int) -> int:
    """Return the peak at ``size`` (bytes): a line in the number of pixels through the last two (size, peak)."""
    (a, low), (b, high) = points[-2:]
    slope = (high - low) / (b * b - a * a)
    return int(high + slope * (size * size - b * b))


def measure(net: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one network at all sizes."""
    common = {"net": net, "batchsize": options.batchsize, "iterations": options.iterations}
    common["threads"] = options.threads
    rows: list[dict[str, Any]] = []
    points: list[tuple[int, int]] = []
    floor = 0
    for size in options.sizes:
        foreseen = foresee(points, size) if len(points) > 1 else 0
        # The first in-core run says what the limit is; those of the rounds are timed beside the limited ones.
        first = run(size=size, **common) if foreseen <= options.most else None
        if first is None and not foreseen:
            raise SystemExit(f"{net} {size}: in core it needs more memory than there is")
        in_core = first["peak_bytes"] if first else foreseen
        points.append((size, in_core))
        floor = min(first["floor_bytes"], in_core) if first else floor
        limit = int(floor + options.fraction * (in_core - floor))
        pairs = []
        for _ in range(options.repeat):
            stock = run(size=size, **common) if first else None
            limited = run(size=size, limit=limit, **common)
            if limited is None:
                raise SystemExit(f"{net} {size}: the system ended the run under {limit} bytes")
            if first and limited["digest"] != first["digest"]:
                raise SystemExit(f"{net} {size}: not the same parameters as in core")
            pairs.append((stock, limited))
        done = [limited for _, limited in pairs]
        best = [min(one["seconds"][1:]) for one in done]
        stock_best = [min(stock["seconds"][1:]) for stock, _ in pairs if stock]
        ratios = [a / b for a, b in zip(best, stock_best, strict=False)]
        moved = {
            key: min(one["stats"][key] for one in done) / options.iterations
            for key in ("bytes_out", "bytes_in")
        }
        row = {
            "net": net,
            "size": size,
            "batchsize": options.batchsize,
            "parameters": done[0]["parameters"],
            "in_core_measured": first is not None,
            "floor_bytes": floor,
            "in_core_peak_bytes": in_core,
            "limit_bytes": limit,
            "peak_bytes": max(one["peak_bytes"] for one in done),
            "seconds": min(best),
            "stock_seconds": min(stock_best) if stock_best else None,
            "ratios": ratios,
            **moved,
        }
        rows.append(row)
        print_row(row)
    return rows


HEADER = ["net", "size", "floor MiB", "in core", "limit", "peak", "peak/limit", "s/image", "time", "MiB out",
    "MiB in"]  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    ratios = row["ratios"]
    time_ratio = "-"
    if ratios:
        time_ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f} {max(ratios):.2f}]"
    return [
        row["net"],
        str(row["size"]),
        f"{row['floor_bytes'] / MIB:,.0f}",
        f"{'' if row['in_core_measured'] else '~'}{row['in_core_peak_bytes'] / MIB:,.0f}",
        f"{row['limit_bytes'] / MIB:,.0f}",
        f"{row['peak_bytes'] / MIB:,.0f}",
        f"{row['peak_bytes'] / row['limit_bytes']:.3f}",
        f"{row['seconds'] / row['batchsize']:.2f}",
        time_ratio,
        f"{row['bytes_out'] / MIB:,.0f}",
        f"{row['bytes_in'] / MIB:,.0f}",
    ]  # fmt: skip


def print_row(row: dict[str, Any]) -> None:
    """Print a result as soon as it is there: all of them take hours."""
    print("  ".join(f"{n} {c}" for n, c in zip(HEADER, cells(row), strict=True)), file=sys.stderr)


def growth(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return what a million more pixels cost, from each size to the next."""
    table = []
    for a, b in itertools.pairwise(rows):
        million = (b["size"] ** 2 - a["size"] ** 2) * b["batchsize"] / 1e6

        def per_million(key: str, a: Any = a, b: Any = b, million: float = million) -> float:
            return (b[key] - a[key]) / million

        moved = per_million("bytes_out") + per_million("bytes_in")
        table.append(
            [
                b["net"],
                f"{a['size']} -> {b['size']}",
                f"{per_million('in_core_peak_bytes') / MIB:,.0f}",
                f"{per_million('peak_bytes') / MIB:,.0f}",
                f"{per_million('seconds'):.2f}",
                f"{moved / MIB:,.0f}",
            ]
        )
    return table


def main() -> None:
    """Parse arguments, run, print."""
    sys.path.insert(0, str(ROOT))
    from chainer_ooc.settings import parse_bytes

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["googlenet", "resnet50"])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--fraction", type=float, default=0.5)
    parser.add_argument("--batchsize", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--most", type=lambda text: parse_bytes("--most", text), default=8 << 30, metavar="SIZE",
        help="run nothing in core that is foreseen to need more (default 8GiB)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="224 and 448 pixels, one round")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.iterations < 2:
        parser.error(f"--iterations {options.iterations}: the first is not timed; give 2 or more")
    if options.quick:
        options.sizes, options.repeat = [224, 448], 1
    write_rate, read_rate = disk_bandwidth()
    print("machine:", machine())
    print(f"disk: {write_rate / 1e6:.0f} MB/s out, {read_rate / 1e6:.0f} MB/s in")
    results = [measure(net, options) for net in options.nets]
    print_table(HEADER, [cells(row) for rows in results for row in rows])
    print("\nA million more pixels cost:\n")
    print_table(
        ["net", "sizes", "MiB in core", "MiB limited", "seconds", "MiB moved"],
        [row for rows in results for row in growth(rows)],
    )
    write(options.json, [row for rows in results for row in rows])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(_train(**json.loads(sys.argv[2]))))
    else:
        main()
