"""What holds the limit without the C extension, when allocations are not announced: peaks, step times, costs.

    python benchmarks/unannounced.py [--nets convnet] [--fractions 0.8 0.6 0.4] [--json unannounced.json]

Limits are shares of the peak in core. Peaks are the kernel's (``VmHWM``), of the first iteration and of all later ones,
over the limit. Step times are the median of iterations 5 to 8 over stock Chainer's. The last line is what a function
near the limit costs beside itself (microseconds): while its kind is measured, and later.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from training import ROOT, machine, print_table, write

ITERATIONS = 8


def train(net: str, limit: int | None) -> dict[str, Any]:
    """Train in this process. Return the digest of the parameters, and each iteration's peak and time."""
    import hashlib

    import numpy as np
    from nets import NETS

    import chainer_ooc
    from chainer_ooc.swap.system.memory import ResidentMemory

    import chainer  # isort: skip

    reset, peaks = ResidentMemory.reset_peak, []

    def note_and_reset() -> bool:
        peaks.append(ResidentMemory.peak_since_reset())
        return reset()

    ResidentMemory.reset_peak = staticmethod(note_and_reset)  # type: ignore[method-assign, assignment]
    np.random.seed(0)
    if limit is not None:
        chainer_ooc.enable(limit, single_backward=True)
    model, x, t = NETS[net]()
    optimizer = chainer.optimizers.MomentumSGD(lr=0.001).setup(model)
    result: dict[str, Any] = {"peaks": [], "seconds": []}
    for _ in range(ITERATIONS):
        note_and_reset()
        peaks.clear()
        start = time.perf_counter()
        optimizer.update(model, x, t)
        result["seconds"].append(time.perf_counter() - start)
        result["peaks"].append(max([*peaks, ResidentMemory.peak_since_reset()]))
    digest = hashlib.sha256()
    for parameter in model.params():
        digest.update(np.ascontiguousarray(parameter.array))
    return {"digest": digest.hexdigest(), **result}


def run(net: str, limit: int | None, extension: bool = True) -> dict[str, Any]:
    """Train in a process of its own."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    environment["PYTHONWARNINGS"] = "ignore"
    if not extension:
        environment["_CHAINER_OOC_WITHOUT_EXTENSION"] = "1"
    command = [sys.executable, __file__, "--one", json.dumps([net, limit])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def costs(number: int = 2000) -> tuple[float, float]:
    """Return what a call costs beside itself, while it is measured and later (seconds)."""
    from chainer_ooc.swap import observed_growth

    found = []
    for measured in (number, 0):
        observed_growth.MEASURED = measured
        growth = observed_growth.ObservedGrowth()
        start = time.perf_counter()
        for _ in range(number):
            growth.expected("kind", 0)
            begun = growth.begin("kind", 0)
            assert begun is not None
            growth.end("kind", begun, 0)
        found.append((time.perf_counter() - start) / number)
    return found[0], found[1]


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["convnet"])
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.8, 0.6, 0.4])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train(*json.loads(options.one))))
        return
    print("machine:", machine())
    rows, results = [], []
    for net in options.nets:
        in_core = run(net, None)
        stock = statistics.median(in_core["seconds"][4:])
        for fraction in options.fractions:
            limit = int(fraction * max(in_core["peaks"]))
            for extension in (True, False):
                done = run(net, limit, extension)
                assert done["digest"] == in_core["digest"], "not the same bits"
                first, *later = (peak / limit for peak in done["peaks"])
                step = statistics.median(done["seconds"][4:]) / stock
                kind = "with" if extension else "without"
                rows.append([net, f"{fraction:.0%}", limit >> 20, kind, first, max(later), step])
                results.append({"net": net, "limit": limit, "extension": extension, **done})
    header = ["net", "of peak", "limit MiB", "extension", "peak, 1st", "peak, later", "step time"]
    print_table(header, rows)
    measured, later = costs()
    print(f"a function near the limit: {measured * 1e6:.0f} us, later {later * 1e6:.0f} us")
    write(options.json, {"nets": results, "seconds_per_function": [measured, later]})


if __name__ == "__main__":
    main()
