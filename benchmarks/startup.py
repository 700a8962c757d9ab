"""What the import hook costs a process that never imports Chainer, and one that does.

    python benchmarks/startup.py [--repeat 30]

The least of many starts, taking turns, without the site packages' ``.pth`` files (``-S``): only the hook differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from training import ROOT, machine, print_table

CASES = {"plain": "pass", "with the hook": "import _chainer_ooc_startup"}


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=30)
    options = parser.parse_args()
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    best = dict.fromkeys(CASES, float("inf"))
    for _ in range(options.repeat):
        for name, code in CASES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-S", "-c", code], env=environment, check=True)
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    print("machine:", machine())
    print_table(["start of Python", "ms"], [[name, f"{ms:.1f}"] for name, ms in best.items()])


if __name__ == "__main__":
    main()
