"""The least limit that suffices, as far as a run has shown it, and the warning when the limit in force does not."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import NamedTuple

from chainer_ooc import wording
from chainer_ooc.planning.system import MARGIN
from chainer_ooc.swap.devices.protocol import Device
from chainer_ooc.wording import mib

__all__ = ["Shortage", "Shortages"]

#: The warning waits for the end of the second iteration from the first shortage on: the first has no gradients and no
#: state of the optimizer when it begins.
_TURNS = 2
#: It waits no longer than this (seconds).
_PATIENCE = 60.0
#: So many iterations in a row must need more than the limit before it counts as out of reach, and after so many more it
#: is tried again.
_CERTAIN, _AGAIN = 2, 100
#: What needs more than what is known by less than this does not change the description of the largest shortage.
_LARGER = 1.01
#: What the process may take for itself later (bytes), if that counts against the limit: modules, plans, fragments.
_LATER = 8 << 20


class Shortage(NamedTuple):
    """An allocation that does not fit, and what is in memory then (bytes).

    Attributes:
        what: The name of what runs.
        nbytes: The size of the allocation.
        used: The memory in use: nothing more can leave.
        limit: The limit.
        saved: The part of ``used`` that saved arrays take.
        held: The part of ``saved`` that something besides the graph refers to.
        lasting: The part of ``used`` that parameters, gradients and state take that can move.
    """

    what: str
    nbytes: int
    used: int
    limit: int
    saved: int
    held: int
    lasting: int = 0

    @property
    def need(self) -> int:
        """The bytes that have to be in memory at one time."""
        return self.used + self.nbytes


class Shortages:
    """Remember the most memory that was needed at one time, and warn once that the limit is below it.

    The first function that does not fit says little: those after it, gradients and the optimizer's state may
    need more. So the warning comes when a whole iteration with all of these has ended, and names the limit
    that it needs. It comes earlier if memory may run out, and at the end of the process at the latest.

    Args:
        device: The memory.

    Attributes:
        floor_bytes: The most bytes that had to be in memory at one time, 0 while nothing is known.
        has_told: There was a warning.
        raised_bytes: What has to be in memory at one time in each iteration, with all gone that can leave, if that is
            more than the limit; else 0. To move anything while less is in memory would not lower the peak.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.floor_bytes = 0
        self._knows_an_iteration = False
        self._largest: Shortage | None = None
        self.has_told = self._backward = False
        self._turns = 0
        self._start = 0.0
        self.raised_bytes = 0
        self._need = self._age = (
            0  # the largest of this iteration; how many iterations it has been raised
        )
        self._needs: deque[int] = deque(maxlen=_CERTAIN)
        self._ran_backward = False

    def note_floor(self, nbytes: int) -> None:
        """Note the most that a whole iteration needs at one time (bytes)."""
        self.floor_bytes = max(self.floor_bytes, nbytes)
        self._knows_an_iteration = True

    @property
    def exceeds_limit(self) -> bool:
        """Whether more was needed than the limit."""
        return self._largest is not None

    @property
    def least_limit(self) -> int:
        """The least limit (bytes) that suffices, as far as is known; 0 while nothing is."""
        return self.limit_for(self.floor_bytes, 1 - MARGIN) if self.floor_bytes else 0

    def limit_for(self, nbytes: int, share: float) -> int:
        """Return the least limit of which ``nbytes`` in use take no more than ``share``."""
        later = 0 if self._device.asks_for_room else _LATER
        return math.ceil((nbytes + later) / share)

    def note_need(self, need: int) -> bool:
        """Take note of ``need`` bytes beyond the limit. Return whether :meth:`note` should get the details."""
        self.floor_bytes = max(self.floor_bytes, need)
        largest = self._largest
        return not self.has_told and (largest is None or need > _LARGER * largest.need)

    def note(self, shortage: Shortage) -> None:
        """Remember the largest shortage so far."""
        if self._largest is None:
            self._start = time.monotonic()
        self._largest = shortage
        if shortage.need > self._device.capacity():
            self.tell()

    def ended(self, backward: bool) -> None:
        """Note that a function has ended, and warn if enough is known by now."""
        if self._ran_backward and not backward:
            self._end_iteration()
        self._ran_backward = backward
        if self._largest is None or self.has_told:
            return
        self._turns += self._backward and not backward
        self._backward = backward
        if self._turns >= _TURNS:
            self._knows_an_iteration = True
            self.tell()
        elif time.monotonic() - self._start > _PATIENCE:
            self.tell()

    def note_held(self, need: int) -> None:
        """Note that ``need`` bytes had to be in memory at one time, more than the limit."""
        self._need = max(self._need, need)
        if self.raised_bytes:
            self.raised_bytes = max(self.raised_bytes, need)

    def _end_iteration(self) -> None:
        self._needs.append(self._need)
        self._need = 0
        if self.raised_bytes:
            self._age += 1
            if self._age > _AGAIN:
                self.raised_bytes = self._age = 0
                self._needs.clear()
        elif len(self._needs) == _CERTAIN:
            self.raised_bytes = min(self._needs)

    def tell(self) -> None:
        """Warn of the largest shortage, unless there was none or a warning before."""
        if self._largest is not None and not self.has_told:
            self.has_told = True
            wording.warn(self.explain(self._largest))

    def explain(self, shortage: Shortage) -> str:
        """Return a message: what fills the memory, and what would help."""
        what, nbytes, used, limit, saved, held, lasting = shortage
        # Small ones, and those of which a function needs the memory, stay.
        moved = (
            f"{mib(lasting)} by parameters, gradients and state that can move, " if lasting else ""
        )
        rest = "temporaries, what is small" if lasting else "parameters, gradients, temporaries"
        least = self.limit_for(max(shortage.need, self.floor_bytes), 1 - MARGIN)
        later = "" if self._knows_an_iteration else "; what runs later may need more"
        return (
            f"{what} needs {mib(nbytes)} more, and {mib(used)} of the limit of {mib(limit)} are in use: "
            f"{mib(held)} by saved arrays that something else holds, {mib(saved - held)} by other saved arrays, {moved}"
            f"{mib(used - saved - lasting)} by {rest} and the interpreter. It needs "
            f"limit={least} ({mib(least)}) or a smaller batch{later}."
        )
