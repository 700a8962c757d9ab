"""Make every saved array come back from its copy, even if other code still refers to the original.

Small tests move nothing by themselves: their memory is plenty, their inputs are leaves, which stay, and the
test itself refers to most other arrays. Inside :func:`force_copies` all arrays move.
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

# One manager for the process: graphs outlive the ``with``.
_manager: _ForcingManager | None = None

#: The byte that fills released memory: floating point numbers made of it are large and negative.
POISON = 0xE5


class Moved:
    """The bytes and allocations moved since the ``with`` began.

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
    """Fill memory with :data:`POISON` before it is released: code that still reads it gets that.

    Attributes:
        lent: Storages whose restored memory was given to code that may write to it.
    """

    def __init__(
        self, device: Device, make_room: Callable[[int], int], observers: Sequence[Observer] = ()
    ) -> None:
        super().__init__(device, make_room, observers)
        self.lent: weakref.WeakSet[Storage] = weakref.WeakSet()

    def mark_dirty(self, storage: Storage) -> None:
        """BOTH -> RESIDENT. Free the copy."""
        self.lent.add(storage)
        super().mark_dirty(storage)

    def release(self, storage: Storage) -> None:
        """BOTH -> OUT. Poison and free the memory."""
        _poison(storage)
        super().release(storage)

    def drop(self, storage: Storage) -> None:
        """Any state -> DROPPED. Poison and free the memory; free the copy."""
        _poison(storage)
        super().drop(storage)

    def defer_free(self, storage: Storage) -> None:
        """Queue a dead storage's blocks for freeing, and poison its memory."""
        _poison(storage)
        super().defer_free(storage)

    def give_up_original(self, storage: Storage) -> None:
        """BOTH -> OUT. Release the first memory of the storage, without poison: other code may read it."""
        super().release(storage)


def _poison(storage: Storage) -> None:
    # Not while a thread reads or writes the memory.
    if storage.owner is not None and storage.transfer is None and not storage.referenced_externally:
        storage.owner.fill(POISON)


class _ForcingManager(SwapManager):
    """Copy each array out when it is saved, and release the original, even if other code refers to it."""

    _transfers: _PoisoningTransfers
    _transfers_type = _PoisoningTransfers

    def __init__(self) -> None:
        super().__init__(
            RamDevice(tempfile.gettempdir()),
            state.current_or_last,
            hooks.save_pending,
            lambda: state.local.read_only,
        )
        # By the id of each living original: a reference to it, its copy, and a digest of the copied bytes.
        self._copies: dict[int, tuple[weakref.ref[Any], weakref.ref[Storage], bytes]] = {}

    def save(self, array: Any, label: str) -> PackedArray | None:
        """Return the stand-in of ``array``, whose bytes have been copied out already."""
        location = self.device.locate(array)
        if location is None or location.nbytes == 0:
            return None
        owner = location.owner
        with self._lock:
            if self._transfers.find(owner) is not None:  # restored from a copy and saved again
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
            saved._last = None  # never hand out the original
            return saved

    def _copy_of(self, owner: Any, digest: bytes) -> Storage | None:
        """Return the storage of another view of ``owner``, if no code has written to either since."""
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
    """Turn a leaf into a variable that is no leaf. Nothing is copied or computed."""

    is_elementwise = True  # any memory layout may pass

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs

    def backward(self, indexes: tuple[int, ...], gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        return gradients


def _without_leaves(inputs: Any) -> list[Any]:
    """Return ``inputs`` with each leaf replaced by a variable of the same array that is no leaf."""
    passed: dict[int, Any] = {}  # f(x, x) becomes h = identity(x); f(h, h)
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
    """Save everything out of core inside the ``with``, in all threads, and count the bytes that come back.

    * Every array that a function of the graph saves is copied out at once and read from the copy, even if
      other code still refers to the original. Released memory is overwritten, so that its later use shows
      in the results.
    * Leaves other than parameters pass through an identity function on their way into a function, so that
      they are saved like the arrays inside a network.

    A program that writes to an array after it was saved (``x.array[...] = 0`` between forward and backward)
    does not see that in the gradients here, unlike on stock Chainer and in out-of-core mode. Function hooks
    see the identity function in backward.

    Yields:
        The moved bytes and allocations so far. A test should assert ``moved.bytes_in > 0``.
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
        if _manager is forcing:  # a forked child's mode is off
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
