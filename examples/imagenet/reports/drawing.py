"""Draws a run's pictures in a process of their own: what that takes is no memory of the rank's, which has a limit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this folder

import launcher

if TYPE_CHECKING:
    from reports.history import History


def draw(
    history: History,
    out: Path,
    limit_bytes: int | None = None,
    in_core_peak_bytes: int | None = None,
    draws_all: bool = True,
) -> list[Path]:
    """Draws the plots and the confusion matrices of a run.

    Args:
        history: The history.
        out: Folder of the pictures.
        limit_bytes: Memory limit of a rank, for memory.png.
        in_core_peak_bytes: Peak of an in-core step, for memory.png.
        draws_all: Whether to draw the confusion matrices.

    Returns:
        The plots, and the picture of the last matrix.
    """
    request = {
        "train": history.train,
        "validation": history.validation,
        "out": str(out),
        "limit_bytes": limit_bytes,
        "in_core_peak_bytes": in_core_peak_bytes,
        "draws_all": draws_all,
    }
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(request),
        env=launcher.without_mpi(),
        capture_output=True,
        text=True,
        start_new_session=True,  # signals that end the run are the trainer's to handle
    )
    if done.returncode:
        raise RuntimeError(f"drawing failed with status {done.returncode}\n{done.stderr[-2000:]}")
    *warnings, paths = done.stdout.splitlines()
    for warning in warnings:
        print(warning, flush=True)
    return [Path(path) for path in json.loads(paths)]


def _main() -> None:
    import chainer_ooc  # noqa: F401  first: it makes stock Chainer importable

    # isort: split

    from errors import InputError

    from reports.confusion import draw_confusions
    from reports.history import History
    from reports.plots import write_plots

    request = json.load(sys.stdin)
    history, out = History(), Path(request["out"])
    history.train, history.validation = request["train"], request["validation"]
    paths = write_plots(history, out, request["limit_bytes"], request["in_core_peak_bytes"])
    if request["draws_all"]:
        try:
            paths += draw_confusions(out)
        except InputError as e:  # what is in a file of an earlier run costs no report
            print(f"warning: {e}")
    print(json.dumps([str(path) for path in paths]))


if __name__ == "__main__":
    _main()
