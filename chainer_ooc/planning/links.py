"""Simulate the running copies on the links of a system."""

from __future__ import annotations

from collections import deque

from chainer_ooc.planning.system import Tier

__all__ = ["Link", "SimulatedTransfer"]


class SimulatedTransfer:
    """One copy that waits, runs, or has ended.

    Attributes:
        storage: The storage (index).
        inward: The copy comes in.
        left: The bytes that remain. The latency counts as bytes.
        start: When the first byte moved (seconds), -1 while it waits.
        end: When the copy ended (seconds), -1 before.
        link: The link that it uses.
    """

    __slots__ = ("end", "inward", "left", "link", "start", "storage")

    def __init__(self, link: Link, storage: int, inward: bool, left: float) -> None:
        self.link = link
        self.storage = storage
        self.inward = inward
        self.left = left
        self.start = self.end = -1.0


class Link:
    """The copies between memory and one tier, first come, first served in each queue.

    If both directions are busy and share bandwidth, each gets a part proportional to its own bandwidth.

    Args:
        tier: The tier, with its bandwidths.
    """

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.now = 0.0
        outward: deque[SimulatedTransfer] = deque()
        self._queues = (outward, outward if tier.one_queue else deque())
        self._rates = (tier.out_bandwidth, tier.in_bandwidth)
        together = tier.out_bandwidth + tier.in_bandwidth
        both = tier.both_bandwidth
        self._share = 1.0 if both is None else min(1.0, both / together)
        self._latency_bytes = tuple(tier.latency * rate for rate in self._rates)
        self._next_end = 0.0  # no copy ends before

    def begin(self, storage: int, nbytes: int, inward: bool, now: float) -> SimulatedTransfer:
        """Put a copy into its queue."""
        self._go(now)
        self._next_end = 0.0
        copy = SimulatedTransfer(self, storage, inward, nbytes + self._latency_bytes[inward])
        self._queues[inward].append(copy)
        return copy

    def cancel(self, copy: SimulatedTransfer) -> bool:
        """Remove a copy that has not started from its queue. Return whether that was possible."""
        if copy.start >= 0:
            return False
        self._queues[copy.inward].remove(copy)
        self._next_end = 0.0
        return True

    def advance(self, until: float) -> None:
        """End the copies that end up to ``until`` (seconds)."""
        if until >= self._next_end:
            self._go(until)

    def wait(self, copy: SimulatedTransfer) -> float:
        """Let time pass until ``copy`` has ended. Return its end (seconds)."""
        while copy.end < 0:
            self._pass(float("inf"))
        return copy.end

    @property
    def busy(self) -> bool:
        """Whether a copy is running."""
        return bool(self._queues[0] or self._queues[1])

    def _go(self, until: float) -> None:
        while self.now < until and self._pass(until):
            pass
        self.now = max(self.now, until)

    def _pass(self, until: float) -> bool:
        """Let time pass until a copy ends or ``until`` is reached. Return whether a copy has ended."""
        out, back = self._queues
        heads = []
        if out:
            heads.append(out[0])
        if back and back is not out:
            heads.append(back[0])
        if not heads:
            return False
        share = self._share if len(heads) == 2 else 1.0
        first, seconds = heads[0], float("inf")
        for copy in heads:
            if copy.start < 0:
                copy.start = self.now
            needed = copy.left / (self._rates[copy.inward] * share)
            if needed < seconds:
                first, seconds = copy, needed
        self._next_end = self.now + seconds
        ends = self._next_end <= until
        if not ends:
            seconds = until - self.now
        for copy in heads:
            copy.left -= self._rates[copy.inward] * share * seconds
        self.now += seconds
        if ends:
            first.end = self.now
            self._queues[first.inward].popleft()
            self._next_end = 0.0
        return ends
