"""The copies of a GPU's storages: in pinned host memory, then in the swap file."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import queue
import threading
import time
from collections import deque
from typing import Any

from chainer_ooc.errors import SwapSpaceError
from chainer_ooc.swap.devices.copy_threads import THREADS, CopyThreads
from chainer_ooc.swap.devices.cuda.streams import CopyStreams
from chainer_ooc.swap.devices.cuda.transfers import DiskTransfer
from chainer_ooc.swap.devices.protocol import Span
from chainer_ooc.swap.tiers.free_blocks import round_up
from chainer_ooc.swap.tiers.pinned import PinnedSlab
from chainer_ooc.swap.tiers.swap_file import ALIGNMENT as PAGE
from chainer_ooc.swap.tiers.swap_file import SwapFile

__all__ = ["DiskCopy", "DiskTier", "HostTier", "PinnedCopy"]

#: How often, and for how long at most, threads look whether a CUDA graph is still being captured (seconds).
_POLLED, _PATIENCE = 1e-3, 10


class PinnedCopy:
    """A storage's bytes in pinned host memory.

    Attributes:
        address: The address of the block.
        written: The event at the end of the copy that writes the block.
        read: The event at the end of the last copy that reads it. One stream makes all such copies, so
            earlier ones end before.
    """

    def __init__(self, tier: HostTier, address: int, nbytes: int) -> None:
        self.tier = tier
        self.address = address
        self.nbytes = nbytes
        self.written: Any = None
        self.read: Any = None

    def free(self) -> None:
        """Free the block. It is used again when no copy writes or reads it any more."""
        if self.address:
            events = [event for event in (self.written, self.read) if event is not None]
            self.tier.retire(self.address, self.nbytes, events)
            self.address = 0


class HostTier:
    """Pinned blocks, each used again only after the copies that touched it have ended.

    Args:
        slab: The source of the blocks.
        streams: The streams that copy to them and from them.
    """

    def __init__(self, slab: PinnedSlab, streams: CopyStreams) -> None:
        self.slab = slab
        self._streams = streams
        self._retired: deque[tuple[int, int, list[Any]]] = deque()

    def allocate(self, nbytes: int) -> PinnedCopy | None:
        """Return a block of ``nbytes`` bytes, ``None`` if the limit leaves none.

        Raises:
            CUDARuntimeError: If the GPU has failed. No block is lost.
        """
        # Copies end in stream order: stop at the first that has not ended.
        while self._retired and self._have_ended(self._retired[0][2]):
            self._free_first()
        address = self.slab.allocate(nbytes)
        while address is None and self._retired:
            for event in self._retired[0][2]:
                event.synchronize()
            self._free_first()
            address = self.slab.allocate(nbytes)
        return None if address is None else PinnedCopy(self, address, nbytes)

    def retire(self, address: int, nbytes: int, events: list[Any]) -> None:
        """Take a block back. If the GPU has failed, :meth:`allocate` says so: here a block would be lost."""
        is_free = False
        with contextlib.suppress(RuntimeError):  # CuPy's CUDARuntimeError
            is_free = self._have_ended(events)
        if is_free:
            self.slab.free(address, nbytes)
        else:
            self._retired.append((address, nbytes, events))

    def _free_first(self) -> None:
        address, nbytes, _ = self._retired.popleft()
        self.slab.free(address, nbytes)

    def _have_ended(self, events: list[Any]) -> bool:
        return all(self._streams.has_passed(event) for event in events)


class DiskCopy:
    """A storage's bytes in the swap file."""

    def __init__(self, file: SwapFile, nbytes: int) -> None:
        self.file = file
        self.nbytes = nbytes
        self.offset = file.allocate(nbytes)

    def free(self) -> None:
        """Free the block of the file."""
        if self.offset >= 0:
            self.file.free(self.offset, self.nbytes)
            self.offset = -1


class DiskTier:
    """The swap file below pinned memory: threads carry pieces between the file and the GPU.

    A piece passes through a pinned staging block. The GPU's copy ends before the file is written, and
    before the block is used for the next piece.

    Args:
        streams: The streams that copy between staging blocks and the GPU.
        staging: The source of the staging blocks.
        piece: The size of a staging block (bytes), a multiple of the page size.
        directory: The directory of the swap file.
    """

    def __init__(
        self, streams: CopyStreams, staging: PinnedSlab, piece: int, directory: str
    ) -> None:
        self.file = SwapFile(directory)
        self.staging = staging
        self.piece = piece
        self._streams = streams
        self._blocks: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._threads = CopyThreads()
        self._is_open = False
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> DiskCopy:
        """Return a block of the file.

        Raises:
            SwapSpaceError: If the disk is full, or the system has no memory for staging blocks.
        """
        self._prepare()
        return DiskCopy(self.file, nbytes)

    def write(self, copy: DiskCopy, device: int, after: list[Any], owner: Any) -> DiskTransfer:
        """Begin to copy a storage at address ``device`` of ``owner`` to the file, after some events."""
        return self._start(self._write_piece, copy, device, after, owner)

    def read(self, copy: DiskCopy, device: int, after: list[Any], owner: Any) -> DiskTransfer:
        """Begin to copy a storage from the file to address ``device`` of ``owner``, after some events."""
        return self._start(self._read_piece, copy, device, after, owner)

    def close(self) -> None:
        """End the threads; free the file and the staging blocks."""
        with self._lock:
            self._is_open = False
        self._threads.close()
        self.file.close()
        self.staging.close()

    def _prepare(self) -> None:
        with self._lock:
            if self._is_open:
                return
            self._blocks = queue.SimpleQueue()
            addresses: list[int] = []
            while len(addresses) < THREADS:
                address = self.staging.allocate(self.piece)
                if address is None:
                    self.staging.close()  # what it got so far would stay locked, and of no use
                    self.staging.ask_again()
                    raise SwapSpaceError(
                        errno.ENOMEM,
                        f"page-locked memory for {THREADS} staging blocks of {self.piece} bytes cannot be had "
                        "(see `ulimit -l` and `free -h`); no data was lost",
                        self.file.directory,
                    )
                addresses.append(address)
            for address in addresses:
                self._blocks.put(address)
            self._is_open = True

    def _start(
        self, move: Any, copy: DiskCopy, device: int, after: list[Any], owner: Any
    ) -> DiskTransfer:
        starts = range(0, copy.nbytes, self.piece)
        transfer = DiskTransfer(copy, len(starts), owner)
        with self._lock:
            if not self._is_open:
                raise OSError(errno.EBADF, "the swap file is closed", self.file.directory)
            for start in starts:
                nbytes = min(self.piece, copy.nbytes - start)
                place = copy.file, copy.offset + start, device + start, nbytes, after
                self._threads.submit(
                    functools.partial(transfer.run, functools.partial(move, *place))
                )
        return transfer

    def _write_piece(
        self, file: SwapFile, offset: int, device: int, nbytes: int, after: list[Any]
    ) -> Span:
        with self._staged() as (host, memory):
            self._wait_for_captures()
            begin, end = self._streams.copy_out(host, device, nbytes, after)
            end.synchronize()
            start = self._streams.host_time(begin)
            file.write(offset, memory[: round_up(nbytes, PAGE)])
        return start, time.perf_counter()

    def _read_piece(
        self, file: SwapFile, offset: int, device: int, nbytes: int, after: list[Any]
    ) -> Span:
        with self._staged() as (host, memory):
            start = time.perf_counter()
            file.read(offset, memory[: round_up(nbytes, PAGE)])
            self._wait_for_captures()
            self._streams.copy_in(device, host, nbytes, after)[1].synchronize()
        return start, time.perf_counter()

    def _wait_for_captures(self) -> None:
        """Wait until no CUDA graph is being captured: no thread may wait for an event meanwhile.

        Not for ever: a program that fails in a capture does not end it.
        """
        deadline = time.monotonic() + _PATIENCE
        while self._streams.captured() and time.monotonic() < deadline:
            time.sleep(_POLLED)

    @contextlib.contextmanager
    def _staged(self) -> Any:
        """Lend a staging block: yield its address and its bytes."""
        blocks, address = self._blocks, self._blocks.get()
        try:
            with self._streams.on_device():
                memory = (ctypes.c_char * self.piece).from_address(address)
                yield address, memoryview(memory).cast("B")
        finally:
            blocks.put(address)
