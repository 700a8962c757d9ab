"""Real photographs all the way: folders, lists, enlarging, mean, training below the in-core peak."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from imagenet_cli import IMAGENET, assert_same_parameters, environment, parameters
from PIL import Image

WALLPAPERS = Path("/usr/share/backgrounds")
"""Where Debian's packages of wallpapers put photographs."""


def photographs(folder: Path) -> int:
    """Writes folders of photographs, a class each: two of scikit-learn's, and wallpapers.

    Of each photograph there are parts of several sizes, so that there is something to enlarge.

    Returns:
        The number of classes.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None:
        pytest.skip("scikit-learn is not installed")
    samples = Path(spec.origin).parent / "datasets" / "images"
    files = {"building": [samples / "china.jpg"], "flower": [samples / "flower.jpg"]}
    if wallpapers := sorted(WALLPAPERS.rglob("*.jpg"))[:8]:
        files["wallpaper"] = wallpapers
    for name, paths in files.items():
        (folder / name).mkdir(parents=True)
        for path in paths:
            with Image.open(path) as image:
                width, height = image.size
                for i, part in enumerate((1, 0.8, 0.65, 0.5)):
                    left, top = width * (1 - part) / 2, height * (1 - part) / 3
                    box = (left, top, left + width * part, top + height * part)
                    crop = image.convert("RGB").crop(tuple(map(int, box)))
                    crop.save(folder / name / f"{path.stem} {i}.jpg")
    return len(files)


def tool(python: str, *args: object, cwd: Path) -> str:
    done = subprocess.run(
        [python, *map(str, args)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(args: list[str], cwd: Path, timeout: float) -> int:
    """Runs train.py; returns the peak of its resident memory as the system counts it (bytes)."""
    log = cwd / "train.log"
    peak = 0
    with open(log, "wb") as f:
        process = subprocess.Popen(
            [sys.executable, str(IMAGENET / "train.py"), *args],
            cwd=cwd,
            env=environment(),
            stdout=f,
            stderr=f,
        )
    deadline = time.monotonic() + timeout
    while process.poll() is None:
        assert time.monotonic() < deadline or process.kill(), log.read_text()
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    peak = max(peak, int(line.split()[1]) << 10)
        time.sleep(0.02)
    assert process.returncode == 0, log.read_text()
    return peak


def run(
    python: str,
    folder: Path,
    size: int,
    insize: int,
    batchsize: int,
    iterations: int,
    fraction: float,
    timeout: float,
) -> None:
    """Goes all the way in core and out of core, with a limit of ``fraction`` of the in-core peak."""
    n = photographs(folder / "photos")
    tools = IMAGENET / "tools"
    tool(python, tools / "make_list.py", "photos", "-o", "lists", "--val", 0.25, cwd=folder)
    lists = [f"lists/{name}.txt" for name in ("train", "val")]
    listed = [len((folder / name).read_text().splitlines()) for name in lists]
    assert sum(listed) == len(list((folder / "photos").rglob("*.jpg")))
    assert min(listed) >= 2
    tool(python, tools / "enlarge.py", "photos", "large", "--size", f"{size}x{size}", cwd=folder)
    large = sorted((folder / "large").rglob("*.jpg"))
    assert len(large) == sum(listed)
    for path in large:
        with Image.open(path) as image:
            assert image.size == (size, size)
    tool(
        python, IMAGENET / "compute_mean.py", lists[0], "-R", "large", "-o", "mean.npy", cwd=folder
    )
    args = [*lists, "-R", "large", "-m", "mean.npy", "--nclasses", str(n), "-a", "googlenet"]
    args += ["-is", str(insize), "-B", str(batchsize), "-b", "1", "-i", str(iterations)]
    args += ["--gpu", "-1"]
    in_core = train([*args, "-o", "in"], folder, timeout)
    limit = int(fraction * in_core)
    out_of_core = train([*args, "-o", "out", "--ooc", "--ooc-limit", str(limit)], folder, timeout)
    summary = json.loads((folder / "out" / "summary.json").read_text())
    print(f"in core {in_core >> 20} MiB, limit {limit >> 20}, peak {out_of_core >> 20} MiB,",
          f"moved {(summary['bytes_out'] + summary['bytes_in']) >> 20} MiB")  # fmt: skip
    unsure = 8 << 20  # the kernel counts resident memory in batches of pages for each thread
    assert out_of_core < limit * 1.02 + unsure
    assert summary["peak_bytes"] == pytest.approx(out_of_core, abs=unsure)
    assert summary["bytes_in"] > 0
    assert_same_parameters(*(parameters(folder / out, iterations) for out in ("in", "out")))


@pytest.mark.slow
@pytest.mark.extension  # without it temporaries may pass the limit in the first iteration
def test_photographs_train_below_the_in_core_peak(python, tmp_path):
    run(
        python,
        tmp_path,
        size=256,
        insize=224,
        batchsize=5,
        iterations=1,
        fraction=0.75,
        timeout=200,
    )


@pytest.mark.exhaustive
def test_enlarged_photographs_at_2240_pixels_train_below_the_in_core_peak(python, tmp_path):
    run(
        python,
        tmp_path,
        size=2560,
        insize=2240,
        batchsize=1,
        iterations=2,
        fraction=0.6,
        timeout=3600,
    )
