"""Step time and measured peak under limits below the in-core peak, over stock Chainer's.

    python benchmarks/limits.py [--nets resnet50] [--fractions 1 0.8 0.6 0.4] [--repeat 3] [--json limits.json]

Peaks are ``VmHWM`` of each process. Stock and limited processes take turns; times are the best over the
repetitions, of the iterations from the seventh on. "bound" is the larger of stock's step time and the time that the
bytes which moved take at the disk's bandwidth, measured in the same run. Iterations 1 and 2 are on demand; by plan are
those from the third on, but for the one before which the plan is made again. "foreseen" is what the simulation said of
step time and peak, over what was measured.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from typing import Any

from training import machine, print_table, run, write

MIB = 1 << 20
#: The first iteration (from 0) that follows a plan, and of which it is the last that was made.
FOLLOWING = 6


def disk_bandwidth(nbytes: int = 512 * MIB) -> tuple[float, float]:
    """Return bytes per second of direct writes and reads in the directory for temporary files."""
    memory = mmap.mmap(-1, 16 * MIB)
    handle, path = tempfile.mkstemp()
    os.close(handle)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    os.unlink(path)
    rates = []
    for move in (os.pwrite, lambda fd, memory, offset: os.preadv(fd, [memory], offset)):
        start = time.perf_counter()
        for offset in range(0, nbytes, len(memory)):
            move(fd, memory, offset)
        rates.append(nbytes / (time.perf_counter() - start))
    os.close(fd)
    return rates[0], rates[1]


def foreseen(done: list[dict[str, Any]]) -> tuple[str, str]:
    """Return what plans foresaw of step time and peak over what was measured, in the best run."""
    planned = [
        (one["plans"][0], one["peak_bytes"])
        for one in done
        if one["plans"] and one["plans"][0]["measured_seconds"]
    ]
    if not planned:
        return "-", "-"
    best, peak = min(planned, key=lambda pair: min(pair[0]["measured_seconds"]))
    seconds = best["seconds"] / statistics.median(best["measured_seconds"][-3:])
    return f"{seconds:.2f}", f"{best['peak_bytes'] / peak:.2f}"


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--nets", nargs="+", default=["convnet", "googlenet", "resnet50", "unet3d", "lstm"]
    )
    parser.add_argument("--fractions", nargs="+", type=float, default=[1.0, 0.8, 0.6, 0.4])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--twice", action="store_true", help="keep copies for a second backward")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    common = {"iterations": options.iterations, "threads": options.threads}
    write_rate, read_rate = disk_bandwidth()
    print("machine:", machine())
    print(f"disk: {write_rate / 1e6:.0f} MB/s out, {read_rate / 1e6:.0f} MB/s in")
    results, rows = [], []
    for net in options.nets:
        in_core = run(net=net, **common)
        runs = {fraction: {False: [], True: []} for fraction in options.fractions}
        stock = [in_core]
        for _ in range(options.repeat):
            stock.append(run(net=net, **common))
            for fraction, done in runs.items():
                limit = int(in_core["peak_bytes"] * fraction)
                single = not options.twice
                for plan, runs_of in done.items():
                    settings = {"limit": limit, "single_backward": single, "plan": plan}
                    runs_of.append(run(net=net, **settings, **common))
        best = min(min(one["seconds"][FOLLOWING:]) for one in stock)
        cpu = min(min(one["cpu_seconds"][FOLLOWING:]) for one in stock)
        for fraction, by_plan in runs.items():
            for plan, done in by_plan.items():
                limit = int(in_core["peak_bytes"] * fraction)
                assert all(one["digest"] == in_core["digest"] for one in done), "not the same bits"
                seconds = min(min(one["seconds"][FOLLOWING:]) for one in done)
                stats = [one["later"] for one in done]
                out, back = (min(s[name] for s in stats) for name in ("bytes_out", "bytes_in"))
                causes = [name for name in stats[0] if name.startswith("stall_")]
                stalls = {name: min(s[name] for s in stats) for name in causes}
                row = {
                    "net": net,
                    "fraction": fraction,
                    "plan": plan,
                    "limit_bytes": limit,
                    "in_core_peak_bytes": in_core["peak_bytes"],
                    "peak_bytes": max(one["peak_bytes"] for one in done),
                    "stock_seconds": best,
                    "seconds": seconds,
                    "cpu_ratio": min(min(one["cpu_seconds"][FOLLOWING:]) for one in done) / cpu,
                    "bytes_out": out,
                    "bytes_in": back,
                    **stalls,
                    "bound_seconds": max(best, out / write_rate + back / read_rate),
                    "plans": [one["plans"] for one in done],
                }
                results.append(row)
                rows.append(
                    [
                        net,
                        f"{fraction:.0%}",
                        "plan" if plan else "demand",
                        f"{limit / MIB:.0f}",
                        f"{row['peak_bytes'] / limit:.3f}",
                        f"{seconds / best:.3f}",
                        f"{row['cpu_ratio']:.3f}",
                        f"{seconds / row['bound_seconds']:.3f}",
                        f"{out / MIB:.0f}",
                        f"{back / MIB:.0f}",
                        f"{sum(stalls.values()) / seconds:.1%}",
                        *foreseen(done),
                    ]
                )
    header = ["net", "limit", "how", "MiB", "peak/limit", "time/stock", "CPU/stock", "time/bound"]
    print_table([*header, "MiB out", "MiB in", "stalled", "foreseen time", "peak"], rows)
    write(options.json, results)


if __name__ == "__main__":
    main()
