"""Random programs under random schedules: the manager on the CUDA device never loses or races for a byte."""

from __future__ import annotations

import contextlib
import gc
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chainer_ooc.errors import GraphReleasedError
from chainer_ooc.swap.storage import State
from tests.swap.cuda.conftest import Rig

KIB = 1 << 10

indexes = st.integers(0, 30)
sizes = st.sampled_from([512, 4 * KIB, 64 * KIB, 100 * KIB, 256 * KIB])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("save"), sizes),
        st.tuples(st.just("save on another stream"), sizes),
        st.tuples(st.just("use"), indexes),
        st.tuples(st.just("write"), indexes),
        st.tuples(st.just("hold"), indexes),
        st.tuples(st.just("let go"), st.none()),
        st.tuples(st.just("die"), indexes),
        st.tuples(st.just("drop"), indexes),
        st.tuples(st.just("prefetch"), indexes),
        st.tuples(st.just("temporary"), sizes),
        st.tuples(st.just("make room"), st.sampled_from([0, 64 * KIB, 1024 * KIB])),
        st.tuples(st.just("move all out"), st.none()),
        st.tuples(st.just("fail"), st.sampled_from(["memcpyAsync", "malloc"])),
    ),
    min_size=10,
    max_size=80,
)


class Program:
    """Saves arrays, and knows what must be in them."""

    def __init__(self, rig):
        self.rig = rig
        self.saved = []
        self.values = []
        self.held = []
        self.other = rig.cupy.cuda.Stream(non_blocking=True)
        rig.allocator.install()

    def pick(self, index):
        """Return an index of what was saved, or ``None``."""
        alive = [i for i, saved in enumerate(self.saved) if saved is not None]
        return alive[index % len(alive)] if alive else None

    def order_streams(self):
        one, two = self.other, self.rig.cupy.get_current_stream()
        one.wait_event(two.record())
        two.wait_event(one.record())

    def step(self, what, argument):
        rig, manager = self.rig, self.rig.manager
        index = (
            self.pick(argument)
            if what in ("use", "write", "hold", "die", "drop", "prefetch")
            else None
        )
        if what.startswith("save"):
            value = float(len(self.saved))
            if what == "save":
                saved = rig.save(value, argument)
            else:
                with self.other:
                    saved = rig.save(value, argument)
                    event = self.other.record()
            self.saved.append(saved)
            self.values.append(value)
            if what != "save":
                rig.cupy.get_current_stream().wait_event(event)
        elif what == "temporary":
            rig.array(-1.0, argument).add(1)
        elif what == "make room":
            manager.make_room(argument)
        elif what == "move all out":
            manager.move_all_out()
        elif what == "let go":
            self.order_streams()
            self.held.clear()
        elif what == "fail":
            rig.cupy.fail[argument] = [0]
        elif index is None:
            return
        elif what == "prefetch":
            manager.prefetch([self.saved[index]])
        elif what == "die":
            self.order_streams()  # the program's own duty
            self.saved[index] = None
        elif what == "drop":
            manager.finish([self.saved[index]], drop=True)
            assert self.saved[index].storage.state is State.DROPPED
            with pytest.raises(GraphReleasedError):
                if self.saved[index].alive() is not None:
                    raise GraphReleasedError  # somebody holds it
                self.saved[index].get()
            self.saved[index] = None
        elif what == "use":
            (array,) = manager.fetch([self.saved[index]], trusted=True)
            assert set(array.get()) == {self.values[index]}
        elif what == "write":
            array = manager.read(self.saved[index], trusted=False)
            array.add(1000)
            self.values[index] += 1000
        elif what == "hold":
            self.held.append(self.saved[index].get())

    def finish(self):
        rig, saved = self.rig, None
        self.order_streams()
        rig.cupy.fail.clear()
        for index in range(len(self.saved)):
            saved = self.saved[index]
            if saved is not None:
                assert set(saved.get().get()) == {self.values[index]}
        self.held.clear()
        self.saved.clear()
        del saved
        gc.collect()  # what errors hold
        rig.manager.settle()
        rig.cupy.synchronize()
        # What is written to while it goes out is not worth its copy, which nobody reads: values tell.
        torn = ("an addition writes", "the copy out read")
        races = [race for race in rig.cupy.races if not all(part in race for part in torn)]
        assert not races, "\n".join(races)
        assert rig.device.disk.file.allocated == 0
        if (block := rig.device.host.allocate(1)) is not None:  # and take back what was retired
            block.free()
        assert rig.device.host.slab.allocated == 0
        assert rig.pool.used == 0
        rig.device.close()


def run(seed, host_limit, limit, program):
    with tempfile.TemporaryDirectory() as directory:
        rig = Rig(directory, seed, host_limit, limit)
        running = Program(rig)
        for what, argument in program:
            failed = True
            with contextlib.suppress(MemoryError):  # the program holds too much: it may go on
                running.step(what, argument)
                failed = False
            if failed:
                running.order_streams()
                gc.collect()  # what the error holds
        running.finish()


arguments = given(
    seed=st.integers(0, 1 << 20),
    host_limit=st.sampled_from([0, 512 * KIB, 8 << 20]),
    limit=st.sampled_from([1 << 20, 2 << 20, 8 << 20]),
    program=steps,
)
quiet = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=60, **quiet)
@arguments
def test_random_programs(seed, host_limit, limit, program):
    run(seed, host_limit, limit, program)


@pytest.mark.slow
@settings(max_examples=1500, **quiet)
@arguments
def test_many_random_programs(seed, host_limit, limit, program):
    run(seed, host_limit, limit, program)
