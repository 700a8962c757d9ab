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
