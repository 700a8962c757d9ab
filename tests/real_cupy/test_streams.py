"""Streams of CuPy's that the engine must not use, or not now."""

from __future__ import annotations

import chainer
import pytest

import chainer_ooc
from chainer_ooc import state

cupy = pytest.importorskip("cupy")

KIB = 1 << 10
NBYTES = 256 * KIB


def all_right(seen):
    return seen == dict.fromkeys(range(13), True)


@pytest.mark.filterwarnings("ignore:ExternalStream is deprecated")
@pytest.mark.parametrize("host_limit", [None, 0], ids=["pinned", "swap file"])
@pytest.mark.parametrize("is_held", [False, True], ids=["forgotten", "referred to"])
def test_external_streams_are_destroyed_by_their_owners(tmp_path, host_limit, is_held):
    """The fixture finds the use of a stream after that."""
    from tests.real_cupy.known_net import step

    runtime, held = cupy.cuda.runtime, []
    settings = {"min_bytes": 1, "swap_dir": str(tmp_path), "host_limit": host_limit}
    with chainer_ooc.out_of_core_mode(limit=5 * NBYTES, **settings):
        for _ in range(3):
            number = runtime.streamCreate()
            external = cupy.cuda.ExternalStream(number)
            with external:
                assert all_right(step())
            if is_held:
                held.append(external)
            del external
            runtime.streamDestroy(number)
            assert all_right(step())
    assert state.process.gpus.managers[0].counters.bytes_out


def compute(arrays):
    """Run functions of Chainer forward and backward."""
    for array in arrays:
        y = chainer.functions.relu(chainer.functions.sigmoid(array))
        y.grad = y.array
        y.backward()


@pytest.mark.parametrize("host_limit", [None, 0], ids=["pinned", "swap file"])
@pytest.mark.parametrize("recompute", ["auto", "never"])
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("lag", [0, 50])
def test_a_graph_is_captured_while_arrays_move(cuda, tmp_path, host_limit, recompute, verify, lag):
    """The graph is not spoilt, nothing of ours is in it, and training goes on with the right bits."""
    from tests.real_cupy.known_net import Upload, bits_of, step

    cuda.setup(total=4 << 30, lag=lag)
    stream = cupy.cuda.Stream(non_blocking=True)
    settings = {"swap_dir": str(tmp_path), "host_limit": host_limit, "recompute": recompute}
    with (
        stream,
        chainer_ooc.out_of_core_mode(limit=10 * NBYTES, min_bytes=1, verify=verify, **settings),
    ):
        held = [cupy.empty(NBYTES // 4, "f") for _ in range(2)]
        for _ in range(2):
            assert all_right(step())
            seen = {}
            variable = chainer.Variable(cupy.asarray(bits_of(0, NBYTES).view("f4")))
            for number in range(1, 16):
                variable = Upload(number, NBYTES, lambda array: array, seen).apply((variable,))[0]
            compute(held)
            # There is no room, and copies are under way.
            before = cuda.counts()
            stream.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)  # the strictest
            try:
                for _ in range(3):
                    compute(held)
            finally:
                between = cuda.counts() - before
                graph = stream.end_capture()
            graph.launch()
            variable.grad = variable.array
            variable.backward()
            assert set(seen.values()) == {True}
            for name in ("cudaEventRecord", "cudaStreamWaitEvent", "cudaMemcpyAsync"):
                assert between[name] == 0, name
    assert state.process.gpus.managers[0].counters.bytes_out


def test_the_first_array_of_a_gpu_in_a_capture(run_on_double):
    """The engine for that GPU is made when the capture has ended."""
    code = """
import chainer, chainer_ooc, cupy
from chainer_ooc import state
from tests.doubles import cuda_runtime as cuda
cuda.setup(total=1 << 30)
chainer_ooc.enable(limit="64MiB")
x = cupy.ones(1 << 12, "f")
stream = cupy.cuda.Stream(non_blocking=True)
with stream:
    y = cupy.empty(1 << 12, "f")
    del y
    stream.begin_capture()
    chainer.functions.relu(chainer.Variable(x))
    assert not state.process.gpus.managers
    stream.end_capture()
    chainer.functions.relu(chainer.Variable(x))
    assert list(state.process.gpus.managers) == [0]
assert not cuda.complaints(), cuda.complaints()
"""
    done = run_on_double(code)
    assert done.returncode == 0, done.stderr
