"""CuPy's allocator with room made before it fails, and again after."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from chainer_ooc import errors
from chainer_ooc.swap.manager import SwapManager

__all__ = ["CupyAllocator", "out_of_memory_class"]

#: For allocations smaller than this (bytes) room is made only if they fail.
SMALL = 64 << 10


class CupyAllocator:
    """An allocator for ``cupy.cuda.set_allocator``: the one that it was before, and room made for it.

    Args:
        cupy: CuPy, or what simulates it.
        manager_of: Returns the manager of a GPU, ``None`` if memory is not managed there now.
        describe: Names what runs now, for errors.
        note: Called with the bytes in use after an allocation.
    """

    def __init__(
        self,
        cupy: Any,
        manager_of: Callable[[int], SwapManager | None],
        describe: Callable[[], str],
        note: Callable[[int], None],
    ) -> None:
        self._cupy = cupy
        self._manager_of = manager_of
        self._describe = describe
        self._note = note
        self._stock: Any = None

    def install(self) -> None:
        """Put it in the place of the allocator there is, if it is not there yet."""
        allocator = self._cupy.cuda.get_allocator()
        if allocator is not self:
            self._stock = allocator
            self._cupy.cuda.set_allocator(self)

    def uninstall(self) -> None:
        """Put back the allocator that was there before, unless somebody has set another since."""
        if self._cupy.cuda.get_allocator() is self:
            self._cupy.cuda.set_allocator(self._stock)

    def __call__(self, nbytes: int) -> Any:
        """Allocate memory on the current GPU.

        Raises:
            OutOfMemoryError: If it does not fit when all has been moved out that can be; also CuPy's own.
            SwapSpaceError: If what would have to be moved out has no space outside.
        """
        manager = self._manager_of(self._cupy.cuda.runtime.getDevice())
        if manager is None or manager.busy:
            return self._stock(nbytes)
        device: Any = manager.device
        if nbytes >= SMALL and device.used_bytes() + nbytes > manager.marks.high:
            manager.make_room(nbytes)
        try:
            memory = self._stock(nbytes)
        except MemoryError as error:
            memory = self._reclaim(manager, nbytes, error)
        device.note_allocation()
        if nbytes >= SMALL:
            self._note(device.used_bytes())
        return memory

    def _reclaim(self, manager: SwapManager, nbytes: int, error: MemoryError) -> Any:
        # What is free may be in pieces, or on another stream's list: more is given up until it fits.
        freed = 1
        while freed:
            freed = manager.reclaim(nbytes)
            with contextlib.suppress(MemoryError):
                return self._stock(nbytes)
        message = manager.explain_shortage(nbytes, self._describe())
        try:
            raise out_of_memory_class(self._cupy)(message) from error
        finally:
            del error  # it would hold this frame, and so those of its callers with their arrays


@functools.cache
def out_of_memory_class(cupy: Any) -> type[errors.OutOfMemoryError]:
    """Return the class that is both :class:`chainer_ooc.errors.OutOfMemoryError` and CuPy's."""

    class OutOfMemoryError(errors.OutOfMemoryError, cupy.cuda.memory.OutOfMemoryError):
        """The GPU's memory does not hold what must be there at one time."""

        def __init__(self, message: str) -> None:
            Exception.__init__(self, message)

        def __reduce__(self) -> tuple[Any, ...]:
            return errors.OutOfMemoryError, self.args

    return OutOfMemoryError
