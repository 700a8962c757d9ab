"""Random programs under random schedules: the manager on the CUDA device never loses or races for a byte."""

from __future__ import annotations

import contextlib
import errno
import gc
import random
import tempfile
import threading
import weakref

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chainer_ooc.errors import GraphReleasedError
from chainer_ooc.settings import Settings
from chainer_ooc.swap.recipe import Constant, Recipe
from chainer_ooc.swap.storage import State
from tests.swap.cuda.conftest import Rig

KIB, MIB = 1 << 10, 1 << 20
LIMITS = [1 * MIB, 2 * MIB, 8 * MIB]

indexes = st.integers(0, 30)
sizes = st.sampled_from([512, 4 * KIB, 64 * KIB, 100 * KIB, 256 * KIB])
failures = ["memcpyAsync", "malloc", "hostRegister", "write", "read"]
steps = st.lists(
    st.tuples(
        # Where: on the default stream, on another, or in another thread on a third.
        st.sampled_from([0, 0, 0, 1, 2]),
        st.one_of(
            st.tuples(st.just("save"), sizes),
            st.tuples(st.just("save"), sizes),
            st.tuples(st.just("use"), indexes),
            st.tuples(st.just("use some"), indexes),
            st.tuples(st.just("write"), indexes),
            st.tuples(st.just("keep"), indexes),
            st.tuples(st.just("scribble"), st.none()),
            st.tuples(st.just("set_cached_limit"), indexes),
            st.tuples(st.just("let go"), st.none()),
            st.tuples(st.just("die"), indexes),
            st.tuples(st.just("graph dies"), indexes),
            st.tuples(st.just("finish"), indexes),
            st.tuples(st.just("drop"), indexes),
            st.tuples(st.just("prefetch"), indexes),
            st.tuples(st.just("temporary"), sizes),
            st.tuples(st.just("make room"), st.sampled_from([0, 64 * KIB, MIB])),
            st.tuples(st.just("move all out"), st.none()),
            st.tuples(st.just("limit"), st.sampled_from(LIMITS)),
            st.tuples(st.just("fail"), st.sampled_from(failures)),
            st.tuples(st.just("disk full"), st.booleans()),
        ),
    ),
    min_size=10,
    max_size=80,
)


#: How often what is done in long programs, which hypothesis seldom makes.
OFTEN = {
    "save": 10,
    "derive": 10,
    "give up some": 8,
    "use some": 6,
    "use": 4,
    "make room": 3,
    **dict.fromkeys(["write", "set_cached_limit", "let go", "finish", "prefetch", "temporary"], 2),
    **dict.fromkeys(["keep", "scribble"], 1),
    **dict.fromkeys(["move all out", "fail", "pass by", "weigh"], 2),
    **dict.fromkeys(["die", "drop", "limit", "disk full"], 1),
    "graph dies": 0.3,
}


def long_program(seed, length=150):
    """Return a random program in which much lives at a time."""
    rng = random.Random(seed)
    values = {
        **dict.fromkeys(["save", "temporary"], (512, 4 * KIB, 64 * KIB, 100 * KIB, 256 * KIB)),
        **dict.fromkeys(["let go", "move all out", "weigh", "scribble"], (None,)),
        "make room": [0, 64 * KIB, MIB],
        "limit": LIMITS,
        "fail": failures,
        "disk full": [False, False, True],
    }
    for what in rng.choices(list(OFTEN), list(OFTEN.values()), k=length):
        argument = rng.choice(values.get(what, range(31)))
        yield rng.choice((0, 0, 0, 1, 2)), (what, argument)


class Program:
    """Saves arrays, and knows what must be in them."""

    def __init__(self, rig):
        self.rig = rig
        self.saved = []
        self.values = []
        self.referenced_externally = []
        self.kept = []  # what may be written to without a word, as long as it is held
        self.weights = []
        self.streams = [rig.cupy.get_current_stream()]
        self.streams += [rig.cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
        rig.allocator.install()
        self.disk_is_full = False
        self.failing = set()
        file = rig.device.disk.file
        for name in ("_reserve", "write", "read"):
            setattr(file, name, self.may_fail(name, getattr(file, name)))

    def may_fail(self, name, real):
        def call(*args):
            if name == "_reserve" and self.disk_is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            if name in self.failing:
                self.failing.discard(name)
                raise OSError(errno.EIO, "Input/output error")
            return real(*args)

        return call

    def pick(self, index, number=1):
        """Return indexes of what was saved and lives, neighbours."""
        alive = [i for i, saved in enumerate(self.saved) if saved is not None]
        start = index % len(alive) if alive else 0
        return alive[start : start + number]

    def order_streams(self):
        """The program's own duty: what one stream has computed, another uses."""
        events = [stream.record() for stream in self.streams]
        for stream in self.streams:
            for event in events:
                stream.wait_event(event)

    def step(self, where, what, argument):
        if where == 0:
            self.run(what, argument)
        elif where == 1:
            self.order_streams()
            try:
                with self.streams[1]:
                    self.run(what, argument)
            finally:
                self.order_streams()
        else:
            self.order_streams()
            self.run_in_thread(what, argument)
            self.order_streams()

    def run_in_thread(self, what, argument):
        errors = []

        def work():
            try:
                with self.streams[2]:
                    self.run(what, argument)
            except MemoryError:
                errors.append(MemoryError)
            except OSError:
                errors.append(OSError)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]

    def run(self, what, argument):
        rig, manager = self.rig, self.rig.manager
        if what == "save":
            value = float(len(self.saved))
            self.saved.append(rig.save(value, argument))
            self.values.append(value)
        elif what == "temporary":
            rig.array(-1.0, argument).add(1)
        elif what == "make room":
            manager.make_room(argument)
        elif what == "move all out":
            manager.move_all_out()
        elif what == "let go":
            self.order_streams()
            self.referenced_externally.clear()
            self.kept.clear()
        elif what == "scribble":
            self.order_streams()
            for index, array in self.kept:
                array.add(1000)
                self.values[index] += 1000
        elif what == "weigh":
            self.order_streams()
            for weight in self.weights:
                weight.add(1)
        elif what == "limit":
            rig.settings = Settings(limit=argument, min_bytes=1)
            rig.pool.set_limit(argument)
        elif what == "fail":
            self.failing.add(argument)
            rig.cupy.fail[argument] = [0]
        elif what == "disk full":
            self.disk_is_full = argument
        else:
            several = what.endswith(" some") or what == "graph dies"
            self.run_with(what, self.pick(argument, 4 if several else 1))

    def run_with(self, what, chosen):
        manager = self.rig.manager
        group = [self.saved[index] for index in chosen]
        if what == "prefetch":
            manager.prefetch(group)
        elif what == "derive":
            for index, one in zip(chosen, group, strict=True):
                self.derive(index, one)
        elif what == "give up some":
            with manager._lock:
                for one in group:
                    manager._evictor.give_up(one.storage)
        elif what == "pass by":
            manager._evict_after_recompute = weakref.WeakSet(one.storage for one in group)
        elif what in ("die", "graph dies"):
            self.order_streams()  # the program's own duty
            for index in chosen:
                self.saved[index] = None
        elif what == "finish":
            manager.release_use(group, drop=False)
        elif what == "drop":
            manager.release_use(group, drop=True)
            for index, one in zip(chosen, group, strict=True):
                if one.storage.dependents or not one.storage.used:
                    continue  # others are made again from it
                assert one.storage.state is State.DROPPED
                if one.alive() is None:
                    with pytest.raises(GraphReleasedError):
                        one.get()
                self.saved[index] = None
        elif what in ("use", "use some"):
            arrays = manager.fetch(group, read_only=True)
            for index, array in zip(chosen, arrays, strict=True):
                assert set(array.get()) == {self.values[index]}
        elif what == "write":
            for index, one in zip(chosen, group, strict=True):
                manager.read(one, read_only=False).add(1000)
                self.values[index] += 1000
        elif what == "keep":
            for index, one in zip(chosen, group, strict=True):
                self.kept.append((index, manager.read(one, read_only=False)))
        elif what == "set_cached_limit":
            self.referenced_externally += [one.get() for one in group]

    def derive(self, index, needed):
        """Save the sum of what was saved and of a weight, and how it is made again."""
        rig, manager, size = self.rig, self.rig.manager, needed.storage.nbytes
        weight = rig.array(float(len(self.weights)), 512)
        constant = Constant(rig.device, weight)
        value = self.values[index] + len(self.weights)
        self.weights.append(weight)

        def run(arrays):
            return rig.array(float(arrays[0].get()[0] + constant.array.get()[0]), size)

        array = rig.array(value, size)
        saved = manager.save(array, "sum")
        manager.add_use([saved])
        self.saved.append(saved)
        self.values.append(value)
        looks = manager.fingerprint(saved), (manager.fingerprint(needed),)
        if looks[1][0] is not None:
            costly = bool(len(self.weights) % 2)
            recipe = Recipe(
                (needed,), run, saved.layout, *looks, constants=(constant,), costly=costly
            )
            manager.give_recipe(saved, recipe)

    def finish(self):
        rig, saved = self.rig, None
        self.order_streams()
        rig.cupy.fail.clear()
        self.failing.clear()
        self.disk_is_full = False
        rig.settings = Settings(limit=8 * MIB, min_bytes=1)
        rig.pool.set_limit(8 * MIB)
        for index in range(len(self.saved)):
            saved = self.saved[index]
            if saved is not None:
                assert set(saved.get().get()) == {self.values[index]}
        self.referenced_externally.clear()
        self.kept.clear()
        self.weights.clear()
        self.saved.clear()
        del saved
        gc.collect()  # what errors hold
        check_nothing_is_left(rig)
        # What is written to while it goes out is not worth its copy, which nobody reads: values tell.
        torn = ("an addition writes", "the copy out read")
        races = [race for race in rig.cupy.races if not all(part in race for part in torn)]
        assert not races, "\n".join(races)
        rig.device.close()


def check_nothing_is_left(rig):
    """All has died: nothing is in use anywhere."""
    rig.manager.settle()
    rig.cupy.synchronize()
    transfers = rig.manager._transfers
    assert rig.manager.storages() == []
    assert not transfers._by_owner
    assert not transfers.deferred_frees
    assert set(transfers.nbytes.values()) == {0}
    assert rig.device.disk.file.allocated == 0
    if (block := rig.device.host.allocate(1)) is not None:  # and take back what was retired
        block.free()
    assert rig.device.host.slab.allocated == 0
    kept = 0 if rig.device.arrays._checksum._slot is None else 512
    assert rig.pool.used_bytes() == kept


def run(seed, host_limit, limit, program):
    with tempfile.TemporaryDirectory() as directory:
        rig = Rig(directory, seed, host_limit, limit, total=16 * MIB)
        running = Program(rig)
        for where, (what, argument) in program:
            failed = True
            with contextlib.suppress(
                MemoryError, OSError
            ):  # it holds too much, or no space is left
                running.step(where, what, argument)
                failed = False
            if failed:
                running.order_streams()
                gc.collect()  # what the error holds
            assert rig.pool.total_bytes() <= 8 * MIB
        running.finish()
        return rig.manager.counters


arguments = given(
    seed=st.integers(0, 1 << 20),
    host_limit=st.sampled_from([0, 512 * KIB, 4 * MIB]),
    limit=st.sampled_from(LIMITS),
    program=steps,
)
quiet = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Let the collector look at what the tests make, not at all modules, each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@settings(max_examples=80, **quiet)
@arguments
def test_random_programs(seed, host_limit, limit, program):
    run(seed, host_limit, limit, program)


@pytest.mark.exhaustive
@settings(max_examples=4000, **quiet)
@arguments
def test_many_random_programs(seed, host_limit, limit, program):
    run(seed, host_limit, limit, program)


@pytest.mark.parametrize(
    "first", [0, *[pytest.param(n, marks=pytest.mark.exhaustive) for n in range(8, 640, 8)]]
)
def test_long_programs(first):
    """Much lives at a time, and is moved or made again, in chains."""
    moved = remade = 0
    for seed in range(first, first + 8):
        rng = random.Random(seed)
        host_limit, limit = rng.choice([0, 512 * KIB, 4 * MIB]), rng.choice(LIMITS)
        counters = run(seed, host_limit, limit, long_program(seed))
        moved += counters.storages_in
        remade += counters.storages_remade
    assert moved > 50
    assert remade > 10


def work(rig, seed, steps, per_thread):
    """What one of several threads does: arrays of its own, on a stream of its own."""
    rng = random.Random(seed)
    saved = []
    stream = contextlib.nullcontext() if per_thread else rig.cupy.cuda.Stream(non_blocking=True)
    with stream:
        for number in range(steps):
            value = float(1000 * seed + number)
            saved.append((rig.save(value, rng.choice([4 * KIB, 64 * KIB, 256 * KIB])), value))
            for one, expected in rng.sample(saved, min(len(saved), 2)):
                (array,) = rig.manager.fetch([one], read_only=True)
                assert set(array.get()) == {expected}
                del array
            rig.manager.prefetch([rng.choice(saved)[0]])
            if len(saved) > 18:
                one, _ = saved.pop(rng.randrange(len(saved)))
                rig.manager.release_use([one], drop=rng.random() < 0.5)
                del one
        rig.cupy.get_current_stream().synchronize()


@pytest.mark.parametrize("per_thread", [False, True], ids=["streams", "default streams"])
@pytest.mark.parametrize(
    "seed", [*range(2), *[pytest.param(n, marks=pytest.mark.exhaustive) for n in range(2, 40)]]
)
def test_threads_share_a_manager(seed, per_thread, make_rig):
    rig = make_rig(
        seed=seed,
        limit=3 * MIB,  # three threads need at most a half each at a time, and some is in pieces
        host_limit=[8 * MIB, 512 * KIB][seed % 2],
        per_thread=per_thread,
        total=16 * MIB,
    )
    rig.allocator.install()
    errors = []

    def run(number):
        try:
            work(rig, number, 40, per_thread)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(10 * seed + n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    gc.collect()
    assert rig.manager.counters.bytes_in > MIB
    check_nothing_is_left(rig)
