"""What the differential tests know of the engine's insides."""

from __future__ import annotations

from typing import Any

import numpy as np
import psutil

from chainer_ooc import mode

__all__ = ["be_quiet", "leaks", "prepare", "resident_bytes"]

#: The names of the modules that have NumPy's C functions.
multiarray = getattr(np, "_core", None) or np.core


def prepare(contender: str, constants: dict[str, int]) -> None:
    """Prepare out-of-core mode before it is turned on.

    Args:
        contender: ``"out of core"``, or ``"no hook"``: NumPy's allocator stays as it is.
        constants: Sizes from which allocations are announced, and lie in the pool (bytes).
    """
    mode._ANNOUNCED, mode._POOLED = constants["announced"], constants["pooled"]
    if contender == "no hook":
        mode.hook_allocations = lambda: None


def be_quiet() -> None:
    """Do without the one warning that the limit is too low."""
    for manager in mode.managers():
        manager._has_warned = True


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def leaks() -> list[str]:
    """Tell what is left when nothing should be."""
    found: list[str] = []
    for manager in mode.managers():
        manager.settle()
        mover, device = manager._mover, manager.device
        facts: dict[str, Any] = {
            "storages": len(manager.storages()),
            "bytes of storages": sum(mover.nbytes.values()),
            "owners": len(mover._by_owner),
            "bytes in the swap file": device.file.allocated,
            "locked": manager._lock._is_owned(),
            "bytes of arrays in the pool": _pool_bytes(device.pages),
        }
        found += [f"{name}: {value}" for name, value in facts.items() if value]
    if mode.local.running is not None:
        found.append(f"{mode.local.running[0].label} still runs")
    if mode.local.stack:
        found.append(f"modes: {len(mode.local.stack)}")
    return found


def _pool_bytes(pages: Any) -> int:
    """Return the bytes of the pool's blocks in use."""
    if pages is None:
        return 0
    freed = {a for found in pages._as_freed.values() for a in found} | set(pages._freed_untouched)
    return sum(size for address, size in pages._sizes.items() if address not in freed)
