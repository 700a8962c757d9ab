"""Measure in a second or two how fast this machine does NumPy's work for Chainer."""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import os
import tempfile
import time
from collections.abc import Callable

import numpy as np

from chainer_ooc.estimating.ledger import Segment

__all__ = ["CpuRates", "calibrate", "disk_rates"]

#: The smallest dimension of the products that are measured.
_GEMM_SIZES = (1, 8, 64, 512)


@dataclasses.dataclass(frozen=True)
class CpuRates:
    """The measured rates of this machine.

    Attributes:
        gemm: Floating-point operations per second (float32) of products whose smallest dimension is 1, 8, 64, 512.
        copy: Bytes per second, read and written, of copies of rows as im2col makes them.
        gather: Bytes per second, read and written, of copies that transpose.
        simple: Bytes per second, read and written, of sums, products and comparisons.
        reduce: Bytes per second of sums over an axis.
        fill: Bytes per second of filling memory.
        fresh: Bytes per second of new pages from the system.
        heavy: Elements per second of exp and its like.
        random: Elements per second of random numbers.
        index: Elements per second of take and add.at.
        call_seconds: The seconds of one NumPy call on nothing.
        function_seconds: The seconds of one Chainer function, forward or backward, without NumPy's work.
    """

    gemm: tuple[float, ...]
    copy: float
    gather: float
    simple: float
    reduce: float
    fill: float
    fresh: float
    heavy: float
    random: float
    index: float
    call_seconds: float = 1.5e-6
    function_seconds: float = 60e-6

    def seconds(self, segment: Segment) -> float:
        """Return the estimated time of a segment (seconds)."""
        total = self.function_seconds if segment.name else 0.0
        for kind, amount in segment.work.items():
            total += amount * self.call_seconds if kind == "calls" else amount / getattr(self, kind)
        for (m, n, k, itemsize), count in segment.gemms.items():
            rate = self._gemm_rate(min(m, n, k)) * 4 / max(itemsize, 4)
            total += count * 2.0 * m * n * k / rate
        return total

    def _gemm_rate(self, smallest: int) -> float:
        return float(
            np.interp(math.log(max(smallest, 1)), [math.log(n) for n in _GEMM_SIZES], self.gemm)
        )


@functools.cache
def calibrate() -> CpuRates:
    """Measure this machine, once per process. It takes a second or two."""
    # Larger than the caches, like a network's arrays.
    a = np.full((1 << 22,), 1.5, np.float32)
    b, c = a.copy(), a.copy()
    image = np.full((4, 32, 58, 58), 0.5, np.float32)
    columns = np.empty((4, 32, 3, 3, 56, 56), np.float32)

    def rows() -> None:
        for j in range(3):
            for i in range(3):
                columns[:, :, j, i] = image[:, :, j : j + 56, i : i + 56]

    grid = a.reshape(16, 256, 32, 32)
    ids = np.arange(1 << 16) % 1000
    touched = 32 << 20

    def fresh() -> None:
        np.full(touched // 4, 1.0, np.float32)

    old = np.empty(touched // 4, np.float32)
    old.fill(0)
    fill = _best(lambda: old.fill(1.0))
    new_pages = max(_best(fresh) - fill, 1e-3)
    return CpuRates(
        gemm=tuple(_gemm(size) for size in _GEMM_SIZES),
        copy=2 * columns.nbytes / _best(rows),
        gather=2 * columns.nbytes / _best(lambda: columns.transpose(0, 4, 5, 1, 2, 3).reshape(-1)),
        simple=3 * a.nbytes / _best(lambda: np.multiply(a, b, out=c)),
        reduce=a.nbytes / _best(lambda: grid.sum(axis=(0, 2, 3))),
        fill=touched / fill,
        fresh=touched / new_pages,
        heavy=a.size / _best(lambda: np.exp(a, out=c)),
        random=(1 << 18) / _best(lambda: np.random.default_rng(0).random(1 << 18)),
        index=ids.size / _best(lambda: np.add.at(c, ids, a[: ids.size])),
    )


def _gemm(smallest: int) -> float:
    wide = 4096 if smallest < 512 else 512
    left = np.full((wide, smallest), 0.5, np.float32)
    right = np.full((smallest, 64 if smallest < 512 else 512), 0.5, np.float32)
    return 2.0 * left.size * right.shape[1] / _best(lambda: left @ right)


def _best(call: Callable[[], object], repeat: int = 4) -> float:
    """Return the least time of a few calls (seconds)."""
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


@functools.cache
def disk_rates(directory: str | None = None, nbytes: int = 64 << 20) -> tuple[float, float]:
    """Measure direct writes and reads (bytes per second) in the directory of the swap file."""
    piece = 16 << 20
    memory = mmap.mmap(-1, piece)
    handle, path = tempfile.mkstemp(dir=directory)
    os.close(handle)
    try:
        try:
            fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError:  # tmpfs
            fd = os.open(path, os.O_RDWR)
    finally:
        os.unlink(path)
    try:
        rates = []
        for write in (True, False):
            start = time.perf_counter()
            for offset in range(0, nbytes, piece):
                os.pwrite(fd, memory, offset) if write else os.preadv(fd, [memory], offset)
            rates.append(nbytes / max(time.perf_counter() - start, 1e-9))
        return rates[0], rates[1]
    finally:
        os.close(fd)
