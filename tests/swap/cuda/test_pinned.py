"""Free blocks and the page-locked slab: exact sizes, merged, under a cap, made ahead."""

from __future__ import annotations

import random
import threading
import weakref

import pytest

from chainer_ooc.swap.tiers.free_blocks import FreeBlocks
from chainer_ooc.swap.tiers.pinned import CHUNK, PinnedSlab
from chainer_ooc.swap.tiers.pinned import _abandoned as abandoned

MIB = 1 << 20


AHEAD = "chainer_ooc-pin"


class Registry:
    """What is page-locked, up to ``most`` bytes. What is made ahead is held up until ``go``."""

    def __init__(self, most=1 << 40):
        self.regions = {}
        self.most = most
        self.asked = []
        self.threads = []
        self.go = threading.Event()
        self.go.set()

    def register(self, address, nbytes):
        if threading.current_thread().name == AHEAD:
            self.go.wait(30)
        self.asked.append(nbytes)
        if sum(self.regions.values()) + nbytes > self.most:
            raise RuntimeError("cudaErrorMemoryAllocation")
        self.regions[address] = nbytes
        self.threads.append(threading.current_thread().name)

    def unregister(self, address):
        del self.regions[address]

    def slab(self, limit):
        return PinnedSlab(limit, self.register, self.unregister)

    def hold_until_waited_for(self, slab):
        """Hold up what ``slab`` makes ahead until somebody waits for it."""
        self.go.clear()
        wait = slab.wait

        def go_and_wait():
            self.go.set()
            wait()

        slab.wait = go_and_wait


def test_free_blocks_against_a_model():
    rng = random.Random(1)
    blocks, taken, model = FreeBlocks(), {}, set()
    for start in (0, 500):  # neighbours that must not be merged
        blocks.add_region(start, 500)
        model |= set(range(start, start + 500))
    for _ in range(3000):
        if rng.random() < 0.5:
            size = rng.randint(1, 60)
            address = blocks.take(size)
            if address is None:
                assert blocks.largest() < size
            else:
                cut = set(range(address, address + size))
                assert cut <= model
                assert address // 500 == (address + size - 1) // 500
                model -= cut
                taken[address] = size
        elif taken:
            address = rng.choice(list(taken))
            size = taken.pop(address)
            blocks.insert(address, size)
            model |= set(range(address, address + size))
        assert blocks.nbytes == len(model)
        if model:
            assert sum(blocks.last()) == max(model) + 1
    for address, size in taken.items():
        blocks.insert(address, size)
    assert blocks.largest() == 500
    assert blocks.take(501) is None
    assert (blocks.take(500), blocks.take(500)) == (0, 500)


def test_the_smallest_block_that_fits_is_cut():
    blocks = FreeBlocks()
    for address, size in ((0, 100), (200, 30), (300, 50)):
        blocks.insert(address, size)
    assert blocks.take(40) == 300
    assert blocks.take(10) == 340
    assert not blocks.take_exactly(200, 20)
    assert blocks.take_exactly(200, 30)
    assert blocks.nbytes == 100


def test_sizes_are_not_rounded_to_powers_of_two():
    registry = Registry()
    slab = registry.slab(48 * MIB)
    blocks = [slab.allocate(3 * MIB) for _ in range(16)]
    assert None not in blocks
    assert slab.allocated == slab.size == 48 * MIB
    assert slab.allocate(1) is None
    for block in blocks:
        slab.free(block, 3 * MIB)
    assert slab.allocate(48 * MIB) is not None
    slab.close()
    assert not registry.regions


def test_the_cap_holds_whatever_is_asked_for():
    registry = Registry()
    slab = registry.slab(CHUNK + 10 * MIB)
    blocks = []
    while (block := slab.allocate(5 * MIB)) is not None:
        blocks.append(block)
        slab.wait()
        assert sum(registry.regions.values()) <= CHUNK + 10 * MIB
    assert len(blocks) >= 13
    assert slab.allocate(1 << 40) is None
    slab.close()


def test_the_next_chunk_is_made_before_the_last_is_full_by_a_thread():
    registry = Registry()
    slab = registry.slab(4 * CHUNK)
    slab.allocate(CHUNK * 3 // 4)
    slab.wait()
    assert sum(registry.regions.values()) == 2 * CHUNK
    assert registry.threads[1] == AHEAD
    before = len(registry.threads)
    assert slab.allocate(CHUNK // 2) is not None
    assert "MainThread" not in registry.threads[before:]
    slab.close()


def test_nothing_is_made_ahead_while_half_a_chunk_is_free():
    registry = Registry()
    slab = registry.slab(4 * CHUNK)
    slab.allocate(CHUNK // 2)
    slab.wait()
    assert slab.size == CHUNK
    assert registry.asked == [CHUNK]
    slab.close()


def test_one_chunk_after_the_other_is_made_ahead():
    registry = Registry()
    registry.go.clear()
    slab = registry.slab(8 * CHUNK)
    slab.allocate(CHUNK * 3 // 4)
    slab.allocate(MIB)  # while one is being made
    assert slab.size == 2 * CHUNK
    registry.go.set()
    slab.wait()
    slab.allocate(CHUNK * 3 // 4)
    slab.wait()
    assert slab.size == 3 * CHUNK
    assert registry.threads[1:] == [AHEAD, AHEAD]
    slab.close()


def test_who_needs_the_chunk_that_is_being_made_waits_for_it_and_makes_no_other():
    registry = Registry()
    slab = registry.slab(8 * CHUNK)
    registry.hold_until_waited_for(slab)
    slab.allocate(CHUNK * 3 // 4)
    assert slab.allocate(CHUNK // 2) is not None
    assert registry.threads == ["MainThread", AHEAD]
    slab.close()


def test_a_chunk_that_is_being_made_is_given_back_too_when_the_slab_is_closed():
    registry = Registry()
    slab = registry.slab(2 * CHUNK)
    registry.hold_until_waited_for(slab)
    slab.allocate(CHUNK * 3 // 4)
    slab.close()
    registry.go.set()
    for thread in threading.enumerate():
        if thread.name == AHEAD:
            thread.join()
    assert registry.asked == [CHUNK, CHUNK]
    assert not registry.regions


def test_a_closed_slab_has_nothing_and_may_be_used_again():
    registry = Registry()
    slab = registry.slab(CHUNK)
    slab.allocate(MIB)
    slab.close()
    assert (slab.size, slab.allocated) == (0, 0)
    assert slab.allocate(CHUNK) in registry.regions
    slab.close()
    assert not registry.regions


@pytest.mark.parametrize("most", [0, CHUNK])
def test_a_system_that_refuses_is_a_full_slab(most):
    registry = Registry(most)
    slab = registry.slab(1 << 40)
    got = 0
    while slab.allocate(MIB) is not None:
        got += MIB
        slab.wait()
    assert got == most
    assert slab.size == sum(registry.regions.values()) == most
    slab.close()


def test_less_is_taken_where_a_whole_chunk_is_refused():
    registry = Registry(3 * MIB)
    slab = registry.slab(1 << 40)
    assert slab.allocate(2 * MIB) is not None
    slab.wait()
    assert slab.size == 2 * MIB
    slab.close()


def test_a_system_that_has_refused_a_chunk_ahead_is_not_asked_again():
    registry = Registry(CHUNK)
    slab = registry.slab(1 << 40)
    slab.allocate(CHUNK * 3 // 4)
    slab.wait()
    assert slab.allocate(MIB) is not None
    slab.wait()
    assert slab.allocate(CHUNK) is None
    assert registry.asked == [CHUNK, CHUNK]
    slab.close()


def test_more_than_the_address_space_is_refused():
    registry = Registry()
    slab = registry.slab(1 << 60)
    assert slab.allocate(1 << 50) is None
    assert (slab.size, registry.asked) == (0, [])


def test_less_is_taken_than_is_wanted_where_the_machine_has_less():
    registry, spare = Registry(), [CHUNK // 2]
    slab = PinnedSlab(4 * CHUNK, registry.register, registry.unregister, lambda: spare[0])
    assert slab.allocate(CHUNK) is None
    assert registry.asked == []
    assert slab.allocate(MIB) is not None
    slab.wait()
    assert registry.asked[0] == CHUNK // 2
    spare[0] = 0
    while slab.allocate(MIB) is not None:
        slab.wait()
    taken = slab.size
    spare[0] = CHUNK  # there is some again
    assert slab.allocate(CHUNK) is not None
    assert slab.size >= taken + CHUNK
    slab.wait()
    spare[0], asked = -1, len(registry.asked)
    while slab.allocate(MIB) is not None:
        slab.wait()
    assert len(registry.asked) == asked
    slab.close()


def test_the_machine_is_asked_for_each_chunk_only():
    asked = []
    registry = Registry()
    slab = PinnedSlab(
        4 * CHUNK, registry.register, registry.unregister, lambda: asked.append(1) or CHUNK
    )
    blocks = [slab.allocate(MIB // 4) for _ in range(CHUNK // MIB)]
    assert len(asked) == len(registry.asked) == 1
    for _ in range(100):
        slab.free(blocks.pop(), MIB // 4)
        blocks.append(slab.allocate(MIB // 4))
    assert len(asked) == 1
    slab.close()


def test_where_no_thread_can_start_chunks_are_made_when_they_are_needed(monkeypatch):
    """As when the interpreter ends, or the system allows no more: nothing is lost."""
    registry = Registry()
    slab = registry.slab(3 * CHUNK)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    blocks = [slab.allocate(CHUNK // 2) for _ in range(6)]
    assert None not in blocks
    assert slab.allocated == slab.size == 3 * CHUNK == sum(registry.regions.values())
    assert slab.allocate(1) is None
    slab.close()


def flags_of(address):
    """The kernel's flags of the mapping that an address lies in."""
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first, *rest = line.split()
            if "-" in first:
                start, end = (int(n, 16) for n in first.split("-"))
                inside = start <= address < end
            elif inside and first == "VmFlags:":
                return rest
    raise LookupError(hex(address))


def test_the_memory_is_not_copied_to_forked_children():
    slab = Registry().slab(CHUNK)
    assert "dc" in flags_of(slab.allocate(MIB))
    slab.close()


def test_a_forked_child_has_nothing():
    registry = Registry()
    slab = registry.slab(4 * CHUNK)
    address = slab.allocate(MIB)
    slab.wait()
    before = dict(registry.regions)
    slab._lock.acquire()  # by a thread that the child does not have
    chunk = weakref.ref(slab._chunks[0][1])
    slab.after_fork()
    assert not slab._lock.locked()
    assert chunk() is not None  # else it would be unmapped, whatever lies there now
    assert slab.allocate(1) is None
    slab.free(address, MIB)
    assert (slab.size, slab.allocated) == (0, 0)
    slab.close()
    assert registry.regions == before
    abandoned.pop()


def test_threads_share_it():
    slab = Registry().slab(2 * CHUNK)
    seen, errors = set(), []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(300):
            size = rng.randint(1, MIB)
            block = slab.allocate(size)
            if block is None or block in seen:
                errors.append(block)
            seen.add(block)
            seen.discard(block)
            slab.free(block, size)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert slab.allocated == 0
    slab.close()
