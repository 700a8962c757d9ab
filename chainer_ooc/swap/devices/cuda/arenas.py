"""Page arenas in the place of CuPy's default pool: one for each GPU, behind the interface of a pool."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

from chainer_ooc import wording
from chainer_ooc.swap.devices.cuda.streams import is_captured
from chainer_ooc.swap.devices.ram import native

__all__ = ["ArenaPool", "warn", "why_no_arenas"]

#: Address space of an arena, as a multiple of the GPU's memory: gaps that nothing is mapped to take some.
_SPACE = 4
#: What is free in pages that are partly in use cannot be used elsewhere: so much more than the limit may be taken
#: before arrays are moved out for that (a share of the limit, and bytes at least).
_TORN, _LEAST_TORN = 0.029, 8 << 20
_UNLIMITED = (1 << 62) - 1
#: The C functions of CuPy that return the current stream.
_SIGNATURES = ("intptr_t (void)", "size_t (void)")


def warn(why: str) -> None:
    """Warn that CuPy's pool serves."""
    wording.warn(f"GPU memory comes from CuPy's pool, which may run out below the limit: {why}")


def why_no_arenas(cupy: Any) -> str | None:
    """Return why CuPy cannot allocate from page arenas here; ``None`` if it can, ``""`` if all has been said."""
    if native.allocator is None or not hasattr(cupy.cuda, "CFunctionAllocator"):
        return ""
    if _current_stream() is None:
        return "this CuPy does not tell the current stream to C"
    for device in range(cupy.cuda.runtime.getDeviceCount()):
        problem: str | None = native.allocator.why_no_arena(device)
        if problem is not None:
            return problem
    return None


def _current_stream() -> Any:
    """Return the capsule of CuPy's C function that returns the current stream; ``None`` if there is none."""
    try:
        from cupy_backends.cuda import stream
    except ImportError:
        return None
    capsule = getattr(stream, "__pyx_capi__", {}).get("get_current_stream_ptr")
    return capsule if any(f'"{one}"' in repr(capsule) for one in _SIGNATURES) else None


class ArenaPool:
    """The memory of all GPUs in page arenas, beside what CuPy's default pool still holds.

    As with CuPy's pools, its methods are about the current GPU. Arrays that were made before this pool was in use stay
    where they are, in CuPy's default pool. Their memory counts as used, and so does what that pool cannot give back.

    Args:
        cupy: CuPy, or a double of it.
        before: Called with a GPU's number and the size of an allocation that may need room. It calls :meth:`set_level`.
        refused: Called with the same when there is no memory. Returns whether to try again; or raises.
        order: Called with a GPU's number and the streams that own free memory. Returns whether the current stream's
            later work comes after the earlier work of those.
        otherwise: The allocator of GPUs that can have no arena.
        announced: The size (bytes) from which on ``before`` is called.

    Attributes:
        allocator: What ``cupy.cuda.set_allocator`` is given.
    """

    def __init__(
        self,
        cupy: Any,
        before: Callable[[int, int], object],
        refused: Callable[[int, int], bool],
        order: Callable[[int, list[int]], bool],
        otherwise: Callable[[int], Any],
        announced: int,
    ) -> None:
        self._cupy = cupy
        self._default = cupy.get_default_memory_pool()
        self._arenas: dict[int, Any] = native.allocator.arenas()  # they are for ever
        self._limits: dict[int, tuple[int, int]] = {}  # by GPU: the limit, and what is outside
        self._without: set[int] = set()  # GPUs that CuPy's pool serves
        self._configure = functools.partial(
            native.allocator.configure_arenas,
            make=self._make,
            before=before,
            refused=refused,
            order=lambda device_id, _: order(device_id, self._arenas[device_id].streams),
            announced=announced,
            stream=_current_stream(),
        )
        malloc, free = self._configure()
        functions = cupy.cuda.CFunctionAllocator(0, malloc, free, None)
        self.allocator = native.allocator.ArenaAllocator(
            functions.malloc, otherwise, self.free_all_blocks
        )

    def _make(self, device_id: int, _: int) -> bool:
        """Make the arena of a GPU, the current one. Return whether it has one."""
        if device_id in self._without:
            return False
        total = self._cupy.cuda.runtime.memGetInfo()[1]
        try:
            arena = native.allocator.PageArena(device_id, _SPACE * total)
        except RuntimeError as error:
            self._without.add(device_id)
            warn(str(error))
            return False
        native.allocator.set_arena(arena)
        self._arenas[device_id] = arena
        return True

    def open(self) -> None:
        """Begin to use the arenas: what CuPy's default pool does not need goes back to the GPU."""
        self._configure()  # another pool may have been in use since
        self._default.free_all_blocks()
        for arena in self._arenas.values():
            arena.close(False)

    def close(self) -> None:
        """Give free pages back, and later what is freed, too: other allocators are in use."""
        for device_id, arena in self._arenas.items():
            with self._cupy.cuda.Device(device_id):
                arena.close(True)

    def set_level(self, device_id: int, nbytes: int, moved: int) -> None:
        """Grant the calling thread's allocations while memory in use stays below ``nbytes``.

        Args:
            device_id: The GPU, the current one.
            nbytes: The level (bytes); ``None`` for any.
            moved: By how much moves have changed memory in use (bytes).
        """
        outside = self._outside()
        limit, before = self._limits.get(device_id, (0, 0))
        if limit and outside != before:
            self.set_limit(limit)
        self._arenas[device_id].set_level(nbytes, outside, moved)

    def grant_all(self, device_id: int) -> None:
        """Grant all of the calling thread's allocations: nobody is to be asked."""
        self._arenas[device_id].set_level(_UNLIMITED, 0, 0)

    def begin_peak(self, device_id: int, moved: int) -> None:
        """Begin to measure the most that is in use in the calling thread. ``moved`` is as above."""
        if (arena := self._arenas.get(device_id)) is not None:
            arena.set_moved_bytes(moved)
            arena.take_peak()

    def end_peak(self, device_id: int) -> int:
        """Return the most that would have been in use without moves, at allocations that were granted unasked."""
        arena = self._arenas.get(device_id)
        return 0 if arena is None else arena.take_peak()

    def peak_bytes(self) -> int:
        """Return the most memory that was taken of the GPU (bytes)."""
        arena = self._arena()
        return self._outside() + (0 if arena is None else int(arena.peak_bytes))

    def missing_bytes(self) -> int:
        """Return what has to become free for the allocation that was refused last (bytes): less than it wants."""
        arena = self._arena()
        return 0 if arena is None else int(arena.missing_bytes)

    def counts(self) -> dict[str, int]:
        """Return how the allocations were served, and what the driver was asked for."""
        arena = self._arena()
        return {} if arena is None else dict(arena.counts)

    # As CuPy's pools have it.

    def used_bytes(self) -> int:
        """Return the bytes in use."""
        arena = self._arena()
        return self._outside() + (0 if arena is None else int(arena.used_bytes))

    def total_bytes(self) -> int:
        """Return the bytes taken of the GPU, free pages included."""
        arena = self._arena()
        return self._outside() + (0 if arena is None else int(arena.taken_bytes))

    def get_limit(self) -> int:
        """Return the limit that the user has set for CuPy's default pool (bytes), 0 for none."""
        return int(self._default.get_limit())

    def set_limit(self, size: int) -> None:
        """Set the most that is taken of the GPU (bytes), 0 for all."""
        device_id = int(self._cupy.cuda.runtime.getDevice())
        arena = self._arenas.get(device_id)
        if arena is None:
            self._limits[device_id] = size, -1
            if device_id in self._without:
                self._default.set_limit(size=size)
            return
        outside = self._outside()
        self._limits[device_id] = size, outside
        torn = max(int(size * _TORN), _LEAST_TORN)
        most = max(size + torn - outside, 0) if size else _UNLIMITED
        arena.set_limit(most)
        if arena.taken_bytes > most:
            arena.trim(most)

    def free_outside(self) -> None:
        """Give back what CuPy's default pool holds and does not need."""
        if self._default.total_bytes() and self._default.n_free_blocks():
            self._default.free_all_blocks()

    def free_all_blocks(self, graphs: bool = True) -> None:
        """Give free memory back to the GPU. That waits for it.

        Args:
            graphs: Also what was allocated while CUDA graphs were captured. As with CuPy's pool none that was
                captured before may be launched afterwards.
        """
        self._default.free_all_blocks()
        if (arena := self._arena()) is not None:
            if graphs:
                arena.forget_graphs()
            arena.trim(0)

    def forget_graphs(self) -> None:
        """Use what is kept for CUDA graphs that were captured: there is no other memory."""
        if (arena := self._arena()) is not None:
            arena.forget_graphs()

    def collect(self) -> bool:
        """Collect garbage, as CuPy's pool does before it gives up. Return whether that freed memory."""
        used = self.used_bytes()
        gc.collect()
        if not is_captured(self._cupy.cuda.runtime, self._cupy.cuda.get_current_stream()):
            self._default.free_all_blocks()
            self.forget_graphs()
        return self.used_bytes() < used

    def _arena(self) -> Any:
        return self._arenas.get(int(self._cupy.cuda.runtime.getDevice()))

    def _outside(self) -> int:
        return int(self._default.total_bytes())
