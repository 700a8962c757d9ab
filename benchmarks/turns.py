"""Step time, CPU time and peak memory out of core, over stock Chainer's: processes that take turns.

    python benchmarks/turns.py [--nets mlp lstm] [--limits none 1.0 0.6] [--iterations 40] [--json turns.json]

A process of stock Chainer and one for each limit live side by side, and train one after the other, an iteration at a
time (of small networks as many as take a tenth of a second), while the others wait: what else the machine does meets
all of them alike. Limits are shares of stock Chainer's peak (``VmHWM``); "none" is a limit of ``None``, with which all
fits. Other settings are the defaults. The first iterations, in which plans are made, do not count. Ratios of times are
those of the medians; beside that of step times are the quartiles of the ratios turn by turn.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
from typing import Any

from training import Training, machine, print_table, write

MIB = 1 << 20
#: A turn of stock Chainer takes at least as long (seconds).
TURN = 0.1
#: The iterations at the beginning that do not count: the last plan is made before the seventh.
WARM_UP = 8


def limit_of(text: str) -> float | None:
    """Return a share of stock Chainer's peak, or ``None``."""
    return None if text == "none" else float(text)


def measure(net: str, limits: list[float | None], turns: int, threads: int) -> list[dict[str, Any]]:
    """Let stock Chainer and out-of-core mode under each limit take turns; return a result for each limit."""
    with contextlib.ExitStack() as stack:
        stock = stack.enter_context(Training(net=net, iterations=None, threads=threads))
        first = stock.turn(WARM_UP)
        count = math.ceil(TURN / min(first["seconds"]))
        peak = first["peak_bytes"]
        bounds = [None if share is None else int(share * peak) for share in limits]
        others = [
            stack.enter_context(Training(net=net, iterations=None, threads=threads, limit=bound))
            for bound in bounds
        ]
        for one in others:
            one.turn(WARM_UP)
        everybody = [stock, *others]
        done: list[list[dict[str, Any]]] = [[] for _ in everybody]
        for number in range(turns):
            # There and back: what changes slowly meets all of them alike.
            for place in range(len(everybody))[:: -1 if number % 2 else 1]:
                done[place].append(everybody[place].turn(count))
        ends = [one.end() for one in everybody]
    assert len({end["digest"] for end in ends}) == 1, "not the same bits"
    seconds, cpu = (
        [[statistics.median(turn[name]) for turn in turns_of] for turns_of in done]
        for name in ("seconds", "cpu_seconds")
    )
    results = []
    for place, (share, bound) in enumerate(zip(limits, bounds, strict=True), 1):
        pairs = [mine / theirs for mine, theirs in zip(seconds[place], seconds[0], strict=True)]
        results.append(
            {
                "net": net,
                "share": share,
                "limit_bytes": bound,
                "stock_peak_bytes": peak,
                "peak_bytes": done[place][-1]["peak_bytes"],
                "stock_seconds": statistics.median(seconds[0]),
                "seconds": statistics.median(seconds[place]),
                "ratio_quartiles": statistics.quantiles(pairs, n=4),
                "cpu_ratio": statistics.median(cpu[place]) / statistics.median(cpu[0]),
                "iterations": turns * count,
                "later": done[place][-1]["later"],
                "plans": ends[place]["plans"],
            }
        )
    return results


def row_of(result: dict[str, Any]) -> list[Any]:
    """Return the row of the table for a result."""
    low, _, high = result["ratio_quartiles"]
    share, bound, later = result["share"], result["limit_bytes"], result["later"]
    return [
        result["net"],
        "none" if share is None else f"{share:.0%}",
        "-" if bound is None else f"{bound / MIB:.0f}",
        f"{result['stock_seconds'] * 1e3:.1f}",
        f"{result['seconds'] / result['stock_seconds']:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{result['cpu_ratio']:.3f}",
        "-" if bound is None else f"{result['peak_bytes'] / bound:.3f}",
        f"{later['bytes_out'] / MIB:.0f}",
        f"{later['bytes_in'] / MIB:.0f}",
    ]


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["mlp", "lstm", "googlenet", "resnet50"])
    parser.add_argument("--limits", nargs="+", type=limit_of, default=[None, 1.0, 0.6])
    parser.add_argument("--iterations", type=int, default=40, help="turns of each process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    print("machine:", machine())
    results = []
    for net in options.nets:
        results += measure(net, options.limits, options.iterations, options.threads)
    header = ["net", "limit", "MiB", "stock ms", "time / stock", "quartiles", "CPU / stock"]
    print_table([*header, "peak / limit", "MiB out", "MiB in"], [row_of(one) for one in results])
    write(options.json, results)


if __name__ == "__main__":
    main()
