"""What the differential tests know of the engine's insides."""

from __future__ import annotations

from typing import Any

import psutil

from chainer_ooc import mode

__all__ = ["be_quiet", "leaks", "prepare", "resident_bytes"]


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
        }
        found += [f"{name}: {value}" for name, value in facts.items() if value]
    if mode.local.running is not None:
        found.append(f"{mode.local.running[0].label} still runs")
    if mode.local.stack:
        found.append(f"modes: {len(mode.local.stack)}")
    return found
