"""What out-of-core mode costs when everything fits: step time with it, with nothing to move, over stock.

    python benchmarks/overhead.py [--nets mlp resnet50] [--repeat 5] [--json overhead.json]

Stock and out-of-core processes take turns; each ratio is of the medians over all iterations but the first
of each process.
"""

from __future__ import annotations

import argparse
import statistics

from training import machine, print_table, run, write

ITERATIONS = {"mlp": 400, "lstm": 8}


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["mlp", "lstm", "googlenet", "resnet50"])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    results = {}
    for net in options.nets:
        times: dict[str, dict[str, list[float]]] = {
            kind: {"seconds": [], "cpu_seconds": []} for kind in ("stock", "out of core")
        }
        for _ in range(options.repeat):
            for kind, settings in (("stock", {}), ("out of core", {"limit": None})):
                done = run(net=net, iterations=ITERATIONS.get(net, 3), **settings)
                if done["stats"]:
                    assert done["stats"]["bytes_out"] == 0, "something moved"
                for name, found in times[kind].items():
                    found += done[name][1:]
        medians = {
            kind: {name: statistics.median(found) for name, found in of.items()}
            for kind, of in times.items()
        }
        results[net] = medians
    print("machine:", machine())
    rows = []
    for net, medians in results.items():
        stock, ooc = medians["stock"], medians["out of core"]
        ratios = [ooc[name] / stock[name] for name in ("seconds", "cpu_seconds")]
        rows.append([net, stock["seconds"], ooc["seconds"], *(f"{ratio:.3f}" for ratio in ratios)])
    print_table(["net", "stock s", "out of core s", "time ratio", "CPU time ratio"], rows)
    write(options.json, results)


if __name__ == "__main__":
    main()
