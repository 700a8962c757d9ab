"""Compute a lower bound of the step time under a limit, for any choice of keep, swap and recompute."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from chainer_ooc.planning.profile import BACKWARD, Profile
from chainer_ooc.planning.rerun import can_be_made_again
from chainer_ooc.planning.system import System

__all__ = ["lower_bound"]

#: The bound uses at most this many steps of an iteration: fewer steps, a weaker bound.
_KNOTS = 500
#: The number of amounts of recomputed bytes that are distinguished.
_AMOUNTS = 24
#: Up to this many storages, absent bytes are a sum of whole storages.
_FEW = 12


def lower_bound(profile: Profile, system: System) -> float:
    """Return a time (seconds) that no execution under the limit goes below.

    An execution runs the steps one after the other; between two of them it may begin copies, give up
    memory and run functions again for backward. A storage that comes in takes its memory from the begin of
    its copy; one that goes out frees it at the end.

    Let ``c_k`` be the time of step ``k``, ``t_k`` its start in some execution, ``C(j, k)`` the time of steps
    ``j`` to ``k - 1``, and ``M_k`` what step ``k`` needs beyond the limit if everything is in memory that has
    been saved and backward has yet to use. So storages of at least ``M_k`` bytes are not in memory
    while ``k`` runs, and none of them is one that ``k`` needs.

    1. ``t_k >= t_j + C(j, k)``.
    2. (In.) Of what is not in memory while ``j`` runs, at most ``L(j, k)`` bytes are used after step
       ``k``: all that is alive at ``j``, not needed by it, and next used after ``k``. The rest, ``b =
       M_j - L(j, k)``, comes back between the end of ``j`` and the start of ``k``, over the link (bandwidth
       ``B``) or by re-runs. If compute spends ``u`` seconds there beyond the steps, waiting or running
       functions again, the link brings at most ``B (C(j+1, k) + u)`` bytes and re-runs make at most ``r(u)``, the most
       bytes that ``u`` seconds of re-runs can make (taken with fractions, and with each chain charged only
       what no other chain can share). So ``u >= g^-1(b - B C(j+1, k))`` with ``g(u) = B u + r(u)``, which is
       increasing.
    3. (Out.) Let ``R`` be the bytes of all storages that the execution drops, to be made again. Of the at
       least ``M_k`` bytes that are not in memory at ``k``, at most ``N(j, k)`` could begin to leave before the end of
       ``j``: what is free by the start of ``j``. So at least ``M_k - N(j, k) - R`` bytes went out between the end of
       ``j`` and ``t_k``.
    4. Re-runs are done for backward, after the first of its steps, ``f``, is due. They take at least
       ``r^-1(R)``, so ``T >= t_f + C(f, end) + r^-1(R)``.
    5. Where both directions share bandwidth, ``M_k - R`` bytes pass it twice.

    Given ``R``, the longest path over 1 to 3 bounds each ``t_k`` and the end, and it falls as ``R`` rises, while
    ``r^-1(R)`` rises. ``R`` is unknown: between two amounts next to each other the bound takes the greater one in 1 to
    3 and 5 and the lesser in 4, and the least over all such pairs holds for every ``R``.
    """
    count = len(profile.steps)
    if not count:
        return 0.0
    storages = [profile.storages[i] for i in profile.saved]
    nbytes = np.array([s.nbytes for s in storages], np.float64)
    producer = np.array([s.producer for s in storages], np.int64)
    free_from = np.array([s.free_from for s in storages], np.int64)
    last = np.array([s.uses[-1] for s in storages], np.int64)
    seconds = np.array([s.seconds for s in profile.steps])
    begin = np.concatenate([[0.0], np.cumsum(seconds)])
    change = np.zeros(count + 1)
    np.add.at(change, producer, nbytes)
    np.add.at(change, last + 1, -nbytes)
    own = np.array([s.held_bytes + s.workspace_bytes for s in profile.steps], np.float64)
    missing = np.cumsum(change[:-1]) + own + profile.fixed_bytes - system.high_bytes
    missing = np.concatenate([np.maximum(missing, 0.0), [0.0]])
    if not missing.any():
        return float(begin[-1])
    out_rate = sum(tier.out_bandwidth for tier in system.tiers)
    in_rate = sum(tier.in_bandwidth for tier in system.tiers)
    reruns = _Reruns(profile)
    rerun_bytes, rerun_seconds = reruns.curve(np.ones(len(storages), bool))
    knots = _choose(missing)
    size = len(knots)
    # The computation's extra time between knots (2), and the bytes that must leave between them (3).
    extra = np.zeros((size, size))
    out = np.zeros((size, size))
    using = np.array([s.uses[0] for s in storages], np.int64)
    passed = sorted(
        (before, i, after)
        for i, s in enumerate(storages)
        for before, after in pairwise((*s.uses, s.uses[-1] + 1))
    )
    position = 0
    for a, step in enumerate(knots[:-1]):
        alive = (producer <= step) & (last >= step)
        while position < len(passed) and passed[position][0] < step:
            _, i, using[i] = passed[position]
            position += 1
        absent_able = alive & (using > step) & (free_from <= step)
        missing[step] = _whole(missing[step], nbytes[absent_able])
        later = np.bincount(using[absent_able], nbytes[absent_able], count + 2)
        later = np.cumsum(later[::-1])[::-1]
        b = missing[step] - later[knots[a + 1 :] + 1]
        b -= in_rate * (begin[knots[a + 1 :]] - begin[step + 1])
        if b.max() > 0:
            by_rerun, again = reruns.curve(absent_able)
            extra[a, a + 1 :] = _inverse(b, in_rate * again + by_rerun, again, in_rate)
        leaving = np.bincount(free_from[absent_able], nbytes[absent_able], count + 2)
        out[: a + 1, a] = missing[step] - np.cumsum(leaving)[knots[: a + 1]]
    amounts = np.linspace(0.0, float(rerun_bytes[-1]), _AMOUNTS)
    times = begin[knots]
    alone = (begin[np.minimum(knots + 1, count)] - times)[:, None]
    earliest = np.zeros((size, _AMOUNTS))
    first = next((n for n, s in enumerate(profile.steps) if s.phase == BACKWARD), count)
    before_backward = int(np.searchsorted(knots, first))
    for k in range(1, size):
        span = (times[k] - times[:k])[:, None]
        by_link = alone[:k] + (out[:k, k, None] - amounts) / out_rate
        earliest[k] = (earliest[:k] + np.maximum(span + extra[:k, k, None], by_link)).max(axis=0)
    again = np.interp(amounts, rerun_bytes, rerun_seconds)
    most = float(np.max(missing))
    twice = np.maximum(most - amounts, 0.0) * _seconds_per_byte_both(system)
    result = np.inf
    for low in range(_AMOUNTS - 1):
        high = low + 1
        whole = earliest[before_backward, high] + begin[-1] - times[before_backward] + again[low]
        result = min(result, max(earliest[-1, high], whole, twice[high]))
    if rerun_bytes[-1] == 0:
        result = max(earliest[-1, 0], twice[0])
    return float(result)


def _choose(missing: np.ndarray) -> np.ndarray:
    """Return the steps at which the bound is evaluated: all, or the tight ones and some evenly spaced."""
    count = len(missing)
    if count <= _KNOTS:
        return np.arange(count)
    spaced = np.linspace(0, count - 1, _KNOTS // 2).astype(int)
    tight = np.argsort(-missing, kind="stable")[: _KNOTS // 2]
    return np.unique(np.concatenate([spaced, tight, [0, count - 1]]))


def _whole(missing: float, sizes: np.ndarray) -> float:
    """Return the least sum of whole ``sizes`` that is at least ``missing``; with many sizes ``missing`` itself."""
    if missing <= 0 or not len(sizes):
        return missing
    if len(sizes) > _FEW:
        return missing
    sums = np.zeros(1)
    for size in sizes:
        sums = np.concatenate([sums, sums + size])
    enough = sums[sums >= missing]
    return float(np.min(enough)) if len(enough) else missing


class _Reruns:
    """The bytes that re-runs can make in a given time."""

    def __init__(self, profile: Profile) -> None:
        readers: dict[int, int] = {}
        for step in profile.steps:
            for i in set(step.rerun.reads) if step.rerun else ():
                readers[i] = readers.get(i, 0) + 1
        makes: dict[int, list[int]] = {}
        place = {i: n for n, i in enumerate(profile.saved)}
        for i in can_be_made_again(profile):
            makes.setdefault(profile.makers[i], []).append(place[i])

        def seconds_of(number: int) -> float:
            rerun = profile.steps[number].rerun
            assert rerun is not None
            total = rerun.seconds
            for i in rerun.reads:
                # Unsaved inputs must be made as well. They are charged to a re-run only if no other reads them.
                maker = profile.makers.get(i, -1)
                if not profile.storages[i].uses and readers[i] == 1 and maker not in makes:
                    total += seconds_of(maker)
            return total

        self._seconds = np.array([seconds_of(number) for number in makes])
        self._bytes = np.zeros((len(makes), len(place)))
        for row, made in enumerate(makes.values()):
            for column in made:
                self._bytes[row, column] = profile.storages[profile.saved[column]].nbytes

    def curve(self, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the corners of a concave curve: the most bytes that re-runs can make in a given time.

        Args:
            of: Whether each saved storage counts.
        """
        if not len(self._seconds):
            return np.zeros(1), np.zeros(1)
        nbytes = self._bytes @ of
        some = nbytes > 0
        nbytes, seconds = nbytes[some], self._seconds[some]
        order = np.argsort(seconds / nbytes, kind="stable")
        corners = np.zeros((2, len(order) + 1))
        corners[:, 1:] = np.cumsum([nbytes[order], seconds[order]], axis=1)
        return corners[0], corners[1]


def _inverse(value: np.ndarray, speeds: np.ndarray, seconds: np.ndarray, rate: float) -> np.ndarray:
    """Return the seconds that link and re-runs together need for ``value`` bytes."""
    inside = np.interp(value, speeds, seconds)
    beyond = np.maximum(value - speeds[-1], 0.0) / rate
    return np.where(value > 0, inside + beyond, 0.0)


def _seconds_per_byte_both(system: System) -> float:
    """Return the least seconds that the links need to move a byte out and back in."""
    rates = 0.0
    for tier in system.tiers:
        if tier.one_queue:
            rates += 1 / (1 / tier.out_bandwidth + 1 / tier.in_bandwidth)
        elif tier.both_bandwidth is not None:
            rates += tier.both_bandwidth / 2
        else:
            return 0.0
    return 1 / rates
