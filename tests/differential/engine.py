"""What the differential tests know of the engine's insides."""

from __future__ import annotations

from typing import Any

import psutil

from chainer_ooc import state

__all__ = ["be_quiet", "leaks", "prepare", "resident_bytes"]


def prepare(contender: str, constants: dict[str, int]) -> None:
    """Prepare out-of-core mode before it is turned on.

    Args:
        contender: ``"out of core"``, or ``"no hook"``: NumPy's allocator stays as it is.
        constants: Sizes from which allocations are announced, and lie in the pool (bytes).
    """
    state._ANNOUNCED, state._POOLED = constants["announced"], constants["pooled"]
    if contender == "no hook":
        state.hook_allocations = lambda: None


def be_quiet() -> None:
    """Do without the one warning that the limit is too low."""
    for manager in state.managers():
        manager.shortages.has_told = True


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def leaks() -> list[str]:
    """Tell what is left when nothing should be."""
    found: list[str] = []
    for manager in state.managers():
        manager.settle()
        transfers, device = manager._transfers, manager.device
        facts: dict[str, Any] = {
            "storages": len(manager.storages()),
            "bytes of storages": sum(transfers.nbytes.values()),
            "owners": len(transfers._by_owner),
            "bytes in the swap file": device.file.allocated,
            "locked": manager._lock._is_owned(),
        }
        found += [f"{name}: {value}" for name, value in facts.items() if value]
    if state.local.running is not None:
        found.append(f"{state.local.running[0].label} still runs")
    if state.local.stack:
        found.append(f"modes: {len(state.local.stack)}")
    return found
