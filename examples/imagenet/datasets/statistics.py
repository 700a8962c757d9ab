"""Means and standard deviations of a set's pixels, exact whatever the order they are added in.

The sums are float64 sums of integers: exact up to 2^53, that is the squares of 10^11 pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from errors import InputError
from files import whole_file, write_text
from parallel import in_parallel

from datasets.labeled import Source, Subset

SAVE_EVERY = 60.0
"""Seconds between two savings of the sums so far."""


@dataclass
class Statistics:
    """Sums over images.

    Attributes:
        n_images: Number of images.
        n_pixels: Number of their pixels.
        channel_sum: Of the values 0 to 255, float64 (3,).
        channel_squares: Sum of their squares, float64 (3,).
        image_sum: Sum of the images, float64 (height, width, 3); None if it is not wanted.
    """

    n_images: int
    n_pixels: int
    channel_sum: numpy.ndarray
    channel_squares: numpy.ndarray
    image_sum: numpy.ndarray | None

    @property
    def mean_image(self) -> numpy.ndarray:
        """The mean of the images, float32 (3, height, width), 0 to 255."""
        assert self.image_sum is not None
        return (self.image_sum / self.n_images).transpose(2, 0, 1).astype(numpy.float32)

    @property
    def mean(self) -> numpy.ndarray:
        """The mean of each channel, float64 (3,), 0 to 255."""
        return self.channel_sum / self.n_pixels

    @property
    def std(self) -> numpy.ndarray:
        """The standard deviation of each channel's pixels, float64 (3,), 0 to 255."""
        # n·Σx² - (Σx)² in integers: no difference of nearly equal rounded numbers
        n = self.n_pixels
        sums = zip(self.channel_sum, self.channel_squares, strict=True)
        variances = [(n * int(q) - int(s) ** 2) / n**2 for s, q in sums]
        return numpy.sqrt(numpy.array(variances))


def fingerprint(source: Source, *settings: Any) -> str:
    """Returns a digest of the names and labels of a set, and of what else its pixels depend on."""
    digest = hashlib.sha256(repr((len(source), settings)).encode())
    for i in range(len(source)):
        digest.update(os.fsencode(f"{source.name(i)}\0{source.label(i)}\n"))
    return digest.hexdigest()


def collect(
    source: Source,
    *,
    mean_image: bool = True,
    workers: int = 1,
    progress: Callable[..., Any] | None = None,
    resume: Path | None = None,
) -> Statistics:
    """Reads all images of a set.

    Args:
        source: The images.
        mean_image: Whether to add up the images, too, which then must have one size.
        workers: Number of threads.
        progress: Such as ``tqdm``; None shows nothing.
        resume: File that the sums so far are saved to once in a while, and continued from; it is
            removed at the end. None: no such file.

    Raises:
        InputError: An image cannot be read, its size differs from the first one's, or
            there are none.
    """
    if not len(source):
        raise InputError("the list has no images")
    key = fingerprint(source, mean_image)
    sums = Statistics(0, 0, numpy.zeros(3), numpy.zeros(3), None)
    if resume is not None:
        sums = _load(resume, key) or sums
    start = sums.n_images
    lock = threading.Lock()

    def add(i: int) -> None:
        image = source.image(i)
        flat = image.reshape(-1, 3)
        # 2^32 / 255^2 pixels fit into 32 bits; a row always does
        rows = image.astype(numpy.uint32)
        squares = (rows * rows).sum(axis=(0, 1), dtype=numpy.uint64)
        channel = flat.sum(axis=0, dtype=numpy.uint64)
        with lock:
            if mean_image:
                if sums.image_sum is None:
                    sums.image_sum = numpy.zeros(image.shape)
                elif sums.image_sum.shape != image.shape:
                    height, width = sums.image_sum.shape[:2]
                    raise InputError(
                        f"image {source.name(i)}: {image.shape[1]}x{image.shape[0]} pixels, but "
                        f"the first image has {width}x{height}; resize the images to one size "
                        f"(enlarge.py, --enlarge), or compute one value --per-channel"
                    )
                sums.image_sum += image
            sums.channel_sum += channel
            sums.channel_squares += squares
            sums.n_images += 1
            sums.n_pixels += len(flat)

    if start == 0:
        add(0)  # the first image of the list has the size that all must have
        start = 1
    saved = time.monotonic()
    todo = range(start, len(source))
    shown: Any = (
        progress(None, total=len(source), initial=start, unit="image") if progress else None
    )
    try:
        for block in (todo[i : i + 64 * workers] for i in range(0, len(todo), 64 * workers)):
            for _, error in in_parallel(add, block, workers):
                if isinstance(error, InputError):
                    raise error
                if shown is not None:
                    shown.update()
            # Between two blocks the sums are those of a beginning of the list.
            if resume is not None and time.monotonic() - saved > SAVE_EVERY:
                _save(resume, key, sums)
                saved = time.monotonic()
    finally:
        if shown is not None:
            shown.close()
    if resume is not None:
        resume.unlink(missing_ok=True)
    return sums


def _save(path: Path, key: str, sums: Statistics) -> None:
    with whole_file(path) as partial, open(partial, "wb") as f:
        image_sum = {} if sums.image_sum is None else {"image_sum": sums.image_sum}
        numpy.savez(
            f,
            key=numpy.array(key),
            counts=numpy.array([sums.n_images, sums.n_pixels]),
            channel_sum=sums.channel_sum,
            channel_squares=sums.channel_squares,
            **image_sum,
        )


def _load(path: Path, key: str) -> Statistics | None:
    """Returns the sums saved for the same set, or None."""
    try:
        with numpy.load(path, allow_pickle=False) as f:
            if str(f["key"]) != key:
                return None
            n_images, n_pixels = map(int, f["counts"])
            image_sum = f.get("image_sum")
            return Statistics(n_images, n_pixels, f["channel_sum"], f["channel_squares"], image_sum)
    except Exception:  # there are none, or they are damaged: they are added up anew
        return None


def channel_statistics(
    source: Source,
    *,
    n: int = 10_000,
    seed: int = 0,
    cache: Path | None = None,
    workers: int = 1,
    progress: Callable[..., Any] | None = None,
) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation of each channel, 0 to 1, of a sample of the images.

    The deviation is that of the pixels, not the mean of each image's own.

    Args:
        source: The images.
        n: Number of images to take at most, chosen by ``seed``.
        seed: Chooses them.
        cache: Folder to keep the result in, under a fingerprint of names, labels and of size
            and time of the files; None: nowhere.
        workers: Number of threads.
        progress: Such as ``tqdm``; None shows nothing.

    Raises:
        InputError: An image cannot be read.
    """
    chosen = numpy.arange(len(source))
    if len(source) > n:
        chosen = numpy.sort(numpy.random.default_rng(seed).choice(len(source), n, replace=False))
    sample = Subset(source, chosen)
    versions = [sample.version(i) for i in range(len(sample))]
    key = fingerprint(sample, versions, len(source))
    path = None if cache is None else cache / f"statistics-{key[:16]}.json"
    if path is not None:
        try:
            found = json.loads(path.read_text())
            if found["fingerprint"] == key:
                values = numpy.array([found["mean"], found["std"]])
                if values.shape == (2, 3) and (values >= 0).all() and (values <= 1).all():
                    return _usable(found["mean"], found["std"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # none yet, or damaged: it is made anew
    sums = collect(sample, mean_image=False, workers=workers, progress=progress)
    mean, std = (sums.mean / 255).tolist(), (sums.std / 255).tolist()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"fingerprint": key, "images": len(sample), "mean": mean, "std": std}
        write_text(path, json.dumps(found) + "\n")
    return _usable(mean, std)


def _usable(mean: list[float], std: list[float]) -> tuple[list[float], list[float]]:
    if not all(std):
        channel = ("red", "green", "blue")[std.index(0)]
        raise InputError(
            f"normalization data: {channel} is the same in all pixels of the training images, so it "
            f"has no deviation to divide by; use --normalization published"
        )
    return mean, std


def save_mean(path: Path, mean: numpy.ndarray) -> None:
    """Writes ``mean`` to exactly ``path``, which appears only when it is complete."""
    with whole_file(path) as partial, open(partial, "wb") as f:
        numpy.save(f, mean)
