"""What running functions again takes off the link, and off the time, against moving alone (recompute="never").

    python benchmarks/fewer_bytes.py [--nets NAME ...] [--fraction F] [--disk MB] [--repeat N] [--json FILE]

Step time is the least of all iterations from the seventh on over that of moving alone in the same run; "of stock" is
over stock Chainer with everything in memory. Both ways of a network run in turn, ``--repeat`` times. The parameters
after the run are compared with those of stock Chainer: they have the same bits.
"""

from __future__ import annotations

import argparse

from training import machine, print_table, run, write

MIB = 1 << 20
FOLLOWING = 6
WAYS = {"move": {"recompute": "never"}, "default": {}}
MOVED = ("bytes_out", "bytes_in", "bytes_discarded")


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["vgg16", "googlenet", "resnet50", "convnet"])
    parser.add_argument("--fraction", type=float, default=0.6, help="of the peak in core")
    parser.add_argument(
        "--disk",
        type=float,
        help="megabytes per second that the swap file moves at most, both ways together",
    )
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.iterations <= FOLLOWING:
        parser.error(f"--iterations {options.iterations}: give more than {FOLLOWING}")
    common = {"iterations": options.iterations, "threads": options.threads}
    disk = {"disk": options.disk * 1e6} if options.disk else {}
    print("machine:", machine())
    results, rows = [], []
    for net in options.nets:
        in_core = run(net=net, **common)
        limit = int(in_core["peak_bytes"] * options.fraction)
        done = {way: [] for way in WAYS}
        for _ in range(options.repeat):
            for way, settings in WAYS.items():
                one = run(net=net, limit=limit, **settings, **common, **disk)
                assert one["digest"] == in_core["digest"], "not the same bits"
                done[way].append(one)
        stock = min(in_core["seconds"][FOLLOWING:])
        seconds = {
            way: min(min(one["seconds"][FOLLOWING:]) for one in runs) for way, runs in done.items()
        }
        for way, runs in done.items():
            last = runs[-1]["later"]
            row = {
                "net": net,
                "way": way,
                "disk_megabytes_per_second": options.disk,
                "limit_bytes": limit,
                "peak_bytes": max(one["peak_bytes"] for one in runs),
                "seconds": seconds[way],
                "stock_seconds": stock,
                "move_seconds": seconds["move"],
                "foreseen_seconds": runs[-1]["plans"][0]["seconds"] if runs[-1]["plans"] else None,
                "storages_remade": last["storages_remade"],
                **{k: last[k] for k in MOVED},
            }
            results.append(row)
            moved = [row[k] for k in MOVED]
            rows.append(
                [
                    net,
                    way,
                    *(f"{nbytes / MIB:.0f}" for nbytes in moved),
                    f"{seconds[way] / seconds['move']:.3f}",
                    f"{seconds[way] / stock:.3f}",
                    f"{row['peak_bytes'] / limit:.3f}",
                ]
            )
    header = ["net", "way", "MiB out", "in", "discarded"]
    print_table([*header, "time/move", "of stock", "peak/limit"], rows)
    write(options.json, results)


if __name__ == "__main__":
    main()
