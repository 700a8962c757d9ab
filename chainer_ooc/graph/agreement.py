"""Agreement: the ranks of a run follow the same plans."""

from __future__ import annotations

from collections.abc import Mapping

from chainer_ooc import mode
from chainer_ooc.graph.following import follower_of
from chainer_ooc.planning.plan import Plan

__all__ = ["adopt", "offers"]

#: What a plan takes for granted: the limit (bytes), and the graph with its storages.
Case = tuple[int, str]


def offers() -> dict[Case, str | None]:
    """Return the plans of this process as JSON; ``None`` for those that were slower than on demand."""
    return {
        (manager.limit, page.identity): None if page.is_slower else page.plan.to_json()
        for manager in mode.managers()
        for page in follower_of(manager).book.pages.values()
    }


def adopt(offered: Mapping[Case, str | None]) -> int:
    """Follow another process's plans from the next iteration on, where graph, storages and limit are the same.

    Args:
        offered: What :func:`offers` returned there.

    Returns:
        For how many graphs.
    """
    adopted = 0
    for manager in mode.managers():
        for page in follower_of(manager).book.pages.values():
            case = manager.limit, page.identity
            if case in offered:
                text = offered[case]
                page.propose(None if text is None else Plan.from_json(text))
                adopted += 1
    return adopted
