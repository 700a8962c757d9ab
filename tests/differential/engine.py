"""What the differential tests know of the engine's insides."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from typing import Any

import psutil

import chainer_ooc
from chainer_ooc import runtime, state
from chainer_ooc.planning import plan_cache, search
from chainer_ooc.swap.devices.ram import RamDevice
from chainer_ooc.swap.manager import SwapManager

__all__ = ["be_quiet", "leaks", "prepare", "resident_bytes", "slow_copies"]

#: What counts as used by something else: memory is always past the low watermark (bytes).
_OTHER = 8 << 20


def prepare(contender: str, constants: dict[str, int]) -> None:
    """Prepare out-of-core mode before it is turned on.

    Args:
        contender: ``"out of core"``, or ``"no hook"``: NumPy's allocator stays as it is.
        constants: Sizes from which allocations are announced, and lie in the pool (bytes).
    """
    state._ANNOUNCED, state._POOLED = constants["announced"], constants["pooled"]
    runtime._inherit = _inherit
    if contender == "no hook":
        state.hook_allocations = lambda: None


def _inherit() -> None:
    """Do without the line that a child trains in core."""
    state.process.inherit = None


@contextlib.contextmanager
def slow_copies(directory: str, above: int) -> Iterator[None]:
    """Turn out-of-core mode on so that plans run functions again: copies count as slow, and only saved arrays as used.

    Args:
        directory: Where the swap file is made.
        above: How many bytes of saved arrays may be in memory.
    """

    def used_bytes(device: RamDevice) -> int:
        (manager,) = state.managers()
        everything = manager._transfers.everything()
        return _OTHER + sum(one.nbytes for one in everything if one.owner is not None)

    with contextlib.ExitStack() as stack:
        for holder, name, value in (
            (SwapManager, "bandwidths", lambda self, otherwise: (1e6, 1e6)),
            (RamDevice, "used_bytes", used_bytes),
            (plan_cache, "_WORSE", float("inf")),
            (search, "EFFORT", 1000),
        ):
            stack.enter_context(unittest.mock.patch.object(holder, name, value))
        limit = _OTHER + above
        mode = chainer_ooc.out_of_core_mode(swap_dir=directory, limit=limit, min_bytes=1)
        stack.enter_context(mode)
        be_quiet()
        yield


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
