"""CUDA graphs on page arenas: a capture may allocate, and a graph's memory stays what it was.

The double keeps the copies that are captured, and makes them when a graph is launched. Captures are in the mode
"global", in which they are spoilt by what any thread does.
"""

from __future__ import annotations

import contextlib
import gc
import threading

import numpy as np
import pytest

import chainer_ooc
from tests.doubles import cuda_runtime
from tests.real_cupy.conftest import MIB
from tests.real_cupy.test_arenas import arena, blocks, mode, taken

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.extension

__all__ = ["mode"]


@pytest.fixture
def stream(mode):
    """A stream of the program's, with a limit of 64 MiB."""
    mode(limit=64)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        cupy.empty(4, "f")
        yield stream
    if chainer_ooc.is_enabled():
        cupy.cuda.get_allocator().free_all_blocks()


@contextlib.contextmanager
def capture(stream, graphs):
    stream.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
    try:
        yield
    finally:
        graphs.append(stream.end_capture())


def uploaded(seed, nbytes=3 * MIB):
    bits = np.random.RandomState(seed).randint(0, 256, nbytes).astype(np.uint8)
    return bits, cupy.asarray(bits)


def copied(array):
    """Return a copy that no kernel makes: on the double those compute nothing."""
    result = cupy.empty_like(array)
    result.data.copy_from_device_async(array.data, array.nbytes)
    return result


def fill_in_pieces(count=20):
    """Take all memory, and free every other block."""
    held = blocks([3 * MIB] * count)
    del held[::2]
    return held


def test_what_a_graph_writes_on_the_way_is_nobody_elses(stream):
    graphs, (bits, x) = [], uploaded(1)
    with capture(stream, graphs):
        y = copied(copied(x))  # the first is freed at once
    between = [cupy.zeros(3 * MIB, "B") for _ in range(3)]
    before = [array.get().tobytes() for array in between]
    held = fill_in_pieces(14)
    more = blocks([20 * MIB])  # pages are mapped anew
    assert arena().counts["unmaps"]
    graphs[0].launch()
    assert y.get().tobytes() == bits.tobytes()
    assert [array.get().tobytes() for array in between] == before
    del more, held
    arena().check()


def test_the_next_capture_uses_the_same_memory(stream):
    graphs, (_, x) = [], uploaded(2)
    used = []
    for _ in range(5):
        with capture(stream, graphs):
            y = copied(copied(x))
        assert y.data.ptr
        del y
        used.append(arena().used_bytes)
    assert used[1:] == used[:1] * 4


@pytest.mark.parametrize("lag", [0, 1000])
def test_a_capture_maps_pages_anew(stream, lag):
    """Those that are known to be idle: no event can be recorded in a capture."""
    held = fill_in_pieces()
    big = blocks([20 * MIB])  # from now on events are recorded when memory is freed
    del big
    cuda_runtime.setup(total=1 << 30, lag=lag)
    blocks([1 * MIB])
    graphs, before = [], cuda_runtime.counts()
    with capture(stream, graphs):
        x = cupy.empty(25 * MIB, "B")
        between = cuda_runtime.counts() - before
    assert between["cudaEventRecord"] == 0
    assert x.data.ptr and held
    graphs[0].launch()


def test_no_memory_in_a_capture_is_an_error_that_spoils_nothing(stream):
    held, graphs = blocks([20 * MIB] * 3), []
    old = cupy.get_default_memory_pool().malloc(4 * MIB)
    del old  # CuPy's pool must not give it back in the capture
    with capture(stream, graphs), pytest.raises(chainer_ooc.errors.OutOfMemoryError):
        cupy.empty(30 * MIB, "B")
    graphs[0].launch()
    assert held


def test_memory_of_other_streams_is_not_taken_in_a_capture(stream):
    """The stream cannot wait for their work."""
    with cupy.cuda.Stream(non_blocking=True):
        held = blocks([30 * MIB] * 2)
        del held
    graphs = []
    with capture(stream, graphs), pytest.raises(chainer_ooc.errors.OutOfMemoryError):
        cupy.empty(40 * MIB, "B")
    graphs[0].launch()
    assert cupy.empty(40 * MIB, "B").data.ptr


@pytest.mark.parametrize("blocking", [False, True])
def test_memory_of_other_streams_is_not_taken_while_another_thread_captures(stream, blocking):
    """Nobody may wait for the GPU, and nothing can be recorded on the stream that is captured."""
    held = blocks([30 * MIB] * 2)
    del held
    graphs, caught = [], []

    def allocate():
        cupy.cuda.Stream.null.use()
        try:
            blocks([40 * MIB])
        except chainer_ooc.errors.OutOfMemoryError as error:
            caught.append(str(error))

    with cupy.cuda.Stream(non_blocking=not blocking) as captured:
        cupy.empty(4, "f")
        with capture(captured, graphs):
            thread = threading.Thread(target=allocate)
            thread.start()
            thread.join()
        graphs[0].launch()
    assert ["other streams" in one for one in caught] == [True]


def test_nobody_waits_for_the_gpu_in_a_capture(stream):
    held, graphs = blocks([3 * MIB] * 5), []
    with capture(stream, graphs):
        between = cupy.empty(3 * MIB, "B")
        del held, between
        cupy.cuda.get_allocator().free_all_blocks()
    graphs[0].launch()


@pytest.mark.parametrize("blocking", [False, True])
def test_another_thread_allocates_meanwhile(stream, blocking):
    """On the legacy stream, on which nothing may be recorded while a blocking stream is captured."""

    def allocate():
        cupy.cuda.Stream.null.use()
        for _ in range(3):
            held = fill_in_pieces()
            with contextlib.suppress(MemoryError):
                del blocks([20 * MIB])[:]
            del held[:]
        done.append(True)

    graphs, done = [], []
    with cupy.cuda.Stream(non_blocking=not blocking) as captured:
        cupy.empty(4, "f")
        with capture(captured, graphs):
            thread = threading.Thread(target=allocate)
            thread.start()
            thread.join()
        graphs[0].launch()
    assert done


def test_a_graphs_memory_is_given_back_when_asked(stream):
    graphs, (_, x) = [], uploaded(3)
    with capture(stream, graphs):
        y = copied(copied(x))
    del x, y
    gc.collect()
    assert arena().used_bytes >= 6 * MIB  # it counts, since nobody else gets it
    allocator = cupy.cuda.get_allocator()
    allocator.free_all_blocks(graphs=False)
    assert taken() >= 6 * MIB
    allocator.free_all_blocks()
    assert arena().used_bytes < MIB
    assert taken() <= 4 * MIB


def test_a_graph_is_launched_after_the_mode(stream):
    graphs, (bits, x) = [], uploaded(4)
    with capture(stream, graphs):
        y = copied(copied(x))
    chainer_ooc.disable()
    graphs[0].launch()
    assert y.get().tobytes() == bits.tobytes()
    del x, y
    chainer_ooc.enable(limit=64 * MIB, min_bytes=1)


def test_where_nothing_else_is_left_it_goes(stream):
    """As CuPy's pool gives all that is free back before it raises."""
    graphs, (_, x) = [], uploaded(5, 15 * MIB)
    with capture(stream, graphs):
        y = copied(copied(x))
    del x, y, graphs
    assert arena().used_bytes >= 30 * MIB
    assert len(blocks([20 * MIB] * 3)) == 3
