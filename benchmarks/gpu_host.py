"""Host time of a training iteration on a GPU, over stock Chainer's: real CuPy, no GPU, nothing computed.

    python benchmarks/gpu_host.py [--limits 2 0.5] [--iterations 15] [--json benchmarks/results/gpu_host.json]

It needs CuPy and a C compiler (``make .venv-cuda/.test``). CUDA is ``tests/doubles/cuda_runtime``: kernels and copies
do nothing, so that an iteration takes what Python, CuPy and chainer_ooc take to queue it. Limits are shares of the most
that ResNet-50 takes of the GPU in core, with a batch of 64. Iterations out of core and of stock Chainer take turns,
five at a time, once the plan is no longer measured. Times are those of the process's CPU; ratios are of medians.
Garbage is collected between iterations.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training import machine, print_table, write  # noqa: E402

from tests.doubles import cuda_runtime  # noqa: E402

MIB = 1 << 20
#: The iterations until a plan is made, made again, tried, and measured no more.
SETTLED = 26
TURN = 5


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limits", nargs="+", type=float, default=[2, 0.9, 0.5])
    parser.add_argument("--iterations", type=int, default=15, help="of each kind")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    cuda_runtime.install()
    rows, results = [], []
    for share in options.limits:
        result = measure(share, options.iterations)
        results.append(result)
        rows.append(
            [
                f"{share:g}",
                f"{result['stock_seconds'] * 1e3:.1f}",
                f"{result['seconds'] / result['stock_seconds']:.2f}",
                f"{result['bytes_out'] / MIB:.0f}",
                result["events"],
                result["synchronizations"],
            ]
        )
    print("machine:", machine())
    header = [
        "limit / in core",
        "stock ms",
        "time / stock",
        "MiB out",
        "events",
        "synchronizations",
    ]
    print_table(header, rows)
    write(options.json, results)


def measure(share: float, iterations: int) -> dict[str, Any]:
    """Train under a limit and without one, in turns; return what an iteration takes."""
    import chainer
    import cupy

    import chainer_ooc
    from tests.real_cupy.costs import BATCH, SIDE, Classifier

    cuda_runtime.setup(data=False, simulates_time=True)
    cuda_runtime.find_unchanged()
    model = Classifier()
    model.to_device("@cupy:0")
    optimizer = chainer.optimizers.MomentumSGD().setup(model)
    x, t = cupy.zeros((BATCH, 3, SIDE, SIDE), "f"), cupy.zeros(BATCH, "i")

    def train(count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            gc.collect()
            start = time.process_time()
            optimizer.update(model, x, t)
            seconds.append(time.process_time() - start)
        return seconds

    gc.disable()
    train(3)
    limit = int(share * cuda_runtime.memory()["peak"])
    cupy.get_default_memory_pool().free_all_blocks()
    ours: list[float] = []
    stock: list[float] = []
    with chainer_ooc.out_of_core_mode(limit=limit):
        train(SETTLED)
    while len(ours) < iterations:
        stock += train(TURN)
        with chainer_ooc.out_of_core_mode(limit=limit):
            train(2)
            ours += train(TURN)
    with chainer_ooc.out_of_core_mode(limit=limit):
        train(2)
        before = chainer_ooc.stats().bytes_out
        cuda_runtime.reset()
        train(1)
        counts = cuda_runtime.counts()
        moved = chainer_ooc.stats().bytes_out - before
    return {
        "net": "resnet50",
        "batch": BATCH,
        "limit_bytes": limit,
        "share": share,
        "stock_seconds": statistics.median(stock),
        "seconds": statistics.median(ours),
        "bytes_out": moved,
        "events": counts["cudaEventRecord"],
        "synchronizations": sum(counts[name] for name in counts if name.endswith("Synchronize")),
    }


if __name__ == "__main__":
    main()
