"""Calls of CUDA that fail, one after the other: errors of a known kind or right bits, and training works afterwards."""

from __future__ import annotations

import pytest

FUNCTIONS = ("cudaMalloc", "cudaMemcpyAsync", "cudaHostRegister", "cudaEventCreateWithFlags")


HOST_LIMITS = pytest.mark.parametrize("host_limit", ["null", "0"], ids=["pinned", "swap file"])


def sweep(run_python, *arguments):
    done = run_python("-m", "tests.real_cupy.sweep", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("times", [1, 1 << 30], ids=["once", "from then on"])
@HOST_LIMITS
@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_call_may_fail(run_python, function, host_limit, times):
    sweep(run_python, function, host_limit, times, 8)


@HOST_LIMITS
@pytest.mark.parametrize("function", ["cudaMemcpyAsync", "cudaEventRecord", "cudaEventQuery"])
def test_a_kernel_may_fail_after_each_call(run_python, function, host_limit):
    """From then on each call returns its error: nobody waits for work that will never be done."""
    sweep(run_python, function, host_limit, 0, 8)


FAILED = """
import gc, chainer, cupy, chainer_ooc
from chainer_ooc import state
from tests.doubles import cuda_runtime as cuda
from tests.real_cupy.known_net import Upload
NBYTES = 1 << 18
cuda.setup(total=1 << 30, lag=1 << 40)  # nothing has ended before somebody waits for it
chainer_ooc.enable(limit=5 * NBYTES, min_bytes=1, host_limit={host_limit}, recompute="{recompute}")
def forward():
    x = chainer.Variable(cupy.zeros(NBYTES // 4, "f"))
    for number in range(1, 11):
        x = (chainer.functions.sigmoid(x) if number % 2 else Upload(number, NBYTES, lambda a: a, {{}}).apply((x,))[0])
    return x
y = forward()
cuda.break_device(after=("cudaEventQuery", 3))
try:
    for _ in range(20):
        y.grad = y.array
        y.backward()
        del y
        y = forward()
except cupy.cuda.runtime.CUDARuntimeError as error:
    print(type(error).__name__, error)
y = None
gc.collect()
manager = state.process.gpus.managers[0]
assert repr(manager) and str(chainer_ooc.stats()) and str(chainer_ooc.explain())
chainer_ooc.disable()
assert not chainer_ooc.is_enabled()
print("ended")
"""


@pytest.mark.parametrize("recompute", ["auto", "never"])
@HOST_LIMITS
def test_a_program_ends_after_a_kernel_has_failed(run_on_double, host_limit, recompute):
    """It gets the error where it computes, and nowhere else."""
    given = {"host_limit": {"null": None}.get(host_limit, 0), "recompute": recompute}
    done = run_on_double(FAILED.format(**given))
    assert done.returncode == 0, done.stderr
    error, *rest = done.stdout.splitlines()
    assert error.startswith("CUDARuntimeError cudaErrorLaunchFailure")
    assert rest == ["ended"]
    assert "chainer_ooc" not in done.stderr  # CuPy's finalizers complain


def test_an_event_that_will_never_pass_is_an_error(cuda):
    """CuPy's ``Event.done`` says "not yet"."""
    import cupy

    from chainer_ooc.swap.devices.cuda.streams import CopyStreams

    streams = CopyStreams(cupy, 0)
    event = streams.mark()
    cuda.setup(total=1 << 32, lag=2)
    event = cupy.cuda.get_current_stream().record()
    assert [streams.has_passed(event) for _ in range(3)] == [False, False, True]
    cuda.break_device()
    assert not event.done
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorLaunchFailure"):
        streams.has_passed(event)
    cuda.reset()
