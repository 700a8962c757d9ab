"""Make every saved array come back from its copy, whoever else still holds the original.

Small tests move nothing by themselves: their memory is plenty, their inputs are leaves, which stay, and
the test holds most of what is left. Inside :func:`force_copies` they cannot help it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import chainer
import numpy as np

from chainer_ooc import state
from chainer_ooc.graph import hooks
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.protocol import Device, Layout
from chainer_ooc.swap.devices.ram import RamDevice
from chainer_ooc.swap.events import Observer
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.storage import PackedArray, State, Storage
from chainer_ooc.swap.transfers import Counters, Transfers

__all__ = ["Moved", "force_copies"]

# One for the process: graphs outlive the ``with``.
_manager: _ForcingManager | None = None

#: What released memory is filled with: as floating point numbers, large and negative.
POISON = 0xE5


class Moved:
    """What has been moved since the ``with`` began.

    Attributes:
        bytes_out: Bytes copied out.
        bytes_in: Bytes copied back.
        storages_out: Allocations copied out.
        storages_in: Allocations copied back.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._start = {name: getattr(counters, name) for name in vars(counters)}

    def __getattr__(self, name: str) -> int:
        if name.startswith("_") or name not in self._start:
            raise AttributeError(name)
        return int(getattr(self._counters, name) - self._start[name])

    def __repr__(self) -> str:
        return f"<Moved {self.bytes_out} bytes out, {self.bytes_in} bytes in>"


class _PoisoningTransfers(Transfers):
    """Fills memory with :data:`POISON` before it lets go of it: who still reads it there, reads that.

    Attributes:
        lent: Storages whose restored memory was given to somebody who may write to it.
    """

    def __init__(
        self, device: Device, make_room: Callable[[int], int], observers: Sequence[Observer] = ()
    ) -> None:
        super().__init__(device, make_room, observers)
        self.lent: weakref.WeakSet[Storage] = weakref.WeakSet()

    def mark_dirty(self, storage: Storage) -> None:
        """BOTH -> RESIDENT."""
        self.lent.add(storage)
        super().mark_dirty(storage)

    def release(self, storage: Storage) -> None:
        """BOTH -> OUT."""
        _poison(storage)
        super().release(storage)

    def drop(self, storage: Storage) -> None:
        """Any state -> DROPPED."""
        _poison(storage)
        super().drop(storage)

    def defer_free(self, storage: Storage) -> None:
        """Take what a dying storage leaves."""
        _poison(storage)
        super().defer_free(storage)

    def give_up_original(self, storage: Storage) -> None:
        """BOTH -> OUT, of the memory that the storage began in: somebody else may rightly read that."""
        super().release(storage)


def _poison(storage: Storage) -> None:
    # Not while a thread writes it to the file or fills it.
    if storage.owner is not None and storage.transfer is None and not storage.referenced_externally:
        storage.owner.fill(POISON)


class _ForcingManager(SwapManager):
    """Copies each array out when it is saved, and gives the original up, whoever holds it."""

    _transfers: _PoisoningTransfers
    _transfers_type = _PoisoningTransfers

    def __init__(self) -> None:
        super().__init__(
            RamDevice(tempfile.gettempdir()),
            state.current_or_last,
            hooks.save_pending,
            lambda: state.local.read_only,
        )
        # By the identity of originals that live: the copy of each, and a digest of what was copied.
        self._copies: dict[int, tuple[weakref.ref[Any], weakref.ref[Storage], bytes]] = {}

    def save(self, array: Any, label: str) -> PackedArray | None:
        """Return what stands in for ``array``; its bytes are outside already."""
        location = self.device.locate(array)
        if location is None or location.nbytes == 0:
            return None
        owner = location.owner
        with self._lock:
            if (
                self._transfers.find(owner) is not None
            ):  # what came back from its copy, and is saved again
                return super().save(array, label)
            digest = hashlib.blake2b(owner.tobytes("A"), digest_size=16).digest()
            storage = self._copy_of(owner, digest)
            if storage is not None:
                offset = location.offset
                writeable = array.flags.writeable
                layout = Layout(array.dtype, array.shape, array.strides, offset, writeable)
                saved = PackedArray(storage, layout, array)
            else:
                saved = cast(PackedArray, super().save(array, label))
                self._copy_at_once(saved.storage, owner, digest)
            saved._last = None  # the original is not to be handed out
            return saved

    def _copy_of(self, owner: Any, digest: bytes) -> Storage | None:
        """Return the storage of another view of ``owner``, if neither has been written to since."""
        original, reference, then = self._copies.get(id(owner), (None, None, b""))
        storage = reference() if reference else None
        if original is None or original() is not owner or storage is None or then != digest:
            return None
        if storage in self._transfers.lent or storage.state is State.DROPPED:
            return None
        return storage

    def _copy_at_once(self, storage: Storage, owner: Any, digest: bytes) -> None:
        self._transfers.begin_out(storage)
        self._transfers.end_out(storage)
        self._transfers.give_up_original(storage)
        key, copies = id(owner), self._copies
        original = weakref.ref(owner, lambda _: copies.pop(key, None))
        copies[key] = original, weakref.ref(storage), digest


class _Identity(chainer.FunctionNode):
    """Makes a variable that is no leaf of one that is. Nothing is copied or computed."""

    is_elementwise = True  # any memory layout may pass

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs

    def backward(self, indexes: tuple[int, ...], gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        return gradients


def _without_leaves(inputs: Any) -> list[Any]:
    """Return ``inputs`` with variables that are leaves replaced by others of the same array that are not."""
    passed: dict[int, Any] = {}  # f(x, x) is to be h = identity(x); f(h, h)
    return [_passed(x, passed) if _is_leaf(x) else x for x in inputs]


def _is_leaf(x: Any) -> bool:
    return (
        isinstance(x, chainer.Variable)
        and not isinstance(x, chainer.Parameter)
        and type(x.raw_array) is np.ndarray
        and x.requires_grad
        and x.creator_node is None
    )


def _passed(x: Any, passed: dict[int, Any]) -> Any:
    if id(x) not in passed:
        local = chainer._thread_local
        hooks = local.__dict__.get("function_hooks")
        local.function_hooks = {}
        try:
            passed[id(x)] = _Identity().apply((x,))[0]
        finally:
            if hooks is None:
                del local.function_hooks
            else:
                local.function_hooks = hooks
    return passed[id(x)]


@contextlib.contextmanager
def force_copies() -> Iterator[Moved]:
    """Save everything out of core inside the ``with``, in all threads, and count what comes back.

    * Every array that a function of the graph saves is copied out at once, and read from the copy, even
      if somebody still holds the original. Memory that is released is overwritten, so that a use of it
      after that is seen in the results.
    * Variables that are leaves are passed through an identity function on their way into a function
      (but parameters), so that they are saved like what lies inside of a network.

    A program that writes to an array after it was saved (``x.array[...] = 0`` between forward and
    backward) does not see that in the gradients, unlike on stock Chainer and in out-of-core mode itself.
    Function hooks see the identity function in backward.

    Yields:
        What has been moved so far inside. A test is to assert ``moved.bytes_in > 0``.
    """
    global _manager
    hooks.install()
    if _manager is None:
        _manager = _ForcingManager()
    forcing = _manager
    settings = dataclasses.replace(state.current() or Settings(), swap_all=True, min_bytes=1)
    apply, enabled = chainer.FunctionNode.apply, state.process.enabled
    manager = state.process.managers.get("ram")

    def apply_to_no_leaves(self: Any, inputs: Any) -> Any:
        plain = chainer.config.enable_backprop and chainer.config.schedule_func is None
        if plain and type(self) is not _Identity:
            inputs = _without_leaves(inputs)
        return apply(self, inputs)

    state.process.managers["ram"] = forcing
    state.process.enabled = settings
    state.local.stack.append(settings)
    chainer.FunctionNode.apply = apply_to_no_leaves
    try:
        yield Moved(forcing.counters)
    finally:
        chainer.FunctionNode.apply = apply
        if _manager is forcing:  # not in a forked child, whose mode is off
            state.local.stack.pop()
            state.process.enabled = enabled
            if manager is None:
                del state.process.managers["ram"]
            else:
                state.process.managers["ram"] = manager


def _after_fork() -> None:
    global _manager
    _manager = None


os.register_at_fork(after_in_child=_after_fork)
