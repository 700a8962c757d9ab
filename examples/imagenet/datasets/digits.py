"""Real handwritten digits as JPEG files, for runs without any other data.

scikit-learn ships 1,797 digits of 8x8 pixels (from the UCI "Optical Recognition of Handwritten
Digits" data). They are enlarged and written once, with list files and a mean file, so that
training on them takes the same way through files as training on ImageNet.
"""

from __future__ import annotations

import gzip
import importlib.util
import secrets
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
from errors import InputError
from PIL import Image

from datasets.labeled import LabeledImages, read_list
from datasets.statistics import collect, save_mean

N_CLASSES = 10
N_VALIDATION = 360


def image_size(insize: int) -> int:
    """Returns the side of the JPEG files for crops of ``insize``: 256 pixels for 224."""
    return -(-insize * 8 // 7)


def load_digits() -> tuple[numpy.ndarray, numpy.ndarray]:
    """Returns the digits, uint8 (1797, 8, 8) from 0 (paper) to 255 (ink), and labels, (1797,).

    The file is read directly: importing scikit-learn would cost this process about 100 MiB, which
    would count in every memory figure of the run.

    Raises:
        InputError: scikit-learn is not installed.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise InputError(
            "no list files given, and the bundled digits need scikit-learn; "
            "run `pip install scikit-learn` or give TRAIN and VAL list files"
        )
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt") as f:
        table = numpy.loadtxt(f, delimiter=",", dtype=numpy.int16)
    images = (table[:, :64] * 255 // 16).astype(numpy.uint8).reshape(-1, 8, 8)
    return images, table[:, 64]


def write_digits(folder: Path, size: int, progress: Any = None) -> None:
    """Writes ``folder`` with JPEG files of ``size`` x ``size`` pixels, unless it is there already.

    The folder holds ``train.txt``, ``val.txt``, ``mean.npy`` and the images; it appears under its
    name only when it is complete.

    Args:
        folder: The folder to make.
        size: Side of the images in pixels.
        progress: Wraps an iterable to show progress, such as ``tqdm``; None shows nothing.
    """
    if folder.exists():
        return
    images, labels = load_digits()
    order = numpy.random.default_rng(0).permutation(len(images))
    parts = {"val": order[:N_VALIDATION], "train": order[N_VALIDATION:]}
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    partial.mkdir()
    try:
        for name, indices in parts.items():
            (partial / name).mkdir()
            lines = []
            shown: Iterable[int] = indices
            if progress is not None:
                shown = progress(
                    indices, desc=f"writing {name} digits", unit="image", file=sys.stdout
                )
            for i in shown:
                file = f"{name}/{i:04d}.jpg"
                image = Image.fromarray(images[i]).resize((size, size), Image.Resampling.BICUBIC)
                image.convert("RGB").save(partial / file, quality=95)
                lines.append(f"{file} {labels[i]}\n")
            (partial / f"{name}.txt").write_text("".join(lines))
        train = LabeledImages(read_list(partial / "train.txt", N_CLASSES), partial)
        save_mean(partial / "mean.npy", collect(train).mean_image)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another run wrote the same files first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
