"""Free blocks and the page-locked slab: exact sizes, merged, under a cap, made ahead."""

from __future__ import annotations

import random
import threading

import pytest

from chainer_ooc.swap.free_blocks import FreeBlocks
from chainer_ooc.swap.pinned import CHUNK, PinnedSlab

MIB = 1 << 20


class Registry:
    """What is page-locked."""

    def __init__(self, most=1 << 40):
        self.regions = {}
        self.most = most
        self.threads = []

    def register(self, address, nbytes):
        if sum(self.regions.values()) + nbytes > self.most:
            raise RuntimeError("cudaErrorMemoryAllocation")
        self.regions[address] = nbytes
        self.threads.append(threading.current_thread().name)

    def unregister(self, address):
        del self.regions[address]

    def slab(self, limit):
        return PinnedSlab(limit, self.register, self.unregister)


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
    assert registry.threads[1] == "chainer_ooc-pin"
    before = len(registry.threads)
    assert slab.allocate(CHUNK // 2) is not None
    assert "MainThread" not in registry.threads[before:]
    slab.close()


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


def test_a_forked_child_has_nothing():
    registry = Registry()
    slab = registry.slab(4 * CHUNK)
    address = slab.allocate(MIB)
    slab.wait()
    before = dict(registry.regions)
    slab._lock.acquire()  # by a thread that the child does not have
    slab.after_fork()
    assert slab.allocate(1) is None
    slab.free(address, MIB)
    assert (slab.size, slab.allocated) == (0, 0)
    slab.close()
    assert registry.regions == before


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
