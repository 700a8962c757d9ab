"""Draws the plots of a result, of a run that was killed or is still running, too.

    python examples/imagenet/reports result

They show what its latest snapshot knows, and replace those that are there.
"""

import sys
from pathlib import Path

# In place of this folder, which Python puts there.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import chainer_ooc  # noqa: E402, F401  first: it makes stock Chainer importable

# isort: split

from errors import InputError  # noqa: E402

from reports.plots import load_history, write_plots  # noqa: E402


def main(argv: list[str]) -> int:
    """Draws the plots; returns the exit status (2: an input cannot be used)."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python examples/imagenet/reports RESULT", file=sys.stderr)
        return 0 if argv in (["-h"], ["--help"]) else 2
    try:
        for path in write_plots(load_history(Path(argv[0])), Path(argv[0])):
            print(path)
    except InputError as e:
        print(f"reports: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
