"""A small set of real image files, and the command that runs the trainer as a user does."""

import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
from PIL import Image

IMAGENET = Path(__file__).parents[2] / "examples" / "imagenet"


def find_mpiexec() -> str | None:
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")


class Lists(NamedTuple):
    root: Path
    train: Path
    val: Path
    mean: Path

    @property
    def args(self) -> list[str]:
        return [str(self.train), str(self.val), "-R", str(self.root), "-m", str(self.mean)]


def write_lists(root: Path, n_train: int = 20, n_val: int = 6, size: int = 45) -> Lists:
    """Writes JPEG files of a gradient in one of three colours each, lists and the mean file."""
    rng = numpy.random.default_rng(0)
    lists = Lists(root, root / "train.txt", root / "val.txt", root / "mean.npy")
    ramp = numpy.linspace(0, 200, size)[:, None, None]
    total = numpy.zeros((size, size, 3))
    for name, n in (("train", n_train), ("val", n_val)):
        lines = []
        for i in range(n):
            colour = numpy.zeros(3)
            colour[i % 3] = 1
            pixels = ramp * colour + rng.integers(0, 55, (size, size, 3))
            Image.fromarray(pixels.astype(numpy.uint8)).save(root / f"{name} {i}.jpg")
            lines.append(f"{name} {i}.jpg {i % 3}\n")
            total += pixels
        (root / f"{name}.txt").write_text("".join(lines))
    numpy.save(lists.mean, (total / (n_train + n_val)).transpose(2, 0, 1).astype(numpy.float32))
    return lists


def command(
    args: list[str],
    ranks: int = 1,
    script: Path = IMAGENET / "train.py",
    python: str = sys.executable,
) -> list[str]:
    launch: list[str] = []
    if ranks > 1:
        mpiexec = find_mpiexec()
        pytest.importorskip("mpi4py")
        if mpiexec is None:
            pytest.skip("no mpiexec")
        launch = [mpiexec, "-n", str(ranks)]
    return [*launch, python, str(script), *args]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(IMAGENET.parents[1]), os.environ.get("PYTHONPATH")]))
    # One thread: the number of threads is part of what makes results equal bit for bit.
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


TINY = ["-a", "nin", "-is", "39", "-B", "4", "-b", "4"]
"""The smallest network and input: fractions of a second per iteration."""


def parameters(out: Path, iteration: int) -> dict[str, numpy.ndarray]:
    with numpy.load(out / f"model_iter_{iteration}") as f:
        return {name: f[name] for name in f.files}


def assert_same_parameters(a: dict[str, numpy.ndarray], b: dict[str, numpy.ndarray]) -> None:
    assert a.keys() == b.keys()
    assert a
    for name in a:
        numpy.testing.assert_array_equal(
            a[name].view(numpy.uint32) if a[name].dtype == numpy.float32 else a[name],
            b[name].view(numpy.uint32) if b[name].dtype == numpy.float32 else b[name],
            err_msg=name,
        )
