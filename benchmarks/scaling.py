"""One, two and four ranks on one machine: images per second, what the all-reduce costs, what moves.

    python benchmarks/scaling.py [--ranks 1 2 4] [--arch resnet50] [--insize 224] [--batchsize 4]
        [--strong] [--ooc 0.5] [--rounds 3] [--json scaling.json]
    python benchmarks/scaling.py --quick

Each rank trains on its own batch with ChainerMN's naive communicator, one BLAS thread each. Weak scaling:
``--batchsize`` images per rank; ``--strong``: that many over all ranks. The numbers of ranks take turns, and
efficiencies are medians over the rounds of ratios within a round. On a machine with fewer cores than ranks
the ranks share them: "of cores" counts that, min(ranks, cores) times one rank being the ideal. "all-reduce"
is the least time that an iteration's exchange took, ranks starting together; "ring" is a bound for it: a ring
all-reduce with latency and bandwidth fitted to MPI's own all-reduces in the same processes, in one piece (see
docs/scaling.md). With ``--ooc`` every rank trains under a limit that fraction of the way from what it holds without
activations to one rank's in-core peak: they share one disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from large_input import floor_bytes, status_bytes
from scaling_model import ring_seconds
from training import ROOT, machine, print_table, write

MIB = 1 << 20
ALLREDUCE_SIZES = [1 << n for n in range(10, 25, 2)]


def run(ranks: int, **task: Any) -> dict[str, Any]:
    """Train with ``ranks`` processes; see ``_train``."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise SystemExit("there is no mpiexec; run `pip install mpi4py mpich`")
    environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    # UCX, where MPI uses it, keeps freed memory from the system: no limit could be kept.
    environment.setdefault("UCX_MEM_EVENTS", "no")
    paths = [str(ROOT), str(ROOT / "examples" / "imagenet"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [mpiexec, "-n", str(ranks), sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{ranks} ranks, {task} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _train(
    arch: str, insize: int, batchsize: int, iterations: int, limit: int | None = None
) -> dict[str, Any] | None:
    """Train on this rank, with all the others.

    Returns:
        On rank 0: ``seconds`` of each iteration (the slowest rank's), ``allreduce_seconds`` of each (the fastest
        rank's: others wait in it for the slowest), ``gradient_bytes``, the fitted ``latency`` (s) and ``bandwidth``
        (bytes/s) of an all-reduce, ``peak_bytes`` of the largest rank, bytes moved by all, digest of the parameters.
    """
    import numpy as np
    from mpi4py import MPI

    import chainer_ooc

    import chainer  # isort: skip
    import chainermn  # isort: skip
    import models  # isort: skip

    comm = chainermn.create_communicator("naive")
    world = comm.mpi_comm
    np.random.seed(0)
    model = models.create(arch, insize)
    comm.bcast_data(model)
    fit = fit_allreduce(world)
    spent = [0.0]
    reduce = comm.multi_node_mean_grad

    def timed(*args: Any, **kwargs: Any) -> None:
        world.Barrier()  # not waiting for the slowest rank, but the exchange, is timed
        start = time.perf_counter()
        reduce(*args, **kwargs)
        spent[0] = time.perf_counter() - start

    comm.multi_node_mean_grad = timed
    floor = floor_bytes(model)
    if limit is not None:
        chainer_ooc.enable(limit=limit, single_backward=True)
    optimizer = chainermn.create_multi_node_optimizer(
        chainer.optimizers.MomentumSGD(lr=0.001), comm
    )
    optimizer.setup(model)
    optimizer.is_changed(model)  # else the first update is a broadcast
    rng = np.random.default_rng(comm.rank)
    x = rng.random((batchsize, 3, insize, insize), np.float32) - 0.5
    t = rng.integers(1000, size=batchsize, dtype=np.int32)
    seconds, exchange = [], []
    for _ in range(iterations):
        world.Barrier()
        start = time.perf_counter()
        optimizer.update(model, x, t)
        seconds.append(world.allreduce(time.perf_counter() - start, MPI.MAX))
        exchange.append(world.allreduce(spent[0], MPI.MIN))
    digest = hashlib.sha256()
    for parameter in model.params():
        digest.update(parameter.array.tobytes())
    digests = world.gather(digest.hexdigest())
    stats = chainer_ooc.stats() if limit is not None else None
    moved = stats.bytes_out + stats.bytes_in if stats else 0
    result = {
        "seconds": seconds,
        "allreduce_seconds": exchange,
        "gradient_bytes": sum(p.grad.nbytes for p in model.params()),
        "gradient_arrays": sum(1 for _ in model.params()),
        **fit,
        "floor_bytes": floor,
        "peak_bytes": world.allreduce(status_bytes("VmHWM:"), MPI.MAX),
        "moved_bytes": world.allreduce(moved, MPI.SUM) / iterations,
    }
    if comm.rank:
        return None
    if len(set(digests)) != 1:
        raise SystemExit("the ranks' parameters differ")
    return result


def fit_allreduce(world: Any) -> dict[str, float]:
    """Fit latency and bandwidth of a ring to MPI's all-reduces of several sizes.

    A ring of N ranks takes 2(N-1) steps of 1/N of the bytes: t = 2(N-1)·latency + 2(N-1)/N · bytes/bandwidth.
    """
    import numpy as np

    n = world.size
    if n == 1:
        return {"latency": 0.0, "bandwidth": float("inf")}
    rows, times = [], []
    for nbytes in ALLREDUCE_SIZES:
        mine = np.ones(nbytes // 4, np.float32)
        total = np.empty_like(mine)
        least = float("inf")
        for _ in range(8):
            world.Barrier()
            start = time.perf_counter()
            world.Allreduce(mine, total)
            least = min(least, time.perf_counter() - start)
        rows.append([2 * (n - 1), 2 * (n - 1) / n * nbytes])
        times.append(world.allreduce(least) / n)
    # Relative errors: else the largest message alone would say the latency.
    weights = 1 / np.array(times)
    a = np.array(rows) * weights[:, None]
    latency, seconds_per_byte = np.linalg.lstsq(a, np.ones(len(times)), rcond=None)[0]
    return {
        "latency": max(float(latency), 0.0),
        "bandwidth": 1 / max(float(seconds_per_byte), 1e-13),
    }


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--insize", type=int, default=224)
    parser.add_argument("--batchsize", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--strong", action="store_true", help="--batchsize is of all ranks together"
    )
    parser.add_argument(
        "--ooc",
        type=float,
        metavar="FRACTION",
        help="train under a limit, from 0: no activations, to 1: all of one rank's",
    )
    parser.add_argument("--quick", action="store_true", help="nin at 64 pixels, one round")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.quick:
        options.arch, options.insize, options.batchsize, options.rounds = "nin", 64, 8, 1
    if options.ranks[0] != 1:
        parser.error(
            f"--ranks {options.ranks[0]} ...: begin with 1, which the others are compared with"
        )
    if options.strong and any(options.batchsize % n for n in options.ranks):
        parser.error(
            f"--batchsize {options.batchsize}: --strong needs a multiple of each of {options.ranks}"
        )
    if options.iterations < 2:
        parser.error(f"--iterations {options.iterations}: the first is not timed; give 2 or more")
    print("machine:", machine())
    common = {"arch": options.arch, "insize": options.insize, "iterations": options.iterations}
    limit = None
    if options.ooc is not None:
        alone = run(1, batchsize=options.batchsize, **common)
        in_core, floor = alone["peak_bytes"], min(alone["floor_bytes"], alone["peak_bytes"])
        limit = int(floor + options.ooc * (in_core - floor))
        print(f"in core {in_core / MIB:.0f} MiB, limit {limit / MIB:.0f} MiB of each rank")
    runs: dict[int, list[dict[str, Any]]] = {n: [] for n in options.ranks}
    for _ in range(options.rounds):
        for n, done in runs.items():
            size = options.batchsize // n if options.strong else options.batchsize
            done.append(run(n, batchsize=size, limit=limit, **common))
    results = [summarize(n, done, runs[1], options) for n, done in runs.items()]
    header = ["ranks", "images/s", "efficiency", "of cores", "gradients MiB", "sent MiB",
              "all-reduce ms", "ring ms", "peak MiB", "swapped MiB/it"]  # fmt: skip
    print_table(header, [row.pop("cells") for row in results])
    write(options.json, results)


def summarize(
    n: int, done: list[dict[str, Any]], alone: list[dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the figures of ``n`` ranks, with the cells of their row."""
    images = options.batchsize if options.strong else options.batchsize * n
    cores = min(n, len(os.sched_getaffinity(0)))

    def seconds(one: dict[str, Any]) -> float:
        return min(one["seconds"][1:])

    # Images per second over what one rank does beside it, and over the ranks.
    gain = statistics.median(
        images / seconds(a) * seconds(b) / options.batchsize
        for a, b in zip(done, alone, strict=True)
    )
    exchange = min(min(one["allreduce_seconds"][1:]) for one in done) if n > 1 else 0.0
    best = min(done, key=seconds)
    nbytes = best["gradient_bytes"]
    fitted = [(one["latency"], one["bandwidth"]) for one in done]
    model = min(ring_seconds(n, nbytes, *fit) for fit in fitted)
    row = {
        "ranks": n,
        "images_per_second": images / seconds(best),
        "efficiency": gain / n,
        "efficiency_of_cores": gain / cores,
        "gradient_bytes": nbytes,
        "ring_bytes_of_a_rank": 2 * (n - 1) / n * nbytes,
        "allreduce_seconds": exchange,
        "ring_seconds": model if n > 1 else 0.0,
        "fits": fitted if n > 1 else [],
        "peak_bytes": max(one["peak_bytes"] for one in done),
        "moved_bytes": min(one["moved_bytes"] for one in done),
    }
    row["cells"] = [
        n,
        f"{row['images_per_second']:.2f}",
        f"{row['efficiency']:.0%}",
        f"{row['efficiency_of_cores']:.0%}",
        f"{nbytes / MIB:.1f}",
        f"{row['ring_bytes_of_a_rank'] / MIB:.1f}",
        f"{exchange * 1e3:.1f}",
        f"{row['ring_seconds'] * 1e3:.1f}",
        f"{row['peak_bytes'] / MIB:.0f}",
        f"{row['moved_bytes'] / MIB:.0f}",
    ]
    return row


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        result = _train(**json.loads(sys.argv[2]))
        if result is not None:
            print(json.dumps(result))
    else:
        main()
