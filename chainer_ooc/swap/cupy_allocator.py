"""A hook around CuPy's allocator: it makes room before an allocation, and again after a failed one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

from chainer_ooc import errors
from chainer_ooc.swap.devices.cuda import arenas
from chainer_ooc.swap.devices.cuda.arenas import ArenaPool
from chainer_ooc.swap.devices.protocol import PooledDevice
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.wording import repr_of, warn_user

__all__ = ["CupyAllocator", "out_of_memory_class"]

#: Smaller allocations (bytes) get room only after they fail.
SMALL = 64 << 10


class CupyAllocator:
    """Replace the allocator in force by ``cupy.cuda.set_allocator``, and make room for allocations.

    In the place of CuPy's default pool come page arenas, where the driver has what they need. Any other allocator is
    wrapped.

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
        self._stock: Any = None  # the wrapped or replaced allocator
        self._installed = False
        self._arenas: ArenaPool | None = None  # once they have been in use
        self._uses_arenas = False

    def install(self) -> None:
        """Replace CuPy's allocator by this one, unless that is done.

        Raises:
            SettingError: Inside ``cupy.cuda.using_allocator``, where CuPy's allocator cannot be changed.
        """
        cuda = self._cupy.cuda
        allocator = cuda.get_allocator()
        if self._is_ours(allocator):
            return
        before, self._stock = self._stock, allocator
        try:
            cuda.set_allocator(self._replacement(allocator))
        except ValueError as error:
            self._stock = before
            if not self._installed:
                raise errors.SettingError(
                    "out-of-core mode cannot be turned on inside cupy.cuda.using_allocator(), where CuPy's "
                    "allocator cannot be changed: turn it on before, or use cupy.cuda.set_allocator()"
                ) from error
            return  # other threads have it already, and this one afterwards
        self._installed = True
        self._uses_arenas = cuda.get_allocator() is not self
        if self._uses_arenas:
            assert self._arenas is not None
            self._arenas.open()
        elif not self._has_pool():
            warn_user(
                f"CuPy allocates with {repr_of(allocator)}, which is not of a cupy.cuda.MemoryPool: the limit cannot "
                "be held, and of arrays whose memory is not CuPy's nothing is moved out; call "
                "cupy.cuda.set_allocator(cupy.cuda.MemoryPool().malloc) first"
            )

    def uninstall(self) -> None:
        """Restore the allocator that was in force before, unless other code has set another since."""
        if self._is_ours(self._cupy.cuda.get_allocator()):
            self._cupy.cuda.set_allocator(self._stock)
            self._installed = False
            if self._uses_arenas and self._arenas is not None:
                self._arenas.close()

    def pool(self) -> Any:
        """Return the memory pool of the allocator: the arenas', or the wrapped one's, or else CuPy's default pool."""
        if self._uses_arenas:
            return self._arenas
        return self._stock.__self__ if self._has_pool() else self._cupy.get_default_memory_pool()

    @property
    def arenas(self) -> ArenaPool | None:
        """The page arenas, if they are in use."""
        return self._arenas if self._uses_arenas else None

    def _has_pool(self) -> bool:
        cuda = self._cupy.cuda
        pools = cuda.MemoryPool, getattr(cuda, "MemoryAsyncPool", cuda.MemoryPool)
        return isinstance(getattr(self._stock, "__self__", None), pools)

    def _is_ours(self, allocator: Any) -> bool:
        return allocator is self or (
            self._arenas is not None and allocator is self._arenas.allocator
        )

    def _replacement(self, allocator: Any) -> Any:
        """Return what an allocator is replaced by: an arena's in the place of CuPy's default pool, else this one."""
        if getattr(allocator, "__self__", None) is not self._cupy.get_default_memory_pool():
            return self
        if self._arenas is None:
            why = arenas.why_no_arenas(self._cupy)
            if why is None:
                self._arenas = ArenaPool(
                    self._cupy, self._before, self._refused, self._order, self, SMALL
                )
            elif why:
                arenas.warn(why)
        return self if self._arenas is None else self._arenas.allocator

    # What the arenas' allocator calls.

    def _before(self, device_id: int, nbytes: int) -> bool:
        """Make room for an allocation on the current GPU, and say up to where the next ones need none.

        Raises:
            SwapSpaceError: If there is no space outside of memory.
        """
        assert self._arenas is not None
        manager = self._manager_of(device_id)
        if manager is None:
            self._arenas.grant_all(device_id)
            return True
        device = cast(PooledDevice, manager.device)
        device.note_allocation()
        if not manager.busy:
            used = device.used_bytes()
            if nbytes >= SMALL and used + nbytes > manager.budget.high:
                manager.make_room(nbytes)
                used = device.used_bytes()
            self._note(manager.usage_without_offload(used + nbytes))
            self._arenas.set_level(device_id, manager.granted_bytes(), manager.moved_bytes())
        return True

    def _refused(self, device_id: int, nbytes: int) -> bool:
        """Free memory for an allocation that found none. Return whether to try again.

        Raises:
            OutOfMemoryError: If there is nothing to free. It is also CuPy's error.
            SwapSpaceError: If there is no space outside of memory.
        """
        assert self._arenas is not None
        manager = self._manager_of(device_id)
        is_asked = manager is not None and not manager.busy
        if manager is not None and is_asked and manager.reclaim(self._arenas.missing_bytes()):
            self._arenas.set_level(device_id, manager.granted_bytes(), manager.moved_bytes())
            return True
        if manager is not None and manager.busy:  # it evicts by itself
            raise self._cupy.cuda.memory.OutOfMemoryError(nbytes, self._arenas.total_bytes())
        if self._arenas.collect():
            return True
        if manager is None:
            raise self._cupy.cuda.memory.OutOfMemoryError(nbytes, self._arenas.total_bytes())
        raise out_of_memory_class(self._cupy)(manager.explain_shortage(nbytes, self._describe()))

    def _order(self, device_id: int, streams: Sequence[int] | None) -> bool:
        """Put the current stream's later work after that of others. Return whether that was possible.

        Raises:
            OutOfMemoryError: While a CUDA graph is captured: nobody may wait for the GPU either.
        """
        manager = self._manager_of(device_id)
        if manager is None:
            return False
        if not manager.device.may_move():
            raise out_of_memory_class(self._cupy)(
                "memory that other streams have freed cannot be taken while a CUDA graph is captured: run what is "
                "captured once before, on the same stream, or raise the limit"
            )
        device = cast(PooledDevice, manager.device)
        return streams is not None and device.order_streams(streams)

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
