"""The interface of a device: its memory, the arrays in it, and the copies of storages outside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

__all__ = [
    "Both",
    "Device",
    "Known",
    "Layout",
    "Location",
    "PooledDevice",
    "Span",
    "SwappedBlock",
    "Transfer",
    "Verdict",
    "as_bytes",
    "bytes_of_array",
    "lies_alike",
]

#: A crop of an allocation over CROPPED times its size has no fingerprint, unless it has at most SMALL bytes.
CROPPED, SMALL = 2, 64 << 10


#: When something began and ended (seconds of :func:`time.perf_counter`).
Span = tuple[float, float]


class Layout(NamedTuple):
    """The layout of an array in its storage.

    Attributes:
        dtype: The NumPy dtype.
        shape: The shape.
        strides: The strides (bytes).
        offset: Bytes from the storage's first byte to the array's first element.
        writeable: Whether code may write to the array.
    """

    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    writeable: bool


class Location(NamedTuple):
    """The place of an array in memory.

    Attributes:
        owner: The object that owns the allocation. The memory is freed when nothing refers to the owner.
        nbytes: The allocation's size (bytes).
        address: The allocation's first address.
        offset: Bytes from the allocation's first address to the array's first element.
    """

    owner: Any
    nbytes: int
    address: int
    offset: int


class SwappedBlock(Protocol):
    """The bytes of one storage outside the device's memory."""

    def free(self) -> None:
        """Free the block's space. No transfer may be reading or writing it."""


class Transfer(Protocol):
    """A running copy, in either direction."""

    @property
    def copy(self) -> SwappedBlock:
        """The block that is written or read."""

    def done(self) -> bool:
        """Return, without waiting, whether the transfer has ended, with or without an error."""

    def join(self) -> None:
        """Order the calling thread's later work after the transfer.

        On a GPU streams are ordered, and the host does not wait.

        Raises:
            OSError: If the transfer failed.
        """

    def wait(self) -> None:
        """Wait until the transfer has ended. Errors are not raised."""

    def span(self) -> Span | None:
        """Return the begin and the end (seconds of :func:`time.perf_counter`), ``None`` if not known yet."""

    def arrival(self) -> Any:
        """Return the moment of the end for :meth:`Device.seconds`, ``None`` if the host waited for it."""


class Verdict(Protocol):
    """The result of a comparison of fingerprints, which may not be known yet."""

    def done(self) -> bool:
        """Return, without waiting, whether the result is known."""

    def equal(self) -> bool:
        """Return whether all pairs were equal. Wait until that is known."""


class Known(NamedTuple):
    """A verdict that is known at once."""

    is_equal: bool

    def done(self) -> bool:
        """Return ``True``."""
        return True

    def equal(self) -> bool:
        """Return whether all pairs were equal."""
        return self.is_equal


class Both(NamedTuple):
    """The verdict that two others are "equal"."""

    first: Verdict
    second: Verdict

    def done(self) -> bool:
        """Return, without waiting, whether both are known."""
        return self.first.done() and self.second.done()

    def equal(self) -> bool:
        """Return whether all pairs of both were equal."""
        return self.first.equal() and self.second.equal()


class Device(Protocol):
    """The memory of one device, and the way out of it and back."""

    name: str
    stand_in: Any  #: an array of the device without elements
    asks_for_room: bool  #: its allocator asks the manager for room itself
    runs_behind: bool  #: calls return before what they compute is there

    @property
    def on_one_stream(self) -> bool:
        """Whether all work that is known is in the order of one stream."""

    def may_move(self) -> bool:
        """Return whether anything may be moved, freed or waited for now: not while a CUDA graph is captured."""

    def locate(self, array: Any) -> Location | None:
        """Return the place of ``array`` in memory, or ``None`` for an array that must stay as it is."""

    def view(self, owner: Any, origin: int, layout: Layout) -> Any:
        """Return an array with ``layout``, in the storage that begins at byte ``origin`` of ``owner``."""

    def copy_out(self, owner: Any, origin: int, nbytes: int) -> Transfer:
        """Begin to copy a storage out.

        Raises:
            SwapSpaceError: If there is no space outside of memory.
            OSError: If the copy cannot begin.
        """

    def copy_in(self, copy: Any, nbytes: int, page_offset: int) -> tuple[Any, int, Transfer]:
        """Allocate memory and begin to copy a storage in. Return its owner, its origin and the transfer.

        Raises:
            MemoryError: If there is no memory for the storage.
        """

    def duplicate(
        self, array: Any, layout: Layout, nbytes: int, page_offset: int
    ) -> tuple[Any, int]:
        """Copy ``array`` into new memory with that layout. Return the storage's owner and origin."""

    def take_buffer(
        self, array: Any, layout: Layout, nbytes: int, page_offset: int
    ) -> tuple[Any, int]:
        """Use the buffer of ``array`` as the storage's memory if strides and page offset match; else copy.

        Return the storage's owner and origin.
        """

    def checksum(self, owner: Any, origin: int, nbytes: int) -> int:
        """Return a checksum of a resident storage's bytes. Wait until they are computed."""

    def fingerprint(self, owner: Any, origin: int, nbytes: int) -> Any:
        """Return a fingerprint of a resident storage's bytes, as they are in the order of computation. Never wait.

        ``None`` if it cannot be taken, or nothing may move.
        """

    def compare(self, pairs: Sequence[tuple[Any, Any]]) -> Verdict:
        """Begin to find out whether the two fingerprints of each pair are equal. Never wait.

        ``None`` is equal to nothing. What cannot be compared counts as not equal.
        """

    def matches(self, fingerprint: Any, owner: Any, origin: int, nbytes: int) -> Verdict:
        """Begin to find out whether a resident storage's bytes have a fingerprint. Wait if there is no other way."""

    def fingerprint_bandwidth(self) -> float:
        """Return about how many bytes per second fingerprints are taken of."""

    def before_release(self) -> None:
        """Make sure that no earlier work still uses memory that is freed after this call."""

    def used_bytes(self) -> int:
        """Return the bytes that count against the limit now, including running copies in."""

    def set_cached_limit(self, nbytes: int) -> None:
        """Cap memory in use plus the allocator's cached free pages; 0 disables caching."""

    def peak_bytes(self) -> int:
        """Return the highest memory in use, as the system has measured it (bytes)."""

    def capacity(self) -> int:
        """Return the limit that ``limit=None`` stands for (bytes)."""

    def total_bytes(self) -> int:
        """Return the memory that ``limit=1.0`` stands for (bytes)."""

    def mark(self) -> Any:
        """Return the present moment in the order of computation, for :meth:`seconds`."""

    def seconds(self, earlier: Any, later: Any) -> float:
        """Return the time between two moments (seconds), negative if ``later`` came first.

        The moments are from :meth:`mark` or :meth:`Transfer.arrival`. Wait until both have passed.
        """

    def tiers(self) -> list[tuple[str, int | None, bool]]:
        """Return the places for copies, the first choice first.

        Each has a name, a capacity (bytes, ``None`` for any), and whether both directions share one queue.
        """

    def trim(self, desperate: bool = False) -> None:
        """Give the allocator's free memory back to the system; ``desperate`` if nothing else is left to do."""

    def move_to(self, directory: str) -> None:
        """Make later swap files in ``directory``."""

    def after_fork(self) -> None:
        """Start anew in a forked child: it has no threads, and may only read the parent's copies."""

    def close(self) -> None:
        """End the threads and free all space outside of memory."""


class PooledDevice(Device, Protocol):
    """A device whose allocator, a pool, asks the manager for room itself."""

    def taken_bytes(self) -> int:
        """Return the memory that the pool of the current device holds, free blocks included (bytes). Never wait."""

    def note_allocation(self) -> None:
        """Note an allocation on the current stream, for the peak and for the order of copies."""

    def order_streams(self, streams: Sequence[int]) -> bool:
        """Make later work of the current stream wait for earlier work of some. Return whether all of them are known."""


def lies_alike(array: Any, location: Location, layout: Layout, nbytes: int) -> bool:
    """Return whether an array lies in its allocation as ``layout`` does in a storage of ``nbytes``."""
    return (
        array.strides == layout.strides
        and location.nbytes == nbytes
        and location.offset == layout.offset
    )


def as_bytes(nbytes: int) -> Layout:
    """Return the layout of a whole storage as bytes."""
    return Layout(np.dtype(np.uint8), (nbytes,), (1,), 0, True)


def bytes_of_array(
    array: Any, locate: Callable[[Any], Location | None]
) -> tuple[Any, int, int, int] | None:
    """Return the bytes of which a fingerprint stands for an array: owner, first byte, size, and the array's offset.

    Args:
        array: An array of the device.
        locate: The device's method, or an equivalent.

    Returns:
        For a crop its whole allocation. ``None`` for an array that must stay as it is, and for a large array that is
        spread over a far larger allocation.
    """
    location = locate(array)
    if location is None:
        return None
    if array.flags.c_contiguous or array.flags.f_contiguous:
        return location.owner, location.offset, array.nbytes, location.offset
    if location.nbytes <= CROPPED * array.nbytes:
        return location.owner, 0, location.nbytes, location.offset
    return bytes_of_array(array.copy(), locate) if array.nbytes <= SMALL else None
