"""A rank's images decoded into memory once, for training sets that fit there."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.sharedctypes import RawArray
from typing import Any, TypeVar

import numpy
import psutil
from errors import InputError
from parallel import in_parallel

from datasets.decoding import Need, Size
from datasets.labeled import Source

Result = TypeVar("Result")


def _results(function: Callable[[int], Result], n: int, workers: int) -> Iterator[Result]:
    """Yields the result of each index; an error ends it at once, and not after all the others."""
    for _, result in in_parallel(function, range(n), workers):
        if isinstance(result, InputError):
            raise result
        yield result


class InMemory:
    """The decoded images of a source; augmentation stays as random as without.

    They are in memory that loader processes share: each gets a reference, not a copy.

    Args:
        source: The images.
        workers: Number of threads that decode.
        progress: Wraps an iterable to show progress, such as ``tqdm``; None shows nothing.
        ranks: Number of ranks on this machine, which share its memory.

    Raises:
        InputError: An image cannot be decoded, or there is not enough memory.
    """

    def __init__(
        self, source: Source, workers: int = 1, progress: Any = None, ranks: int = 1
    ) -> None:
        n = len(source)
        self._labels = numpy.array([source.label(i) for i in range(n)], dtype=numpy.int32)
        self._names = [source.name(i) for i in range(n)]
        workers = max(workers, 1)
        shapes = [(h, w, 3) for w, h in _results(source.image_size, n, workers)]
        self._shapes = numpy.array(shapes, dtype=numpy.int64).reshape(-1, 3)
        self._starts = numpy.cumsum([0, *self._shapes.prod(axis=1)], dtype=numpy.int64)
        total = int(self._starts[-1])
        available = psutil.virtual_memory().available // ranks
        if total > available:
            raise InputError(
                f"loadtype custom: the {n} images of this rank take {total / 2**30:.1f} GiB "
                f"decoded, and {available / 2**30:.1f} GiB of memory are free for it; use loadtype "
                f"original, more ranks, or smaller images"
            )
        self._memory = RawArray(ctypes.c_uint8, max(total, 1))
        loaded: Any = _results(lambda i: self._load(source, i), n, workers)
        if progress is not None:
            loaded = progress(loaded, total=n, desc="decoding into memory", unit="image")
        for _ in loaded:
            pass

    def _load(self, source: Source, i: int) -> None:
        self._view(i)[:] = source.image(i)

    def _view(self, i: int) -> numpy.ndarray:
        memory = numpy.frombuffer(self._memory, dtype=numpy.uint8)
        return memory[self._starts[i] : self._starts[i + 1]].reshape(self._shapes[i])

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, i: int) -> str:
        """Returns what errors call the ``i``-th image."""
        return self._names[i]

    def label(self, i: int) -> int:
        """Returns the class of the ``i``-th image."""
        return int(self._labels[i])

    def version(self, i: int) -> tuple[int, ...]:
        """Returns numbers that change when the ``i``-th image does: a checksum."""
        return (zlib.crc32(self._view(i)),)

    def image_size(self, i: int) -> Size:
        """Returns the width and height of the ``i``-th image."""
        return int(self._shapes[i][1]), int(self._shapes[i][0])

    def image(self, i: int, need: Need | None = None) -> numpy.ndarray:
        """Returns the ``i``-th image, uint8 (height, width, 3), read-only."""
        view = self._view(i)
        view.flags.writeable = False
        return view
