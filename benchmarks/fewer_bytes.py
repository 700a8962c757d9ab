"""What takes bytes off the link: no zeros, running again, against moving alone.

    python benchmarks/fewer_bytes.py [--nets NAME ...] [--fraction F] [--disk MB] [--repeat N] [--json FILE]

Step time is the least of all iterations from the seventh on over that of moving alone in the same run; "of stock" is
over stock Chainer with everything in memory. All ways of a network run in turn, ``--repeat`` times. The parameters
after the run are compared with those of stock Chainer: they have the same bits.
"""

from __future__ import annotations

import argparse
import timeit
from typing import Any

from training import machine, print_table, run, write

MIB = 1 << 20
FOLLOWING = 6
WAYS = {
    "move": {},
    "no zeros": {"skip_zeros": True},
    "run again": {"recompute": True},
}
MOVED = ("bytes_out", "bytes_in", "bytes_skipped", "bytes_forgone")


def zeros(net: str) -> list[str]:
    """Return what zero suppression would make of what ReLU returns: its size, and how fast NumPy does and undoes it."""
    import numpy as np
    from nets import NETS

    import chainer  # isort: skip

    class Look(chainer.FunctionHook):
        nbytes = zero = 0
        largest = np.empty(0, np.float32)

        def forward_postprocess(self, function: Any, inputs: Any) -> None:
            if function.label == "ReLU":
                y = np.maximum(inputs[0], 0)
                self.nbytes += y.nbytes
                self.zero += int(np.count_nonzero(y == 0)) * y.itemsize
                if y.size > self.largest.size:
                    self.largest = y.reshape(-1).copy()

    np.random.seed(0)
    model, x, t = NETS[net]()
    with Look() as look:
        model(x, t)
    words = look.largest.view(np.uint32)
    packed = np.compress(words != 0, words)
    bits = np.packbits(words != 0)
    back = np.empty_like(words)

    def pack() -> None:
        present = words != 0
        np.packbits(present)
        np.compress(present, words)

    def unpack() -> None:
        back[...] = 0
        np.place(back, np.unpackbits(bits, count=words.size).view(bool), packed)

    rates = [words.nbytes / min(timeit.repeat(f, number=1, repeat=5)) for f in (pack, unpack)]
    assert (back == words).all()
    left = 1 - look.zero / look.nbytes + 1 / 32
    return [net, f"{look.nbytes / MIB:.0f}", f"{left:.2f}", *(f"{r / 1e6:.0f}" for r in rates)]


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
    parser.add_argument(
        "--zeros", action="store_true", help="only: what leaving zeros out would do"
    )
    options = parser.parse_args()
    if options.iterations <= FOLLOWING:
        parser.error(f"--iterations {options.iterations}: give more than {FOLLOWING}")
    if options.zeros:
        header = ["net", "MiB of ReLU", "left", "MB/s packed", "MB/s unpacked"]
        print_table(header, [zeros(net) for net in options.nets])
        return
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
                one = run(net=net, limit=limit, single_backward=True, **settings, **common, **disk)
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
    header = ["net", "way", "MiB out", "in", "less zeros", "run again"]
    print_table([*header, "time/move", "of stock", "peak/limit"], rows)
    write(options.json, results)


if __name__ == "__main__":
    main()
