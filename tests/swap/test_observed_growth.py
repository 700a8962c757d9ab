"""ObservedGrowth: what a kind of call took at the most is what it will take."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

import pytest

from chainer_ooc.swap import observed_growth
from chainer_ooc.swap.observed_growth import MEASURED, REMEMBERED, ObservedGrowth
from chainer_ooc.swap.system.memory import ResidentMemory

MIB = 1 << 20

pytestmark = pytest.mark.skipif(
    not ResidentMemory.reset_peak(), reason="this kernel keeps no peak that can be reset"
)


def take(nbytes):
    """Have ``nbytes`` more resident, for a moment."""
    with mmap.mmap(-1, nbytes) as memory:
        address = ctypes.addressof(view := ctypes.c_char.from_buffer(memory))
        ctypes.memset(address, 1, nbytes)
        del view


def observe(growth, kind, nbytes, call=take):
    start = growth.begin(kind, ResidentMemory().bytes())
    call(nbytes)
    return growth.end(kind, start, ResidentMemory().bytes())


@pytest.fixture
def growth():
    return ObservedGrowth()


@pytest.fixture
def high_peak():
    """The process has once had far more memory than it has now."""
    take(256 * MIB)


def about(nbytes):
    return pytest.approx(nbytes, abs=2 * MIB)


def test_what_was_seen_is_expected(growth, high_peak):
    assert growth.expected("a", otherwise=7) == 7
    assert observe(growth, "a", 32 * MIB) == about(32 * MIB)
    observe(growth, "b", 8 * MIB)
    assert growth.expected("a", otherwise=7) == about(32 * MIB)
    assert growth.expected("b", otherwise=7) == about(8 * MIB)


def test_the_peak_of_the_process_is_what_it_was(growth, high_peak):
    before = ResidentMemory.peak_bytes()
    observe(growth, "a", 32 * MIB)
    assert ResidentMemory.peak_bytes() == before
    assert ResidentMemory.peak_since_reset() < before - 100 * MIB
    pid = os.fork()
    if not pid:  # a child has a peak of its own
        os._exit(ResidentMemory.peak_bytes() > before - 100 * MIB)
    assert os.waitpid(pid, 0)[1] == 0


def test_what_only_the_first_calls_took_is_forgotten(growth, high_peak):
    observe(growth, "a", 64 * MIB)
    for _ in range(REMEMBERED - 1):
        observe(growth, "a", 8 * MIB)
    assert growth.expected("a", 0) == about(64 * MIB)
    observe(growth, "a", 8 * MIB)
    assert growth.expected("a", 0) == about(8 * MIB)


def test_later_calls_are_seen_where_they_raise_the_peak(growth):
    for _ in range(MEASURED):
        observe(growth, "a", MIB)
    take(128 * MIB)
    assert observe(growth, "a", 64 * MIB) is None
    assert growth.expected("a", 0) == about(MIB)
    more = ResidentMemory.peak_bytes() - ResidentMemory().bytes() + 64 * MIB
    assert observe(growth, "a", more) == about(more)
    assert growth.expected("a", 0) == about(more)


def test_where_the_peak_cannot_be_reset_new_peaks_are_seen(growth, monkeypatch):
    ResidentMemory.reset_peak()  # of the tests before, which may have been a gigabyte
    take(256 * MIB)
    monkeypatch.setattr(ResidentMemory, "reset_peak", staticmethod(lambda: False))
    assert observe(growth, "a", 32 * MIB) is None
    more = ResidentMemory.peak_bytes() - ResidentMemory().bytes() + 64 * MIB
    assert observe(growth, "a", more) == about(more)


def test_where_the_kernel_keeps_no_peak_nothing_is_seen(growth, monkeypatch):
    monkeypatch.setattr(ResidentMemory, "peak_since_reset", staticmethod(lambda: 0))
    assert observe(growth, "a", 32 * MIB) is None
    assert growth.expected("a", 7) == 7


def test_what_arrives_meanwhile_is_not_the_calls(growth, high_peak):
    arrived = mmap.mmap(-1, 24 * MIB)

    def call(nbytes):
        arrived.write(b"1" * 24 * MIB)
        take(nbytes)

    start = growth.begin("a", ResidentMemory().bytes() + 24 * MIB)
    call(32 * MIB)
    # The bytes of ``write`` are this call's own, as long as they are there: fewer than it takes itself.
    assert growth.end("a", start, ResidentMemory().bytes()) == about(32 * MIB)


def test_one_thread_measures_at_a_time(growth, high_peak):
    start = growth.begin("a", 0)
    found = []
    thread = threading.Thread(target=lambda: found.append(growth.begin("a", 0)))
    thread.start()
    thread.join()
    assert found == [None]
    growth.end("a", start, 0)
    observe(growth, "a", MIB)


def test_the_kinds_that_ran_last_are_remembered(growth, monkeypatch):
    monkeypatch.setattr(observed_growth, "KINDS", 2)
    for kind in ("a", "b", "a", "c"):
        observe(growth, kind, MIB)
    assert [growth.expected(kind, -1) >= 0 for kind in "abc"] == [True, False, True]
