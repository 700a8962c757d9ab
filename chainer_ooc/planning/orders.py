"""In which order storages may be dropped: the planner drops the first so many of one of these orders."""

from __future__ import annotations

from collections.abc import Iterator

from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.rerun import can_be_made_again, chain

__all__ = ["Order", "orders", "units_of"]

#: How many kinds of functions are tried by themselves.
_KINDS = 4

Order = list[frozenset[int]]


def units_of(profile: Profile) -> Order:
    """Return what can be made again, together what one function makes, the cheapest per byte first."""
    made: dict[int, list[int]] = {}
    for i in can_be_made_again(profile):
        made.setdefault(profile.makers[i], []).append(i)
    costs = []
    for group in made.values():
        order, _ = chain(profile, group, lambda i: bool(profile.storages[i].uses))
        nbytes = sum(profile.storages[i].nbytes for i in group)
        costs.append((sum(rerun.seconds for _, rerun in order) / nbytes, group))
    return [frozenset(group) for _, group in sorted(costs)]


def orders(profile: Profile, units: Order) -> Iterator[Order]:
    """Yield orders in which units may be dropped: the first so many of one of them are.

    Args:
        profile: The iteration.
        units: What can be made again, the cheapest per byte first.
    """
    yield units
    # No re-run that needs another one.
    reads: dict[frozenset[int], set[int]] = {}
    for unit in units:
        _, needed = chain(profile, unit, lambda i: bool(profile.storages[i].uses))
        reads[unit] = set(needed)
    alone: Order = []
    dropped: set[int] = set()
    needed_by: set[int] = set()
    for unit in units:
        if not (unit & needed_by or reads[unit] & dropped):
            alone.append(unit)
            dropped |= unit
            needed_by |= reads[unit]
    yield alone
    # One kind of function after the other, the one with most bytes first.
    kinds: dict[str, Order] = {}
    for unit in units:
        kinds.setdefault(profile.storages[min(unit)].label, []).append(unit)
    nbytes = {
        kind: sum(profile.storages[i].nbytes for unit in order for i in unit)
        for kind, order in kinds.items()
    }
    for kind in sorted(kinds, key=lambda kind: -nbytes[kind])[:_KINDS]:
        yield kinds[kind]
    # Stretches between which something stays, so that re-runs do not need all that came before.
    forward = sorted(units, key=min)
    for length in (3, 6, 12, 2):
        yield [unit for n, unit in enumerate(forward) if n % (length + 1)]
