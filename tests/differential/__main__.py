"""Run random programs on stock Chainer and out of core, and print where they differ.

python -m tests.differential --seeds 0:5000              # a summary, and the smallest programs that fail
python -m tests.differential --seeds 17 --show           # the program of a seed
python -m tests.differential --seeds 17 --steps 0,4,9    # these of its steps alone
python -m tests.differential --seeds 0:300 --contender stock    # are the programs deterministic?
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter

from tests.differential.contest import Arena, Failure
from tests.differential.program import make_program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:300", help="one seed, or FIRST:END")
    parser.add_argument(
        "--contender", default="out of core", choices=["out of core", "no hook", "stock"]
    )
    parser.add_argument(
        "--jobs", type=int, default=None, help="programs at a time (default: one a core)"
    )
    parser.add_argument("--steps", default="", help="numbers of steps: the others are left out")
    parser.add_argument("--show", action="store_true", help="print the program; do not run it")
    parser.add_argument("--shrink", type=int, default=3, help="how many failures are made smaller")
    parser.add_argument("--plant", default=None, help="an error of tests/differential/planted.py")
    options = parser.parse_args()
    first, colon, end = options.seeds.partition(":")
    seeds = range(int(first), int(end) if colon else int(first) + 1)
    if options.show:
        print(make_program(seeds[0]))
        return 0
    found: list[Failure] = []
    start = time.perf_counter()
    with Arena(options.contender, options.jobs, options.plant) as arena:
        if options.steps:
            program = make_program(seeds[0])
            kept = [program.steps[int(number)] for number in options.steps.split(",")]
            failure = arena.fight(dataclasses.replace(program, steps=kept))
            print(failure or "no difference")
            return failure is not None
        for seed, failure in arena.failures(seeds):
            if failure is not None:
                print(f"seed {seed}: {failure.differences[0][:200]}", flush=True)
                found.append(failure)
        seconds = time.perf_counter() - start
        print(f"{len(found)} of {len(seeds)} programs differ ({seconds:.0f} s)")
        print(Counter(failure.differences[0].split()[0] for failure in found))
        for failure in found[: options.shrink]:
            print(f"\n{arena.shrunk(failure)}", flush=True)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
