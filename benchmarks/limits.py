"""Step time and measured peak under limits below the in-core peak, over stock Chainer's.

    python benchmarks/limits.py [--nets resnet50] [--fractions 1 0.8 0.6 0.4] [--repeat 3] [--json limits.json]

Peaks are ``VmHWM`` of each process. Stock and limited processes take turns; times are the best over the
repetitions, of all iterations but the first. "bound" is the larger of stock's step time and the time that the
bytes which moved take at the disk's bandwidth, measured in the same run.
"""

from __future__ import annotations

import argparse
import mmap
import os
import tempfile
import time

from training import machine, print_table, run, write

MIB = 1 << 20


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


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--nets", nargs="+", default=["convnet", "googlenet", "resnet50", "unet3d", "lstm"]
    )
    parser.add_argument("--fractions", nargs="+", type=float, default=[1.0, 0.8, 0.6, 0.4])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3)
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
        runs = {fraction: [] for fraction in options.fractions}
        stock = [in_core]
        for _ in range(options.repeat):
            stock.append(run(net=net, **common))
            for fraction, done in runs.items():
                limit = int(in_core["peak_bytes"] * fraction)
                single = not options.twice
                done.append(run(net=net, limit=limit, single_backward=single, **common))
        best = min(min(one["seconds"][1:]) for one in stock)
        cpu = min(min(one["cpu_seconds"][1:]) for one in stock)
        for fraction, done in runs.items():
            assert all(one["digest"] == in_core["digest"] for one in done), "not the same bits"
            limit = int(in_core["peak_bytes"] * fraction)
            stats = [one["stats"] for one in done]
            out = min(s["bytes_out"] for s in stats) / options.iterations
            back = min(s["bytes_in"] for s in stats) / options.iterations
            seconds = min(min(one["seconds"][1:]) for one in done)
            causes = [name for name in stats[0] if name.startswith("stall_")]
            stalls = {name: min(s[name] for s in stats) / options.iterations for name in causes}
            stall = sum(stalls.values())
            row = {
                "net": net,
                "fraction": fraction,
                "limit_bytes": limit,
                "in_core_peak_bytes": in_core["peak_bytes"],
                "peak_bytes": max(one["peak_bytes"] for one in done),
                "stock_seconds": best,
                "seconds": seconds,
                "cpu_ratio": min(min(one["cpu_seconds"][1:]) for one in done) / cpu,
                "bytes_out": out,
                "bytes_in": back,
                **stalls,
                "bound_seconds": max(best, out / write_rate + back / read_rate),
            }
            results.append(row)
            rows.append(
                [
                    net,
                    f"{fraction:.0%}",
                    f"{limit / MIB:.0f}",
                    f"{row['peak_bytes'] / limit:.3f}",
                    f"{seconds / best:.3f}",
                    f"{row['cpu_ratio']:.3f}",
                    f"{seconds / row['bound_seconds']:.3f}",
                    f"{out / MIB:.0f}",
                    f"{back / MIB:.0f}",
                    f"{stall / seconds:.1%}",
                ]
            )
    header = ["net", "limit", "MiB", "peak/limit", "time/stock", "CPU/stock", "time/bound"]
    print_table([*header, "MiB out", "MiB in", "stalled"], rows)
    write(options.json, results)


if __name__ == "__main__":
    main()
