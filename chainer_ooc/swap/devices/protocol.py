"""What the manager asks of a device: its memory, arrays in it, and copies of storages outside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

__all__ = [
    "Device",
    "Layout",
    "Location",
    "Span",
    "SwappedBlock",
    "Transfer",
    "checksum_of_array",
]

#: An array may be a view of so many times its bytes, to have a checksum; a smaller one, of anything.
CROPPED, SMALL = 2, 64 << 10


#: When something began and ended (seconds of :func:`time.perf_counter`).
Span = tuple[float, float]


class Layout(NamedTuple):
    """How an array lies in its storage.

    Attributes:
        dtype: Its NumPy dtype.
        shape: Its shape.
        strides: Its strides (bytes).
        offset: Bytes from the storage's first byte to the array's first element.
        writeable: Whether it may be written to.
    """

    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    writeable: bool


class Location(NamedTuple):
    """Where an array's memory is.

    Attributes:
        owner: The object that owns the allocation; the allocation is freed when nobody refers to it.
        nbytes: The allocation's size (bytes).
        address: The allocation's first address.
        offset: Bytes from there to the array's first element.
    """

    owner: Any
    nbytes: int
    address: int
    offset: int


class SwappedBlock(Protocol):
    """The bytes of one storage outside the device's memory."""

    def free(self) -> None:
        """Give the space back. Nothing may be reading or writing it."""


class Transfer(Protocol):
    """A copy under way, in either direction."""

    @property
    def copy(self) -> SwappedBlock:
        """What is written or read."""

    def done(self) -> bool:
        """Tell whether it has ended, well or badly, without waiting."""

    def join(self) -> None:
        """Make what the calling thread does from now on happen after the transfer.

        On a GPU that is an order between streams, with no wait of the host.

        Raises:
            OSError: If it failed.
        """

    def wait(self) -> None:
        """Wait until it has ended, well or badly. Raises nothing."""

    def span(self) -> Span | None:
        """Return when it began and ended (seconds of :func:`time.perf_counter`), ``None`` if nobody knows yet."""

    def arrival(self) -> Any:
        """Return the moment of its end for :meth:`Device.seconds`, ``None`` if the host has waited for it."""


class Device(Protocol):
    """The memory of one device and the way out of it and back."""

    name: str
    stand_in: Any  #: an array of the device without elements
    asks_for_room: bool  #: its allocator asks the manager for room itself
    runs_behind: bool  #: calls return before what they compute is there

    def locate(self, array: Any) -> Location | None:
        """Return where ``array`` lies, or ``None`` for an array that must stay where it is."""

    def view(self, owner: Any, origin: int, layout: Layout) -> Any:
        """Return the array of that layout in the storage at byte ``origin`` of ``owner``."""

    def copy_out(self, owner: Any, origin: int, nbytes: int) -> Transfer:
        """Begin to copy a storage out.

        Raises:
            SwapSpaceError: If there is no space for it outside.
            OSError: If it cannot be begun.
        """

    def copy_in(self, copy: Any, nbytes: int, page_offset: int) -> tuple[Any, int, Transfer]:
        """Allocate memory and begin to copy a storage in. Returns its owner, its origin and the transfer.

        Raises:
            MemoryError: If there is no memory for it.
        """

    def duplicate(
        self, array: Any, layout: Layout, nbytes: int, page_offset: int
    ) -> tuple[Any, int]:
        """Return the owner and the origin of a new storage with the elements of ``array``, lying as ``layout`` says."""

    def take_buffer(
        self, array: Any, layout: Layout, nbytes: int, page_offset: int
    ) -> tuple[Any, int]:
        """Return the owner and the origin of a storage that ``array`` fills, lying as ``layout`` says.

        That is the array's own memory if it lies like that, and in the page like the storage, else a copy.
        """

    def checksum(self, owner: Any, origin: int, nbytes: int) -> int:
        """Return a checksum of a resident storage's bytes. Waits for what computes them."""

    def checksum_of(self, array: Any) -> tuple[int, int] | None:
        """Return what :func:`checksum_of_array` does, of an array that need not be saved."""

    def before_release(self) -> None:
        """Make sure that memory which is given up after this is used by nobody who came before."""

    def used_bytes(self) -> int:
        """Return the bytes that count against the limit now, those of copies in that are under way included."""

    def set_cached_limit(self, nbytes: int) -> None:
        """Keep memory below ``nbytes``, what is free and the allocator keeps for itself included; 0: keep none."""

    def peak_bytes(self) -> int:
        """Return the most that :meth:`used_bytes` has been, as measured by the system."""

    def capacity(self) -> int:
        """Return the bytes that a limit of ``None`` means."""

    def total_bytes(self) -> int:
        """Return the bytes that a limit of 1.0 means."""

    def mark(self) -> Any:
        """Return this moment in the order of what is computed, for :meth:`seconds`."""

    def seconds(self, earlier: Any, later: Any) -> float:
        """Return the time between two moments (seconds), negative if they come the other way round.

        They are what :meth:`mark` and :meth:`Transfer.arrival` gave. Waits until both have been.
        """

    def tiers(self) -> list[tuple[str, int | None, bool]]:
        """Return where copies go, the first choice first.

        Each has a name, a capacity (bytes, ``None`` for any), and one queue for both directions or one for each.
        """

    def trim(self, desperate: bool = False) -> None:
        """Give freed memory that the allocator keeps back to the system; ``desperate`` if all else is done."""

    def move_to(self, directory: str) -> None:
        """Put swap files that are made from now on into ``directory``."""

    def after_fork(self) -> None:
        """In a forked child: threads are gone, and the space outside is the parent's, to be read only."""

    def close(self) -> None:
        """End threads and give up all space outside."""


def checksum_of_array(
    array: Any,
    locate: Callable[[Any], Location | None],
    checksum: Callable[[Any, int, int], int],
) -> tuple[int, int] | None:
    """Return a checksum of an array's bytes, in the order of memory, and where it begins in its allocation (bytes).

    Args:
        array: An array of the device.
        locate: The device's, or what tells the same.
        checksum: The device's.

    Returns:
        The checksum is that of the whole allocation for a crop of it; ``None`` for arrays that must stay where they
        are and for large ones that are strewn over far more.
    """
    location = locate(array)
    if location is None:
        return None
    start, nbytes = location.offset, array.nbytes
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        if location.nbytes > CROPPED * nbytes:
            return checksum_of_array(array.copy(), locate, checksum) if nbytes <= SMALL else None
        start, nbytes = 0, location.nbytes
    return checksum(location.owner, start, nbytes), location.offset
