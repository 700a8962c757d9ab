"""Agreement: the ranks of a run follow the same plans."""

from __future__ import annotations

from collections.abc import Mapping

from chainer_ooc import state
from chainer_ooc.graph.iteration import tracker_of
from chainer_ooc.planning.plan import Plan

__all__ = ["follow", "offers"]

#: What a plan takes for granted: the limit (bytes), and the graph with its storages.
Case = tuple[int, str]


def offers() -> dict[Case, str | None]:
    """Return the plans of this process as JSON; ``None`` for those that were slower than on demand."""
    return {
        (manager.limit, entry.identity): None
        if entry.slower_than_on_demand
        else entry.plan.to_json()
        for manager in state.managers()
        for entry in tracker_of(manager).plan_cache.entries.values()
    }


def follow(offered: Mapping[Case, str | None]) -> int:
    """Follow another process's plans from the next iteration on, where graph, storages and limit are the same.

    Args:
        offered: What :func:`offers` returned there.

    Returns:
        For how many graphs.
    """
    adopted = 0
    for manager in state.managers():
        for entry in tracker_of(manager).plan_cache.entries.values():
            case = manager.limit, entry.identity
            if case in offered:
                text = offered[case]
                entry.propose(None if text is None else Plan.from_json(text))
                adopted += 1
    return adopted
