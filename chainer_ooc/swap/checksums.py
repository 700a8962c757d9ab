"""The checksums of ``verify``: saved arrays stay unmodified, and copies come back as they went out."""

from __future__ import annotations

import errno

from chainer_ooc import wording
from chainer_ooc.errors import CorruptCopyError
from chainer_ooc.swap.devices.protocol import Device
from chainer_ooc.swap.storage import Storage

__all__ = ["begin", "check_arrival", "check_unchanged", "checksum_of", "not_remade"]


def begin(device: Device, storage: Storage) -> None:
    """Take the first checksum of a resident storage: from now on it is checked, unless nothing may move now."""
    if not device.may_move():
        return
    storage.checksum = checksum_of(device, storage)


def check_unchanged(device: Device, storage: Storage) -> None:
    """Compare a resident storage with its checksum, if it has one; with ``verify``, warn about a change.

    Writing to a saved array is legal, and the results are those of stock Chainer. It is seldom intended:
    backward computes with the new values. After its last use in backward any code may write to it.
    """
    before = storage.checksum
    if before is None or not device.may_move():
        return
    storage.checksum = checksum_of(device, storage)
    if storage.checksum != before and not storage.used:
        wording.warn(
            f"an array of {storage.nbytes} bytes that {storage.label} saved for backward has been modified in place "
            "since: backward computes with the new values, as it does in stock Chainer"
        )


def check_arrival(device: Device, storage: Storage) -> None:
    """Check a storage that was copied back, if it is checked.

    Raises:
        CorruptCopyError: If it differs from what was copied out.
    """
    expected = storage.checksum
    if expected is not None and (found := checksum_of(device, storage)) != expected:
        raise CorruptCopyError(
            errno.EIO,
            f"{storage!r} came back with the checksum {found:#x} instead of {expected:#x}; the disk or the "
            "memory that held its copy is broken",
        )


def not_remade(storage: Storage) -> CorruptCopyError:
    """Return the error for a storage that has other bytes after its function was run again."""
    maker = storage.label if storage.recipe is None else storage.recipe.maker or storage.label
    return CorruptCopyError(
        errno.EIO,
        f"{storage!r} has other bits after {maker} was run again: it is not deterministic, or not what "
        'chainer_ooc.recomputable() was told; set recompute="never"',
    )


def checksum_of(device: Device, storage: Storage) -> int:
    """Return the checksum of a resident storage's bytes."""
    return device.checksum(storage.owner, storage.origin, storage.nbytes)
