"""The states of a storage, and the storages in each: of the engine and of the simulator alike."""

from __future__ import annotations

import enum
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import Generic, TypeVar

__all__ = ["AWAY", "ByState", "State"]

T = TypeVar("T")


class State(enum.Enum):
    """Where the bytes of a storage are."""

    __hash__ = object.__hash__  # Enum's is a slow Python function

    RESIDENT = "resident"  #: in the device's memory alone
    GOING_OUT = "going out"  #: resident, and a copy is being written
    CHECKING = (
        "checking"  #: resident; discarded if nobody has written to it, which is being found out
    )
    BOTH = "both"  #: resident and clean: a valid copy is outside
    OUT = "out"  #: outside alone
    DISCARDED = "discarded"  #: nowhere: its recipe computes it again
    COMING_IN = "coming in"  #: outside, and being read into memory
    DROPPED = "dropped"  #: nowhere: its last use is over

    in_memory: bool  #: whether they are in the device's memory, ready to be used


for _state in State:  # an attribute is read faster than a property
    _state.in_memory = _state in (State.RESIDENT, State.GOING_OUT, State.CHECKING, State.BOTH)

#: Not in memory, and not coming in.
AWAY = (State.OUT, State.DISCARDED)


#: The states whose members the policy goes through.
_LISTED = (State.RESIDENT, State.BOTH, State.COMING_IN)


class ByState(Generic[T]):
    """Keep storages by state, those of a state in the order of saving.

    Attributes:
        nbytes: The size of all storages in each state (bytes): running sums.
        storages: All storages by their number, the order of saving.
    """

    def __init__(self) -> None:
        self.nbytes = dict.fromkeys(State, 0)
        self.storages: dict[int, T] = {}
        self._numbers: dict[State, list[int]] = {state: [] for state in _LISTED}

    def add(self, number: int, storage: T, nbytes: int) -> None:
        """Add the storage that was saved as the ``number``-th. It is RESIDENT."""
        self.storages[number] = storage
        insort(self._numbers[State.RESIDENT], number)
        self.nbytes[State.RESIDENT] += nbytes

    def move(self, number: int, nbytes: int, before: State, after: State) -> None:
        """Note that a storage has changed its state."""
        listed = self._numbers
        if before in listed:
            numbers = listed[before]
            del numbers[bisect_left(numbers, number)]
        if after in listed:
            insort(listed[after], number)
        self.nbytes[before] -= nbytes
        self.nbytes[after] += nbytes

    def remove(self, number: int, nbytes: int, state: State) -> None:
        """Remove a storage."""
        if state in self._numbers:
            numbers = self._numbers[state]
            del numbers[bisect_left(numbers, number)]
        del self.storages[number]
        self.nbytes[state] -= nbytes

    def members(self, state: State) -> Iterator[T]:
        """Yield the storages in a state, in the order of saving. They may change their states meanwhile.

        The state is RESIDENT, BOTH or COMING_IN.
        """
        numbers, storages = self._numbers[state], self.storages
        place = 0
        while place < len(numbers):
            number = numbers[place]
            yield storages[number]
            if place < len(numbers) and numbers[place] == number:
                place += 1
            else:
                place = bisect_right(numbers, number)
