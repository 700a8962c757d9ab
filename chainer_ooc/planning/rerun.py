"""Find the functions to run again for discarded storages."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from chainer_ooc.planning.profile import Profile, Rerun

__all__ = ["can_be_made_again", "chain"]


def chain(
    profile: Profile, wanted: Iterable[int], is_there: Callable[[int], bool]
) -> tuple[list[tuple[int, Rerun]], list[int]]:
    """Return the functions to run again to make some storages.

    Args:
        profile: The iteration.
        wanted: The storages to make (indexes). None of them exists.
        is_there: Returns whether a storage exists without a re-run.

    Returns:
        The forward steps with their re-runs, in order, and the existing storages that they read.

    Raises:
        ValueError: If a storage that is needed cannot be made again.
    """
    found: dict[int, Rerun] = {}
    reads: dict[int, None] = {}
    todo = list(wanted)
    while todo:
        i = todo.pop()
        number = profile.makers.get(i, -1)
        rerun = profile.steps[number].rerun if number >= 0 else None
        if rerun is None:
            storage = profile.storages[i]
            raise ValueError(
                f"storage {i} ({storage.label}) cannot be made again: it has no re-run"
            )
        if number in found:
            continue
        found[number] = rerun
        for read in rerun.reads:
            if is_there(read):
                reads[read] = None
            else:
                todo.append(read)
    return sorted(found.items()), list(reads)


def can_be_made_again(profile: Profile) -> tuple[int, ...]:
    """Return the saved storages (indexes) that re-runs can make from saved storages and leaves."""
    return tuple(i for i in profile.sources if profile.storages[i].uses)
