"""MemoryBudget: how often the system is asked where memory stands."""

from __future__ import annotations

import pytest

from chainer_ooc.settings import Settings
from chainer_ooc.swap.budget import MemoryBudget


class Device:
    """Memory that counts how often it is asked."""

    def __init__(self):
        self.used = self.asked = 0

    def used_bytes(self):
        self.asked += 1
        return self.used

    def set_cached_limit(self, nbytes):
        self.referenced_externally = nbytes


class Memory:
    def __init__(self, limit=1000):
        self.device = Device()
        self.settings = Settings(limit=limit)
        self.budget = MemoryBudget(self.device, lambda: self.settings)

    def are_far(self, nbytes):
        return self.budget.are_far(nbytes, self.settings)


@pytest.fixture
def memory():
    return Memory()  # the low-water mark is at 800


def test_it_is_far_below_the_low_water_mark_only(memory):
    assert memory.are_far(800)
    assert not memory.are_far(801)
    memory.device.used = 700
    assert memory.are_far(100)
    assert not memory.are_far(101)


def test_what_may_have_been_taken_adds_up_until_the_system_is_asked_again(memory):
    assert [memory.are_far(100) for _ in range(8)] == [True] * 8
    assert memory.device.asked == 1
    memory.device.used = 300  # less than was announced
    assert [memory.are_far(100) for _ in range(5)] == [True] * 5
    assert memory.device.asked == 2
    memory.device.used = 800
    assert not memory.are_far(100)
    assert memory.device.asked == 3


def test_functions_that_take_nothing_ask_now_and_then(memory):
    for _ in range(66):
        assert memory.are_far(1)
    assert memory.device.asked == 2  # at the first, and at the 66th
    for _ in range(64):
        memory.are_far(1)
    assert memory.device.asked == 2
    memory.are_far(1)
    assert memory.device.asked == 3


def test_under_other_settings_it_is_asked_at_once(memory):
    assert memory.are_far(100)
    memory.settings = Settings(limit=100)
    assert not memory.are_far(100)
    assert memory.device.asked == 2
    assert memory.device.referenced_externally == 98


def test_what_is_free_is_asked_once(memory):
    """Later it would be less by what was taken."""
    free = iter([5000, 1000])
    memory.device.capacity = lambda: next(free)
    for limit in (None, 700, None):
        memory.settings = Settings(limit=limit)
        assert memory.budget.limit == (limit or 5000)
