"""Order the storages that may be recomputed: the search drops the first ones of some order."""

from __future__ import annotations

from collections.abc import Iterator

from chainer_ooc.planning.profile import Profile
from chainer_ooc.planning.rerun import can_be_made_again, chain

__all__ = ["Order", "candidate_orders", "recompute_candidates"]

#: The number of kinds of functions that are tried by themselves.
_KINDS = 4

Order = list[frozenset[int]]


def recompute_candidates(profile: Profile) -> Order:
    """Return groups of storages that can be made again, one per function, cheapest per byte first."""
    made: dict[int, list[int]] = {}
    for i in can_be_made_again(profile):
        made.setdefault(profile.makers[i], []).append(i)
    costs = []
    for group in made.values():
        order, _ = chain(profile, group, lambda i: bool(profile.storages[i].uses))
        nbytes = sum(profile.storages[i].nbytes for i in group)
        costs.append((sum(rerun.seconds for _, rerun in order) / nbytes, group))
    return [frozenset(group) for _, group in sorted(costs)]


def candidate_orders(profile: Profile, units: Order) -> Iterator[Order]:
    """Yield orders of the groups. The search drops a first part of one of them.

    Args:
        profile: The iteration.
        units: The groups of storages that can be made again, cheapest per byte first.
    """
    yield units
    for depth in (1, 2, 4):
        yield _chains(profile, units, depth)
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
    # Segments between checkpoints, so that re-runs do not need everything before.
    forward = sorted(units, key=min)
    for length in (3, 6, 12, 2):
        yield [unit for n, unit in enumerate(forward) if n % (length + 1)]


def _chains(profile: Profile, units: Order, most: int) -> Order:
    """Choose candidates so that no recomputation chain exceeds ``most``, cheapest first."""
    reads: dict[frozenset[int], set[int]] = {}
    for unit in units:
        _, needed = chain(profile, unit, lambda i: bool(profile.storages[i].uses))
        reads[unit] = set(needed)
    readers: dict[int, list[frozenset[int]]] = {}
    for unit, read in reads.items():
        for i in read:
            readers.setdefault(i, []).append(unit)
    of = {i: unit for unit in units for i in unit}
    # The length of the chain of re-runs down to each chosen unit, and up from it.
    down: dict[frozenset[int], int] = {}
    up: dict[frozenset[int], int] = {}

    def below(unit: frozenset[int]) -> list[frozenset[int]]:
        return [of[i] for i in reads[unit] if i in of and of[i] in down]

    def above(unit: frozenset[int]) -> list[frozenset[int]]:
        return [reader for i in unit for reader in readers.get(i, ()) if reader in up]

    chosen: Order = []
    for unit in units:
        lower = 1 + max((down[other] for other in below(unit)), default=0)
        upper = 1 + max((up[other] for other in above(unit)), default=0)
        if lower + upper - 1 > most:
            continue
        chosen.append(unit)
        for lengths, length, further in ((down, lower, above), (up, upper, below)):
            lengths[unit] = length
            todo = [unit]
            while todo:
                current = todo.pop()
                for other in further(current):
                    if lengths.get(other, 0) <= lengths[current]:
                        lengths[other] = lengths[current] + 1
                        todo.append(other)
    return chosen
