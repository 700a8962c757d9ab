"""PagePool: free pages serve the next allocation, wherever they lie; memory never holds two things at once."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import sys
import threading
import time

import numpy as np
import pytest

from chainer_ooc import state
from chainer_ooc.swap.devices.ram import RamDevice, native
from chainer_ooc.swap.system.memory import ResidentMemory
from chainer_ooc.swap.tiers.swap_file import SwapFile

if native.allocator is None:
    pytest.skip(f"needs the C extension: {native.HOW_TO_GET_IT}", allow_module_level=True)
PagePool = native.allocator.PagePool
GAP, PAGE = 16, mmap.PAGESIZE
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_garbage():
    """What other tests left is not freed in the midst of one that looks at resident memory."""
    gc.collect()


@pytest.fixture
def pool():
    return PagePool(1 << 32)


def take(pool, nbytes, **more):
    """Take a block that has ``nbytes`` with the gap behind it, in whole pages."""
    return pool.allocate(nbytes - GAP, **more)


def fill(address, nbytes, value=1):
    ctypes.memset(address, value, nbytes)


def mappings():
    """The kernel's mappings of this process: first and last address of each."""
    with open("/proc/self/maps") as lines:
        return [tuple(int(n, 16) for n in line.split()[0].split("-")) for line in lines]


def filled(pool, n):
    """Return a block of ``n`` MiB of ones, put together of as many that lay apart."""
    blocks = [take(pool, MIB) for _ in range(2 * n)]
    for block in blocks:
        fill(block, MIB)
    for block in blocks[::2]:
        pool.free(block)
    return take(pool, n * MIB)


def faults_of(action):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    action()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_block_of_the_same_size_has_the_pages_of_the_last_one(pool):
    first = take(pool, MIB)
    fill(first, MIB)
    pool.free(first)
    assert pool.cached_bytes == MIB
    again = take(pool, MIB)
    assert again == first
    assert faults_of(lambda: fill(again, MIB)) < 10
    assert pool.cached_bytes == 0


def test_pages_are_moved_with_one_call_for_each_mapping_and_no_other(pool):
    filled(pool, 4)
    assert (pool.counts["moves"], pool.counts["maps"]) == (4, 0)


def test_pages_of_scattered_blocks_serve_one_large_block(pool):
    blocks = [take(pool, MIB) for _ in range(16)]
    for block in blocks:
        fill(block, MIB)
    for block in blocks[::2]:
        pool.free(block)
    large = take(pool, 8 * MIB)
    assert pool.cached_bytes == 0
    assert faults_of(lambda: fill(large, 8 * MIB, 2)) < 100
    for block in blocks[1::2]:  # what was between them is as it was
        assert ctypes.string_at(block, MIB) == b"\1" * MIB
    assert ctypes.string_at(large, 8 * MIB) == b"\2" * 8 * MIB


def test_what_is_given_back_is_not_resident_any_more(pool):
    memory = ResidentMemory()
    block = take(pool, 64 * MIB)
    fill(block, 64 * MIB)
    pool.free(block)
    before = memory.bytes()
    assert pool.decommit(16 * MIB) == 16 * MIB
    assert pool.cached_bytes == 48 * MIB
    assert before - memory.bytes() > 15 * MIB
    pool.set_cached_limit(0)
    assert pool.cached_bytes == 0
    assert before - memory.bytes() > 62 * MIB
    block = take(pool, MIB)
    fill(block, MIB)
    pool.free(block)  # nothing is kept any more
    assert pool.cached_bytes == 0


def test_pages_that_nobody_touched_do_not_count_as_warm():
    pool = PagePool(4 * MIB)
    block = take(pool, 4 * MIB)
    fill(block, MIB)
    pool.free(block)
    assert pool.cached_bytes == 0
    assert take(pool, 4 * MIB) == block  # and are not lost


def test_what_is_made_of_used_pages_alone_is_not_looked_at_when_it_is_free(pool):
    large = filled(pool, 2)
    assert pool.counts["looks"] == 2  # at the two blocks that it was made of
    pool.free(large)
    assert pool.cached_bytes == 2 * MIB
    assert pool.counts["looks"] == 2


def test_nothing_is_given_back_when_free_pages_go_on_being_kept(pool):
    block = take(pool, MIB)
    fill(block, MIB)
    pool.free(block)
    pool.set_cached_limit(1 << 62)
    assert pool.cached_bytes == MIB


def test_memory_that_need_not_be_zero_is_not_touched(pool):
    block = take(pool, MIB)
    fill(block, MIB)
    pool.free(block)
    assert ctypes.string_at(take(pool, MIB), MIB) == b"\1" * MIB


def test_cleared_memory_is_zero_on_used_pages_too(pool):
    block = take(pool, MIB)
    fill(block, MIB)
    pool.free(block)
    block = take(pool, MIB, clear=True)
    assert ctypes.string_at(block, MIB - GAP) == bytes(MIB - GAP)
    pool.free(block)
    # Half of its pages are used ones, half new.
    block = take(pool, 2 * MIB, clear=True)
    assert ctypes.string_at(block, 2 * MIB - GAP) == bytes(2 * MIB - GAP)


@pytest.mark.parametrize(("worth", "moves"), [(1, 50), (16, 20)])
@pytest.mark.parametrize("seed", range(6))
def test_blocks_keep_what_is_written_to_them_whatever_comes_and_goes(seed, worth, moves):
    size = 64 << 20
    pool = PagePool(size, worth_moving=worth, most_boundaries=40 if seed % 2 else 8192)
    mapped = len(mappings())
    chance = random.Random(seed)
    living = {}
    memory = ResidentMemory()
    base = memory.bytes()
    for step in range(1500):
        if living and chance.random() < 0.5:
            address, (nbytes, value) = chance.choice(list(living.items()))
            assert ctypes.string_at(address, nbytes) == bytes([value]) * nbytes
            pool.free(address)
            del living[address]
        else:
            nbytes = chance.choice([PAGE, 3 * PAGE + 8, 50 * PAGE, 200 * PAGE - 16])
            clear = chance.random() < 0.2
            address = pool.allocate(nbytes, clear=clear)
            assert address % PAGE == 0
            assert address + nbytes not in living
            assert all(one + size < address or one > address for one, (size, _) in living.items())
            if clear:
                assert ctypes.string_at(address, nbytes) == bytes(nbytes)
            living[address] = nbytes, step % 251
            fill(address, nbytes, step % 251)
        if chance.random() < 0.02:
            pool.decommit(chance.randrange(100) * PAGE)
    most = len(mappings())
    for address, (nbytes, value) in living.items():
        assert ctypes.string_at(address, nbytes) == bytes([value]) * nbytes
        pool.free(address)
    resident = memory.bytes() - base
    assert pool.cached_bytes <= resident + 2 * MIB
    pool.decommit(size)
    assert memory.bytes() - base < 8 * MIB
    assert pool.counts["moves"] > moves
    assert most - mapped < (120 if seed % 2 else 2000)
    assert take(pool, size) is not None  # no address is lost


def test_where_pages_cannot_be_moved_new_ones_are_taken():
    pool = PagePool(1 << 32, worth_moving=16, most_boundaries=8192, failing_move=1)
    blocks = [take(pool, MIB) for _ in range(4)]
    for block in blocks:
        fill(block, MIB)
    pool.free(blocks[0])
    pool.free(blocks[2])
    large = take(pool, 2 * MIB)
    fill(large, 2 * MIB, 2)
    assert ctypes.string_at(blocks[1], MIB) == ctypes.string_at(blocks[3], MIB) == b"\1" * MIB
    pool.free(blocks[1])
    assert take(pool, 3 * MIB) is not None
    assert pool.counts["moves"] == 1  # it was tried once, as on an old kernel


def test_a_move_that_fails_loses_no_address():
    pool = PagePool(8 * MIB, worth_moving=16, most_boundaries=8192, failing_move=1)
    blocks = [take(pool, MIB) for _ in range(4)]
    for block in blocks:
        fill(block, MIB)
    pool.free(blocks[0])
    pool.free(blocks[2])
    large = take(pool, 2 * MIB)
    for block in (blocks[1], blocks[3], large):
        pool.free(block)
    pool.decommit(8 * MIB)
    assert take(pool, 8 * MIB) is not None


def test_a_move_that_fails_halfway_leaves_zeros():
    pool = PagePool(1 << 32, worth_moving=16, most_boundaries=8192, failing_move=4)
    block = filled(pool, 2)
    pool.free(block)  # two mappings
    block = take(pool, 3 * MIB, clear=True)
    assert pool.counts["moves"] == 4
    assert ctypes.string_at(block, 3 * MIB) == bytes(3 * MIB)


def test_pages_are_moved_by_mappings_and_not_by_those_that_were_there_before():
    pool = PagePool(16 * MIB)
    first, second, between = (take(pool, n * MIB) for n in (3, 2, 1))
    for block, nbytes in ((first, 3 * MIB), (second, 2 * MIB)):
        fill(block, nbytes)
    pool.free(first)
    pool.decommit(MIB)
    pool.decommit(2 * MIB)  # there are two mappings now
    pool.free(second)
    block = take(pool, 3 * MIB)
    assert (block, pool.counts["moves"]) == (first, 1)
    fill(block, 3 * MIB)
    pool.free(block)
    assert take(pool, 4 * MIB) > between
    assert pool.counts["moves"] == 1 + 2  # what was moved, and what was new


def test_free_pages_in_too_many_mappings_go_back_to_the_system():
    pool = PagePool(1 << 32, worth_moving=16, most_boundaries=8)
    blocks = [filled(pool, 4) for _ in range(4)]
    for block in blocks[1:]:
        pool.free(block)
    take(pool, 13 * MIB)
    assert pool.cached_bytes == 0
    assert ctypes.string_at(blocks[0], 4 * MIB) == b"\1" * 4 * MIB


def test_free_pages_stay_where_free_addresses_alone_are_in_too_many_mappings():
    pool = PagePool(1 << 32, worth_moving=16, most_boundaries=32)
    blocks = [take(pool, nbytes) for nbytes in (MIB, PAGE, MIB, PAGE, 40 * PAGE, PAGE)]
    for block in blocks[::2]:
        fill(block, pool.size_of(block))
    pool.free(blocks[4])
    for _ in range(40):
        pool.decommit(PAGE)
    assert pool.counts["boundaries"] > 32
    pool.free(blocks[0])
    pool.free(blocks[2])
    take(pool, 3 * MIB // 2)
    assert pool.counts["boundaries"] <= 16
    assert pool.cached_bytes == MIB // 2


def test_a_forked_child_has_the_pool_to_itself(pool):
    """Its pages are copies: what either of them writes is not seen by the other."""
    kept, block = take(pool, MIB), take(pool, MIB)
    fill(kept, MIB)
    fill(block, MIB)
    pool.free(block)
    child = os.fork()
    if not child:
        new = take(pool, MIB)
        fill(new, MIB, 2)
        fill(kept, MIB, 3)
        pool.free(kept)
        good = new == block and take(pool, 2 * MIB) is not None
        os._exit(0 if good and pool.used_bytes() < pool.used_bytes() + MIB else 1)
    new = take(pool, MIB)
    fill(new, MIB, 4)
    assert os.waitpid(child, 0)[1] == 0
    assert ctypes.string_at(kept, MIB) == b"\1" * MIB
    assert ctypes.string_at(new, MIB) == b"\4" * MIB


def test_forks_in_the_midst_of_allocations_leave_the_pool_whole_in_the_children():
    pool = PagePool(256 * MIB)
    over = threading.Event()

    def work(value):
        chance = random.Random(value)
        while not over.is_set():
            blocks = [take(pool, chance.randrange(1, 400) * PAGE) for _ in range(8)]
            for block in blocks:
                fill(block, PAGE, value)
            for block in blocks:
                pool.free(block)
            pool.decommit(chance.randrange(200) * PAGE)

    threads = [threading.Thread(target=work, args=(value,)) for value in (1, 2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(40):
            child = os.fork()
            if not child:
                for n in range(1, 50):
                    block = take(pool, n * 8 * PAGE)
                    fill(block, n * 8 * PAGE, 3)
                    pool.free(block)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("nbytes", [1 << 60, -1, 0])
def test_what_is_no_address_space_cannot_be_reserved(nbytes):
    with pytest.raises(MemoryError, match=f"{nbytes} bytes of address space cannot be mapped"):
        PagePool(nbytes)


def test_what_is_no_block_is_refused(pool):
    for call in (pool.free, pool.size_of, pool.untouched_bytes):
        with pytest.raises(ValueError, match="address=4096 is not in this pool"):
            call(4096)
        with pytest.raises(TypeError):
            call("4096")
    assert 4096 not in pool
    assert pool.allocate(1 << 62) is None


def test_a_full_address_space_is_none():
    pool = PagePool(4 * MIB)
    assert take(pool, 8 * MIB) is None
    assert take(pool, 4 * MIB) is not None
    assert take(pool, PAGE) is None


def test_threads_do_not_get_the_same_memory():
    size = 64 * MIB
    pool = PagePool(size)
    failures = []

    def work(value):
        chance = random.Random(value)
        held = []
        for step in range(600):
            nbytes = chance.choice([3, 7, 7, 7, 20, 50]) * PAGE
            address = take(pool, nbytes)
            fill(address, nbytes, value)
            held.append((address, nbytes))
            if len(held) > 4 or step >= 596:
                address, nbytes = held.pop(chance.randrange(len(held)))
                if ctypes.string_at(address, nbytes) != bytes([value]) * nbytes:
                    failures.append(value)
                pool.free(address)
            if step % 50 == 7 * value:
                pool.decommit(chance.randrange(100) * PAGE)
        for address, _ in held:
            pool.free(address)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    pool.decommit(size)
    assert take(pool, size) is not None  # no address is lost


def test_many_sizes_are_no_matter():
    """There is room for the lists of so many; beyond that all are merged."""
    pool = PagePool(1 << 33)
    blocks = [take(pool, n * PAGE) for n in range(1, 900)]
    for block in blocks:
        fill(block, pool.size_of(block))
        pool.free(block)
    assert pool.cached_bytes == sum(range(1, 900)) * PAGE
    assert take(pool, 899 * PAGE) == blocks[-1]  # freed since they were merged
    pool.decommit(1 << 62)
    assert pool.cached_bytes == 0


def test_pages_in_small_mappings_are_given_back_and_taken_anew(pool):
    """A call of the kernel for each of them would take longer."""
    memory = ResidentMemory()
    blocks = [take(pool, 8 * PAGE) for _ in range(1024)]
    for block in blocks:
        fill(block, 8 * PAGE)
    for block in blocks[::2]:
        pool.free(block)  # 16 MiB
    before = memory.bytes()
    block = take(pool, 8 * MIB)
    fill(block, 8 * MIB, 2)
    assert pool.counts["moves"] == 0
    assert pool.cached_bytes >= 8 * MIB
    assert memory.bytes() - before < 4 * MIB
    for block in blocks[1::2]:
        assert ctypes.string_at(block, 8 * PAGE) == bytes([1]) * 8 * PAGE


@pytest.fixture
def hook():
    """The arrays of this thread lie in the process's pool, from 1 MiB on; nobody is asked for room."""
    device = RamDevice("/tmp")
    device.set_cached_limit(1 << 62)
    pool = device.keep_pages()
    native.allocator.configure(None, 1, pool, MIB)
    native.allocator.install()
    yield pool
    native.allocator.uninstall()
    # Whoever comes next says who is to be asked.
    state.process.announced, state.local.hooked = None, False
    pool.set_cached_limit(0)


def address_of(array):
    return array.__array_interface__["data"][0]


def test_large_arrays_lie_in_the_pool_and_small_ones_do_not(hook):
    large, small = np.ones(MIB, np.uint8), np.ones(MIB // 2, np.uint8)
    assert address_of(large) in hook
    assert address_of(small) not in hook
    assert np.zeros(MIB, np.uint8).sum() == 0


def test_arrays_outlive_the_hook(hook):
    array = np.arange(MIB, dtype=np.int32)
    native.allocator.uninstall()
    assert array[-1] == MIB - 1
    cached = hook.cached_bytes
    del array
    gc.collect()
    assert hook.cached_bytes - cached == 4 * MIB + PAGE


@pytest.mark.parametrize("size", [MIB // 8, MIB, 4 * MIB])
def test_resizing_keeps_what_is_in_it(hook, size):
    array = np.arange(MIB // 2, dtype=np.int32)
    array.resize(size, refcheck=False)
    n = min(size, MIB // 2)
    assert (array[:n] == np.arange(n)).all()
    assert not array[n:].any()
    assert (address_of(array) in hook) is (4 * size >= MIB)


def test_arrays_of_whole_pages_do_not_touch(hook):
    """NumPy 1 has other loops, with other bits, where they do."""
    arrays = [np.empty(MIB, np.uint8) for _ in range(8)]
    assert all(address_of(array) in hook for array in arrays)
    starts = {address_of(array) for array in arrays}
    assert not starts & {start + MIB for start in starts}


def test_a_process_ends_with_arrays_of_the_pool_in_every_corner(run_python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, threading, numpy as np, chainer_ooc\n"
        "from chainer_ooc import state\n"
        "chainer_ooc.enable(limit='1GiB')\n"
        "state.hook_allocations()\n"
        "pool = state.process.managers['ram'].device.pages\n"
        "class Late:\n"
        "    def __del__(self, copy=np.ones(1 << 20).copy): copy()\n"
        "sys.kept = [np.ones(1 << 20), Late()]\n"
        "np.kept = [np.ones(1 << 20), Late()]\n"
        "assert np.kept[0].__array_interface__['data'][0] in pool\n"
        "cycle = [np.ones(1 << 20)]; cycle.append(cycle)\n"
        "thread = threading.Thread(target=threading.Event().wait, args=(30,), daemon=True); thread.start()\n"
        "print('done')\n"
    )
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    assert not done.stderr


def test_a_forked_child_leaves_its_parents_memory_alone(run_python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, numpy as np, chainer_ooc\n"
        "from chainer_ooc import state\n"
        "chainer_ooc.enable(limit='1GiB')\n"
        "state.hook_allocations()\n"
        "array, other = np.ones(1 << 20), np.ones(1 << 20)\n"
        "if not os.fork():\n"
        "    del other\n"
        "    new = np.full(1 << 20, 2.0); assert array.sum() == 1 << 20; os._exit(0)\n"
        "assert os.wait()[1] == 0\n"
        "assert array.sum() == other.sum() == 1 << 20\n"
        "print('done')\n"
    )
    # From Python 3.12 on, a fork beside threads is warned of.
    done = run_python(script, env={"PYTHONWARNINGS": "ignore::DeprecationWarning"})
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_under_a_limit_of_address_space_there_is_no_pool(run_python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "import numpy as np, chainer_ooc\n"
        "from chainer_ooc import state\n"
        "chainer_ooc.enable(limit='1GiB')\n"
        "state.hook_allocations()\n"
        "assert state.process.managers['ram'].device.pages is None\n"
        "assert np.ones(1 << 20).sum() == 1 << 20\n"
        "print('done')\n"
    )
    done = run_python(script, env={"OMP_NUM_THREADS": "1"})
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.fixture
def device(tmp_path, pool):
    device = RamDevice(str(tmp_path))
    device.pages = pool  # of its own
    yield device
    device.close()


def test_free_pages_do_not_count_as_used_and_go_where_they_are_too_many(device, pool):
    before = device.used_bytes()
    device.set_cached_limit(before + 32 * MIB)
    block = take(pool, 64 * MIB)
    fill(block, 64 * MIB)
    assert device.used_bytes() - before > 60 * MIB
    pool.free(block)
    assert device.used_bytes() - before < 4 * MIB
    assert 20 * MIB < pool.cached_bytes < 40 * MIB  # the others went back to the system
    assert device.used_bytes() - before < 4 * MIB
    device.set_cached_limit(0)
    assert pool.cached_bytes == 0


def test_what_is_given_back_beside_a_look_is_counted_once(pool):
    """By a thread that does so as memory grows that nobody announces."""
    over, seen = threading.Event(), []
    blocks = [take(pool, 16 * MIB) for _ in range(4)]

    def give_back():
        while not over.is_set():
            pool.decommit(4 * MIB)

    before = pool.used_bytes()
    thread = threading.Thread(target=give_back)
    thread.start()
    for _ in range(20):
        for block in blocks:
            fill(block, 16 * MIB)
            pool.free(block)
        seen += [pool.used_bytes() for _ in range(100)]
        blocks = [take(pool, 16 * MIB) for _ in range(4)]
    over.set()
    thread.join()
    assert max(seen) - before < 8 * MIB


def test_copies_in_under_way_count_with_all_their_bytes(device, pool, monkeypatch):
    array = np.ones(32 * MIB, np.uint8)
    out = device.copy_out(array, 0, array.nbytes)
    out.join()
    reading, may_end = threading.Event(), threading.Event()
    read = SwapFile.read

    def wait(file, offset, buffer):
        reading.set()
        may_end.wait(30)
        read(file, offset, buffer)

    monkeypatch.setattr(SwapFile, "read", wait)
    before = device.used_bytes()
    owner, origin, back = device.copy_in(out.copy, array.nbytes, address_of(array))
    assert reading.wait(30)
    assert device.used_bytes() - before > 30 * MIB  # though nothing has been touched
    may_end.set()
    back.join()
    assert 30 * MIB < device.used_bytes() - before < 40 * MIB
    assert (owner[origin:][: array.nbytes] == 1).all()


def test_what_others_take_unannounced_takes_the_place_of_free_pages(device, pool):
    memory = ResidentMemory()
    block = take(pool, 64 * MIB)
    fill(block, 64 * MIB)
    pool.free(block)
    limit = memory.bytes() + 4 * MIB
    device.set_cached_limit(limit)
    others = []
    for _ in range(16):  # of the system's memory, which no NumPy array is made of
        others.append(mmap.mmap(-1, 2 * MIB))
        others[-1][:] = bytes(2 * MIB)
        time.sleep(0.05)
    assert memory.bytes() < limit + 4 * MIB
    assert 16 * MIB < pool.cached_bytes < 40 * MIB
    device.close()
    assert pool.cached_bytes == 0


def test_the_thread_that_does_so_is_not_there_while_a_process_forks(device, pool):
    """Python warns of a fork beside threads; the child has none of them."""

    def fork():
        """Return which threads a fork ends."""
        threads = set(os.listdir("/proc/self/task"))
        child = os.fork()
        if not child:
            os._exit(len(os.listdir("/proc/self/task")))
        ended = threads - set(os.listdir("/proc/self/task"))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        return ended

    device.set_cached_limit(1 << 50)
    fork()  # BLAS may have threads, which it ends before a fork, too, until it is used again
    guards = set()
    for _ in range(20):
        take(pool, PAGE)
        (guard,) = fork()
        guards.add(guard)
    assert str(os.getpid()) not in guards


def test_disabling_gives_back_what_another_thread_left(run_python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import threading, numpy as np, chainer_ooc\n"
        "from chainer_ooc import state\n"
        "chainer_ooc.enable(limit='1GiB')\n"
        "def work():\n"
        "    state.hook_allocations(); np.ones(1 << 22)\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n"
        "pool = state.process.managers['ram'].device.pages\n"
        "assert pool.cached_bytes >= 8 << 22\n"
        "chainer_ooc.disable()\n"
        "assert pool.cached_bytes == 0\n"
        "print('done')\n"
    )
    done = run_python(script)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_a_block_whose_gap_has_a_page_of_its_own_keeps_its_pages(pool):
    block = pool.allocate(MIB)
    fill(block, MIB)
    pool.free(block)
    assert pool.cached_bytes == MIB + PAGE
    assert pool.allocate(MIB) == block


def test_what_was_never_held_is_given_back_as_well(device, pool):
    """Arrays too small to be announced may be all there are."""
    block = take(pool, MIB)
    fill(block, MIB)
    pool.free(block)
    assert pool.cached_bytes == MIB
    device.set_cached_limit(1)
    device.set_cached_limit(0)
    assert pool.cached_bytes == 0


def test_the_cache_is_turned_on_and_off_by_several_threads(pool):
    """Each may end and start the thread that guards it."""

    def work():
        for n in range(300):
            pool.set_cached_limit(0 if n % 2 else 1 << 50)
            pool.free(take(pool, MIB))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
