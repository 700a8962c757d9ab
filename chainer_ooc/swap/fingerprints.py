"""The checksums of ``verify``: saved arrays stay unmodified, and copies come back as they went out."""

from __future__ import annotations

import errno
from typing import Any

from chainer_ooc import wording
from chainer_ooc.errors import CorruptCopyError
from chainer_ooc.swap.devices.protocol import Device
from chainer_ooc.swap.recipe import checksum_of
from chainer_ooc.swap.storage import Storage

__all__ = ["begin", "check_arrival", "check_remade", "check_unchanged"]


def begin(device: Device, storage: Storage) -> None:
    """Take the first checksum of a resident storage: from now on it is checked."""
    storage.verified = True
    storage.checksum = checksum_of(device, storage)


def check_unchanged(device: Device, storage: Storage) -> None:
    """Compare a resident storage with its checksum, if it has one; with ``verify``, warn about a change.

    Writing to a saved array is legal, and the results are those of stock Chainer. It is seldom intended:
    backward computes with the new values. After its last use in backward any code may write to it.
    """
    before = storage.checksum
    if before is None:
        return
    storage.checksum = checksum_of(device, storage)
    if storage.checksum != before and storage.verified and not storage.used:
        wording.warn(
            f"an array of {storage.nbytes} bytes that {storage.label} saved for backward has been modified in place "
            "since: backward computes with the new values, as it does in stock Chainer",
            stacklevel=2,
        )


def check_arrival(device: Device, storage: Storage) -> None:
    """Check a storage that was copied back, if it is checked.

    Raises:
        CorruptCopyError: If it differs from what was copied out.
    """
    if storage.verified and (found := checksum_of(device, storage)) != storage.checksum:
        raise CorruptCopyError(
            errno.EIO,
            f"{storage!r} came back with the checksum {found:#x} instead of {storage.checksum:#x}; the disk or the "
            "memory that held its copy is broken",
        )


def check_remade(device: Device, storage: Storage, owner: Any, origin: int) -> None:
    """Check the bytes at ``origin`` of ``owner``, which a recipe has computed for a storage.

    Raises:
        CorruptCopyError: If they differ from the bytes that were discarded.
    """
    assert storage.recipe is not None
    if device.checksum(owner, origin, storage.nbytes) != storage.recipe.checksum:
        raise CorruptCopyError(
            errno.EIO,
            f"{storage!r} has other bits after {storage.label} was run again: it is not deterministic, or not what "
            "chainer_ooc.recomputable() was told; set recompute=False",
        )
