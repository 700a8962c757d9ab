"""Measure whether a limit on GPU memory holds, in many orders of allocation, with real CuPy and no GPU.

    python benchmarks/gpu_memory.py --orders 20 --json benchmarks/results/gpu_memory.json

It needs CuPy and a C compiler (``make .venv-cuda/.test``). CUDA is ``tests/doubles/cuda_runtime``: allocators, streams
and events are as on a GPU, but nothing is computed or copied, so a network takes no time. What is measured, per network
and limit, over all orders:

* failures (OutOfMemoryError),
* garbage collections that an allocation made after the first iteration, by which CuPy's pool answers a refusal,
* the most memory that was taken of the GPU, as a share of the limit,
* bytes copied in an iteration that follows the same plan as the one before, as a share of the plan's,
* pages of GPU memory that were mapped anew per iteration, and host time.

Each order has other small arrays alive between and during the functions, other sizes that were free when training
began, and begins in a new process: half of them train in core there first.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import gc
import itertools
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
ITERATIONS = 7
#: What cuDNN's convolutions take beside their arrays (bytes).
WORKSPACE = 64 * MIB
#: Each network's limits (MiB): 0.7, 0.5 and 0.3 of the most that its arrays take in core, and 1.05 of its floor: of the
#: least limit that an error asks for and with which training then goes on.
LIMITS = {
    "resnet50": [4075, 2910, 1746, 1220],
    "googlenet": [1492, 1117],
    "vgg16": [3031],
    "unet3d": [1497, 1070, 879],
    "lstm": [2115, 1511, 1456],
}
#: Those of them that are below the floor, which nobody could hold; so is 0.2 of each network.
BELOW = {"googlenet": [1066, 640], "vgg16": [2146, 1288], "unet3d": [642], "lstm": [907]}


class Collections:
    """Counts the full garbage collections that code asks for."""

    def __init__(self) -> None:
        self.count, self._collect = 0, gc.collect
        gc.collect = self  # type: ignore[assignment]

    def __call__(self, *generation: int) -> int:
        self.count += 1
        return self._collect(*generation)


class Order:
    """Small arrays that come and go in an order of their own.

    Args:
        seed: Decides on it; 0 has none.
        limit: The memory that there is (bytes): all of them together take a thousandth.
    """

    def __init__(self, seed: int, limit: int) -> None:
        self.random, self.active = random.Random(seed), bool(seed)
        self.most, self.taken, self.alive = limit // 1000, 0, []

    def warm(self, limit: int) -> None:
        """Take memory in blocks of random sizes and free it again in random order."""
        import cupy

        blocks, rest = [], int(limit * 0.7)
        while self.active and rest > 0:
            size = min(int(2 ** self.random.uniform(9, 27)), rest)
            blocks.append(cupy.cuda.alloc(size))
            rest -= size
        self.random.shuffle(blocks)

    def disturb(self) -> None:
        """Make a few arrays; forget others."""
        import cupy

        for _ in range(self.random.randrange(4) if self.active else 0):
            size = int(2 ** self.random.uniform(0, 18))
            while self.alive and self.taken + size > self.most:
                self.taken -= self.alive.pop(self.random.randrange(len(self.alive))).nbytes
            if self.taken + size <= self.most:
                self.alive.append(cupy.empty(size, "B"))
                self.taken += size


def make(name: str) -> tuple[Any, Any, Any]:
    """Return a network, its input and its labels."""
    import chainer.links as L
    import nets
    import numpy as np

    def images(batch: int) -> tuple[Any, Any]:
        return np.zeros((batch, 3, 224, 224), "f"), np.zeros(batch, "i")

    if name == "resnet50":
        return nets.Vision(L.ResNet50Layers(pretrained_model=None), "fc6"), *images(64)
    if name == "googlenet":
        return nets.Vision(L.GoogLeNet(pretrained_model=None), "loss3_fc"), *images(64)
    if name == "vgg16":
        return nets.Vision(L.VGG16Layers(pretrained_model=None), "fc8"), *images(32)
    if name == "unet3d":
        volume = (2, 96, 96, 96)
        return nets.UNet3D(16), np.zeros((2, 1, *volume[1:]), "f"), np.zeros(volume, "i")
    return nets.Recurrent(1024), np.zeros((256, 64, 1024), "f"), np.zeros(256, "i")


def train(name: str, iterations: int, order: Order, after: Any = None) -> None:
    """Train a new network; call ``after`` after each iteration with the seconds that it took."""
    import chainer
    import chainer.functions as F
    import cupy

    model, x, t = make(name)
    model.to_device("@cupy:0")
    optimizer = chainer.optimizers.MomentumSGD(0.01).setup(model)
    x, t = cupy.asarray(x), cupy.asarray(t)
    call = chainer.Link.__call__

    def disturbed(self: Any, *args: Any, **given: Any) -> Any:
        order.disturb()
        return call(self, *args, **given)

    def loss(x: Any, t: Any) -> Any:
        return F.softmax_cross_entropy(model(x), t)

    chainer.Link.__call__ = disturbed
    try:
        for _ in range(iterations):
            start = time.perf_counter()
            optimizer.update(loss, x, t)
            cupy.cuda.Device().synchronize()
            if after is not None:
                after(time.perf_counter() - start)
    finally:
        chainer.Link.__call__ = call


def run_child(name: str, limit: int, seed: int, after_in_core: bool, pool: str) -> dict[str, Any]:
    """Train one network under one limit in this process, which has imported nothing yet. Return what was measured."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from tests.doubles import cuda_runtime

    cuda_runtime.install()
    cuda_runtime.setup(data=False, workspace=WORKSPACE)
    cuda_runtime.find_unchanged()
    import cupy

    import chainer_ooc
    from chainer_ooc import state
    from chainer_ooc.graph.iteration import tracker_of

    import chainer  # isort: skip

    collections = Collections()
    chainer.config.autotune = False
    order = Order(seed, limit)
    if after_in_core:
        train(name, 2, Order(0, limit))
        gc.collect()
    if pool == "cupy":
        cupy.cuda.set_allocator(cupy.cuda.MemoryPool().malloc)
    cupy.get_default_memory_pool().free_all_blocks()
    cuda_runtime.reset()
    rows: list[dict[str, Any]] = []
    error = ""

    def arena_counts() -> dict[str, int]:
        arenas = None if state.process.gpus is None else state.process.gpus.arena_counts()
        return dict(arenas or {})

    def planned() -> int:
        """Return the bytes that the plan copies which the last iteration followed, 0 without a plan."""
        for manager in () if state.process.gpus is None else state.process.gpus.managers.values():
            tracker = tracker_of(manager)
            if (executor := tracker._executor) is not None:
                plan = executor.plan
                size = [
                    one.nbytes
                    for one in tracker.plan_cache.entries[plan.signature].profile.storages
                ]
                return sum(size[i] for _, i in [*plan.copy_out, *plan.copy_in])
        return 0

    def note(seconds: float) -> None:
        stats = chainer_ooc.stats()
        rows.append(
            {
                "seconds": seconds,
                "out": stats.bytes_out,
                "in": stats.bytes_in,
                "collections": collections.count,
                "planned": planned(),
                **arena_counts(),
            }
        )

    with chainer_ooc.out_of_core_mode(limit=limit):
        note(0)
        order.warm(limit)
        try:
            train(name, ITERATIONS, order, note)
        except MemoryError as raised:
            error = f"{type(raised).__name__}: {str(raised)[:900]}"
            del raised
        reports = chainer_ooc.plans()
        peak = cuda_runtime.memory()["peak"]
    steps = [
        {key: later[key] - before.get(key, 0) for key in later}
        | {key: later[key] for key in ("seconds", "planned")}
        for before, later in itertools.pairwise(rows)
    ]
    return {
        "error": error,
        "taken": peak / limit,
        "steps": steps,
        "floor": min((one.floor_bytes for one in reports), default=0),
        "complaints": cuda_runtime.complaints(),
    }


def run(name: str, limit: int, seed: int, after_in_core: bool, pool: str) -> dict[str, Any]:
    """Run that in a process of its own, which must end silently."""
    given = json.dumps([name, limit, seed, after_in_core, pool])
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--child", given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"error": f"status {done.returncode}: {done.stderr[-500:]}", "noise": done.stderr}
    result: dict[str, Any] = json.loads(lines[-1])
    result["noise"] = done.stderr + "".join(lines[:-1])
    return result


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a network did under a limit, over all orders."""
    good = [one for one in runs if not one["error"]]
    later = [step for one in good for step in one["steps"][1:]]
    last = [one["steps"][-1] for one in good]
    # The first iteration that follows a plan begins with what the one before has left in memory.
    moved = [
        (step["out"] + step["in"]) / step["planned"]
        for one in good
        for before, step in itertools.pairwise(one["steps"])
        if step["planned"] and step["planned"] == before["planned"]
    ]
    return {
        "orders": len(runs),
        "failures": len(runs) - len(good),
        "error": next((one["error"] for one in runs if one["error"]), ""),
        "collections": sum(step["collections"] for step in later),
        "taken": max((one["taken"] for one in good), default=None),
        "moved": max(moved, default=None),
        "floor_mib": min((one["floor"] >> 20 for one in good), default=None),
        "remapped_last": statistics.median([step.get("maps", 0) for step in last] or [0]),
        "remapped_most": max([step.get("maps", 0) for step in later] or [0]),
        "waits_most": max([step.get("waits", 0) for step in later] or [0]),
        "seconds_last": statistics.median([step["seconds"] for step in last] or [0]),
        "noisy": sum(bool(one.get("noise")) for one in runs),
        "complaints": sorted({text for one in good for text in one["complaints"]})[:5],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--orders", type=int, default=20, help="orders of allocation (20)")
    parser.add_argument("--nets", nargs="*", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--limits", nargs="*", type=int, help="MiB, instead of each network's own")
    parser.add_argument(
        "--pool", choices=["ours", "cupy"], default="ours", help="CuPy's own pool, for comparison"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (1)")
    parser.add_argument("--json", type=Path, help="write the table there, after each line")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_child(*_parsed(options.child))))
        return
    table = []
    for name in options.nets:
        for mib in options.limits or LIMITS[name]:
            with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
                futures = [
                    pool.submit(run, name, mib * MIB, seed, bool(seed % 2), options.pool)
                    for seed in range(options.orders)
                ]
                runs = [one.result() for one in futures]
            line = {"net": name, "limit_mib": mib, **summarize(runs)}
            table.append(line)
            print(json.dumps(line), flush=True)
            if options.json:
                about = {
                    "date": datetime.date.today().isoformat(),
                    "python": platform.python_version(),
                    "pool": options.pool,
                    "iterations": ITERATIONS,
                    "below_the_floor_mib": BELOW,
                }
                options.json.write_text(json.dumps({**about, "table": table}, indent=1) + "\n")
    if any(line["failures"] or line["collections"] or line["noisy"] for line in table):
        sys.exit("a limit did not hold")


def _parsed(text: str) -> tuple[str, int, int, bool, str]:
    name, limit, seed, after_in_core, pool = json.loads(text)
    return str(name), int(limit), int(seed), bool(after_in_core), str(pool)


if __name__ == "__main__":
    main()
