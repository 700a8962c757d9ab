"""The eviction policy: which storages leave memory first, and which are copied out behind the computation."""

from __future__ import annotations

import time
from collections.abc import Iterable

from chainer_ooc.planning.system import IN_FLIGHT
from chainer_ooc.swap.budget import MemoryBudget
from chainer_ooc.swap.recipe import Recipe
from chainer_ooc.swap.storage import State, Storage
from chainer_ooc.swap.transfers import Transfers

__all__ = ["EVERYTHING", "Evictor", "outside", "to_be_made"]

EVERYTHING = 1 << 62


class Evictor:
    """Free memory when it is short. Its caller holds the manager's lock.

    Storages with a valid copy leave before those that must be copied first. Among them go first the ones
    that backward has used, then the oldest, which backward needs last. Prefetched storages go last. A
    storage to which anything outside the graph refers stays: releasing it would free nothing.

    Args:
        transfers: Makes the transitions.
        budget: The limit, the watermarks and the memory in use.

    Attributes:
        leaving_first: Storages on their way out are released before those with a valid copy, because a plan
            chose them.
        discards: Storages with a recipe are discarded instead of copied out.
    """

    def __init__(self, transfers: Transfers, budget: MemoryBudget) -> None:
        self.leaving_first = False
        self.discards = True
        self._transfers = transfers
        self._budget = budget

    def reclaim(self, nbytes: int) -> None:
        """Evict storages until ``nbytes`` fit below the high watermark, or nothing is left to evict.

        Raises:
            SwapSpaceError: If there is no space outside of memory.
        """

        def excess() -> int:
            return self._budget.used_bytes() + nbytes - self._budget.high

        if excess() <= 0:
            return
        self._trim()
        steps = [self.release_clean, self._release_leaving, self.push_out, self._release_arrivals]
        if self.leaving_first:
            steps[:2] = [self._release_leaving, self.release_clean]
        for step in steps:
            missing = excess()
            if missing <= 0:
                return
            if step(missing):
                self._trim()
        if excess() > 0:
            self._trim(desperate=True)

    def release_clean(self, nbytes: int, used_only: bool = False) -> int:
        """Release storages with a valid copy: used ones first, then the oldest. Return the bytes freed."""
        if self._transfers.leaving:
            self.settle()
        freed = 0
        used, unused = _used_and_not(self._transfers.members(State.BOTH))
        for storage in used if used_only else used + unused:
            if freed >= nbytes:
                break
            freed += self.release_unless_held(storage)
        return freed

    def push_out(self, nbytes: int) -> int:
        """Copy storages out and release them: the oldest first, used ones last. Return the bytes freed.

        Storages with a recipe are discarded, unless the recipe of a discarded storage needs them.
        """
        freed = 0
        size = self._transfers.nbytes
        used, unused = _used_and_not(self._transfers.members(State.RESIDENT))
        for storage in unused + used:
            if freed + size[State.GOING_OUT] + size[State.CHECKING] >= nbytes:
                break
            if storage.state is not State.RESIDENT or storage.referenced_externally:
                continue
            if self._begin_discard(storage):
                if storage.state is State.DISCARDED:
                    freed += storage.nbytes
            else:
                self._transfers.begin_out(storage)
                if self._transfers.nbytes[State.GOING_OUT] > IN_FLIGHT:
                    freed += self._release_leaving(1)
        checked = size[State.CHECKING]
        freed += self._release_leaving(nbytes)
        if checked and freed < nbytes:  # what may not be discarded leaves with a copy
            freed += self.push_out(nbytes - freed)
        return freed

    def write_behind(self, nbytes: int) -> None:
        """Begin to copy the oldest storages out, until ``nbytes`` could be released without a wait."""
        self.settle()
        size = self._transfers.nbytes
        for storage in self._transfers.members(State.RESIDENT):
            if (
                size[State.BOTH] + size[State.GOING_OUT] >= nbytes
                or size[State.GOING_OUT] >= IN_FLIGHT
            ):
                return
            if storage.state is not State.RESIDENT or storage.used or storage.referenced_externally:
                continue
            if self._begin_discard(storage):
                nbytes -= storage.nbytes
            else:
                self._transfers.begin_out(storage)

    def _release_leaving(self, nbytes: int) -> int:
        """Wait for copies out and for checks, oldest first, and free their storages. Return the bytes freed."""
        freed = 0
        leaving = self._transfers.leaving
        while leaving and freed < nbytes:
            storage = leaving.popleft()()
            if storage is not None and storage.state is State.CHECKING:
                freed += self._transfers.end_discard(storage)
            elif storage is not None and storage.state is State.GOING_OUT:
                self._transfers.end_out(storage)
                freed += self.release_unless_held(storage)
        return freed

    def _release_arrivals(self, nbytes: int) -> int:
        """Release prefetched storages, the one needed last first. Return the bytes freed."""
        freed = 0
        for storage in self._transfers.members(State.COMING_IN):
            if freed >= nbytes:
                break
            if storage.state is State.COMING_IN:
                self._transfers.end_in(storage)
            freed += self.release_unless_held(storage)
        return freed

    def begin_ahead(self, storage: Storage, most: int) -> bool:
        """Prefetch a storage, or the inputs of its recipe, if memory stays below ``most`` bytes.

        Returns:
            Whether the copies began.
        """
        transfers = self._transfers
        wanted = [storage] if storage.state is State.OUT else outside(storage)
        nbytes = sum(one.nbytes for one in wanted)
        room = most - self._budget.used_bytes()
        if room < nbytes:
            room += self.release_clean(nbytes - room, used_only=True)
        if room < nbytes:
            return False
        for needed in wanted:
            try:
                transfers.begin_in(needed)
            except MemoryError:  # free memory is fragmented: fetch it when it is needed
                return False
            needed.ahead = True
            transfers.counters.prefetched += 1
        return True

    def give_up(self, storage: Storage) -> int:
        """Evict a storage because a plan says so: discard it or use its copy. Return the bytes freed."""
        if storage.recipe is not None:
            self.reclaim(storage.recipe.bytes_to_keep())
        goes = storage.state is State.RESIDENT and not storage.referenced_externally
        if goes and self._begin_discard(storage, planned=True):
            return storage.nbytes if storage.state is State.DISCARDED else 0
        return self.release_unless_held(storage)

    def release_unless_held(self, storage: Storage) -> int:
        """Release a storage with a valid copy unless anything else refers to it. Return the bytes freed."""
        if storage.state is not State.BOTH or storage.referenced_externally:
            return 0
        self._transfers.release(storage)
        return storage.nbytes

    def _begin_discard(self, storage: Storage, planned: bool = False) -> bool:
        """Discard a storage, or begin to check whether that may be. Return whether it needs no copy."""
        recipe = storage.recipe
        if not self.discards or recipe is None or (storage.dependents and not planned):
            return False
        verdict = recipe.check(self._transfers.device, storage, planned)
        if verdict is None or (verdict.done() and not verdict.equal()):
            return False
        try:
            self._transfers.begin_discard(storage, verdict)
        except MemoryError:  # no memory to copy its constants: it stays
            return False
        return True

    def settle(self) -> None:
        """Take note of the copies out and of the checks that have ended."""
        leaving = self._transfers.leaving
        while leaving:
            storage = leaving[0]()
            if storage is not None and storage.state is State.CHECKING:
                assert storage.verdict is not None
                if not storage.verdict.done():
                    return
                self._transfers.end_discard(storage)
            elif storage is not None and storage.state is State.GOING_OUT:
                assert storage.transfer is not None
                if not storage.transfer.done():
                    return
                self._transfers.end_out(storage)
            leaving.popleft()

    def _trim(self, desperate: bool = False) -> None:
        start = time.perf_counter()
        self._transfers.device.trim(desperate)
        self._transfers.stalled("trim", start)


def _used_and_not(storages: Iterable[Storage]) -> tuple[list[Storage], list[Storage]]:
    """Return the storages that backward has used, and the others."""
    parts: tuple[list[Storage], list[Storage]] = ([], [])
    for storage in storages:
        parts[storage.remaining_uses > 0].append(storage)
    return parts


def outside(storage: Storage) -> list[Storage]:
    """Return the storages to copy in for this one: itself, or the inputs that its recipe needs."""
    todo = [storage]
    found = {storage}
    for one in todo:
        for needed in (
            one.recipe.storages() if one.state is State.DISCARDED and one.recipe is not None else ()
        ):
            if needed not in found:
                found.add(needed)
                todo.append(needed)
    return [one for one in todo if one.state is State.OUT]


def to_be_made(wanted: Iterable[Storage]) -> list[tuple[Storage, Recipe]]:
    """Return the discarded storages to compute for ``wanted``, with their recipes, inputs first."""
    order: dict[Storage, Recipe] = {}
    todo = [*wanted][::-1]
    while todo:
        recipe = todo[-1].recipe
        assert recipe is not None
        first = [
            one for one in recipe.storages() if one.state is State.DISCARDED and one not in order
        ]
        if not first:
            order.setdefault(todo.pop(), recipe)
        todo += first[::-1]
    return list(order.items())
