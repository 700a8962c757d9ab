"""What chainer_ooc.estimate() foresees against what training takes: memory, traffic, time.

    python benchmarks/estimate.py [--nets resnet50] [--fractions 0.8 0.6] [--json estimate.json]

Each network is trained in processes of its own: in core, and under limits that are fractions of the
foreseen peak. "arrays" is the peak of the resident memory (VmHWM) less what the process had before the
model was made. Bytes and times are per iteration, of all iterations but the first. Times are also given as
processor time, which other programs on the machine stretch less.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from training import ROOT, machine, print_table, write

MIB = 1 << 20
HERE = Path(__file__).resolve()


def child(**task: Any) -> dict[str, Any]:
    """Train, or estimate, in a new process."""
    threads = str(task.pop("threads", 1))
    environment = dict(os.environ, OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), environment.get("PYTHONPATH", "")])
    )
    command = [sys.executable, str(HERE), "--child", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def _train(net: str, iterations: int, limit: int | None = None) -> dict[str, Any]:
    from nets import NETS

    import chainer_ooc

    import chainer  # isort: skip

    base = _status("VmRSS:")
    if limit is not None:
        chainer_ooc.enable(limit=limit)
    model, x, t = NETS[net]()
    optimizer = chainer.optimizers.MomentumSGD().setup(model)
    seconds, cpu_seconds, moved = [], [], []
    for _ in range(iterations):
        start, cpu, before = time.perf_counter(), time.process_time(), chainer_ooc.stats()
        optimizer.update(model, x, t)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
        now = chainer_ooc.stats()
        moved.append([now.bytes_out - before.bytes_out, now.bytes_in - before.bytes_in])
    return {
        "base_bytes": base,
        "peak_bytes": _status("VmHWM:"),
        "seconds": min(seconds[1:]),
        "cpu_seconds": min(cpu_seconds[1:]),
        "bytes_out": sum(out for out, _ in moved[1:]) / (iterations - 1),
        "bytes_in": sum(back for _, back in moved[1:]) / (iterations - 1),
    }


def _estimate(net: str, limit: int | None = None) -> dict[str, Any]:
    import chainer_ooc

    source = f"{HERE.with_name('nets.py')}:{net}"
    start = time.perf_counter()
    result = chainer_ooc.estimate(source, (224, 8), limit=limit, search=False)
    return {**json.loads(result.to_json()), "took_seconds": time.perf_counter() - start}


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    nets = ["convnet", "googlenet", "resnet50", "unet3d", "lstm"]
    parser.add_argument("--nets", nargs="+", default=nets)
    parser.add_argument("--fractions", nargs="*", type=float, default=[0.8, 0.6])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task = json.loads(options.child)
        print(json.dumps(_train(**task) if "iterations" in task else _estimate(**task)))
        return
    print("machine:", machine())
    results, in_core, under_limits = [], [], []
    for net in options.nets:
        foreseen = child(net=net, threads=options.threads)
        measured = child(net=net, iterations=options.iterations, threads=options.threads)
        arrays = foreseen["peak_in_core_bytes"] - foreseen["process_bytes"]
        measured_arrays = measured["peak_bytes"] - measured["base_bytes"]
        in_core.append(
            [
                net,
                f"{arrays / MIB:.0f}",
                f"{measured_arrays / MIB:.0f}",
                f"{arrays / measured_arrays:.3f}",
                f"{foreseen['peak_in_core_bytes'] / measured['peak_bytes']:.3f}",
                f"{foreseen['in_core_step_seconds']:.2f}",
                f"{measured['seconds']:.2f}",
                f"{measured['cpu_seconds']:.2f}",
                f"{foreseen['took_seconds']:.1f}",
            ]
        )
        results.append({"net": net, "fraction": None, "foreseen": foreseen, "measured": measured})
        for fraction in options.fractions:
            limit = int(foreseen["peak_in_core_bytes"] * fraction)
            if limit < foreseen["floor_bytes"]:
                under_limits.append(
                    [net, f"{fraction:.0%}", f"{limit / MIB:.0f}", "below the floor", *"------"]
                )
                continue
            expected = child(net=net, limit=limit, threads=options.threads)
            done = child(
                net=net, iterations=options.iterations, limit=limit, threads=options.threads
            )
            under_limits.append(
                [
                    net,
                    f"{fraction:.0%}",
                    f"{limit / MIB:.0f}",
                    f"{expected['peak_bytes'] / MIB:.0f}",
                    f"{done['peak_bytes'] / MIB:.0f}",
                    f"{expected['peak_bytes'] / done['peak_bytes']:.3f}",
                    f"{expected['bytes_out'] / MIB:.0f} / {done['bytes_out'] / MIB:.0f}",
                    f"{expected['bytes_in'] / MIB:.0f} / {done['bytes_in'] / MIB:.0f}",
                    f"{expected['step_seconds']:.2f}",
                    f"{done['seconds']:.2f}",
                ]
            )
            results.append(
                {"net": net, "fraction": fraction, "foreseen": expected, "measured": done}
            )
        write(options.json, results)
        print(f"{net} is done", file=sys.stderr, flush=True)
    header = [
        "in core",
        "MiB foreseen",
        "measured",
        "ratio",
        "with process",
        "s foreseen",
        "measured",
    ]
    print_table([*header, "processor s", "estimate took s"], in_core)
    print()
    header = ["net", "limit", "MiB", "peak foreseen", "measured", "ratio", "MiB out", "MiB in"]
    if under_limits:
        print_table([*header, "s foreseen", "measured"], under_limits)


if __name__ == "__main__":
    main()
