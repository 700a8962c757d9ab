"""Make all ranks of a run follow the same plans."""

from __future__ import annotations

from collections.abc import Mapping

from chainer_ooc import state
from chainer_ooc.graph.iteration import tracker_of
from chainer_ooc.planning.plan import Plan

__all__ = ["follow", "offers"]

#: The conditions of a plan: the limit (bytes), and the identity of the graph with its storages.
Case = tuple[int, str]


def offers() -> dict[Case, str | None]:
    """Return this process's plans as JSON, with ``None`` for plans that were slower than on demand."""
    return {
        (manager.limit, entry.identity): None
        if entry.slower_than_on_demand
        else entry.plan.to_json()
        for manager in state.managers()
        for entry in tracker_of(manager).plan_cache.entries.values()
    }


def follow(offered: Mapping[Case, str | None]) -> int:
    """Follow another process's plans from the next iteration on, for equal graphs, storages and limits.

    Args:
        offered: The result of :func:`offers` in the other process.

    Returns:
        The number of graphs whose plan was taken over.
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
