"""A hook around CuPy's allocator: it makes room before an allocation, and again after a failed one."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

from chainer_ooc import errors
from chainer_ooc.swap.devices.protocol import PooledDevice
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.wording import repr_of

__all__ = ["CupyAllocator", "out_of_memory_class"]

#: Smaller allocations (bytes) get room only after they fail.
SMALL = 64 << 10


class CupyAllocator:
    """Wrap the allocator in force, for ``cupy.cuda.set_allocator``, and make room for allocations.

    Args:
        cupy: CuPy, or a double of it.
        manager_of: Returns the manager of a GPU, ``None`` if its memory is not managed now.
        describe: Returns the name of the running function, for errors.
        note: Called after an allocation with the bytes that would be in use if nothing had moved.
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
        self._stock: Any = None  # the wrapped allocator
        self._installed = False

    def install(self) -> None:
        """Replace CuPy's allocator by this one, unless that is done.

        Raises:
            SettingError: Inside ``cupy.cuda.using_allocator``, where CuPy's allocator cannot be changed.
        """
        cuda = self._cupy.cuda
        allocator = cuda.get_allocator()
        if allocator is self:
            return
        before, self._stock = self._stock, allocator
        try:
            cuda.set_allocator(self)
        except ValueError as error:
            self._stock = before
            if not self._installed:
                raise errors.SettingError(
                    "out-of-core mode cannot be turned on inside cupy.cuda.using_allocator(), where CuPy's "
                    "allocator cannot be changed: turn it on before, or use cupy.cuda.set_allocator()"
                ) from error
            return  # other threads have it already, and this one afterwards
        self._installed = True
        if not self._has_pool():
            warnings.warn(
                f"CuPy allocates with {repr_of(allocator)}, which is not of a cupy.cuda.MemoryPool: the limit cannot "
                "be held, and of arrays whose memory is not CuPy's nothing is moved out; call "
                "cupy.cuda.set_allocator(cupy.cuda.MemoryPool().malloc) first",
                RuntimeWarning,
                stacklevel=2,
            )

    def uninstall(self) -> None:
        """Restore the allocator that was in force before, unless other code has set another since."""
        if self._cupy.cuda.get_allocator() is self:
            self._cupy.cuda.set_allocator(self._stock)
            self._installed = False

    def pool(self) -> Any:
        """Return the memory pool of the wrapped allocator; without one, CuPy's default pool."""
        return self._stock.__self__ if self._has_pool() else self._cupy.get_default_memory_pool()

    def _has_pool(self) -> bool:
        return isinstance(getattr(self._stock, "__self__", None), self._cupy.cuda.MemoryPool)

    def __call__(self, nbytes: int) -> Any:
        """Allocate memory on the current GPU.

        Raises:
            OutOfMemoryError: If the memory does not fit after everything movable has moved out. It is also
                CuPy's error.
            SwapSpaceError: If there is no space outside of memory.
        """
        manager = self._manager_of(self._cupy.cuda.runtime.getDevice())
        if manager is None or manager.busy:
            return self._stock(nbytes)
        device = cast(PooledDevice, manager.device)  # Gpus makes managers of such devices only
        # taken_bytes() first: it is free of cost in CuPy 13, used_bytes() is not.
        short = nbytes >= SMALL and device.taken_bytes() + nbytes > manager.budget.low
        if short and device.used_bytes() + nbytes > manager.budget.high:
            manager.make_room(nbytes)
        try:
            memory = self._stock(nbytes)
        except MemoryError as error:
            memory = self._reclaim(manager, nbytes, error)
        device.note_allocation()
        if short:
            self._note(manager.usage_without_offload(device.used_bytes()))
        return memory

    def _reclaim(self, manager: SwapManager, nbytes: int, error: MemoryError) -> Any:
        # Free memory may be fragmented, or on another stream's list: evict more until it fits.
        freed = 1
        while freed:
            freed = manager.reclaim(nbytes)
            with contextlib.suppress(MemoryError):
                return self._stock(nbytes)
        message = manager.explain_shortage(nbytes, self._describe())
        try:
            raise out_of_memory_class(self._cupy)(message) from error
        finally:
            del error  # else it refers to this frame, and so to the callers' arrays


@functools.cache
def out_of_memory_class(cupy: Any) -> type[errors.OutOfMemoryError]:
    """Return a class that is both :class:`chainer_ooc.errors.OutOfMemoryError` and CuPy's."""

    class OutOfMemoryError(errors.OutOfMemoryError, cupy.cuda.memory.OutOfMemoryError):
        """The arrays that must be in memory at one time do not fit into the GPU's memory."""

        __init__ = Exception.__init__  # CuPy's takes sizes

        def __reduce__(self) -> tuple[Any, ...]:
            return errors.OutOfMemoryError, self.args

    return OutOfMemoryError
