"""Real CuPy on a double of CUDA that computes nothing: skipped where there is no CuPy, or a GPU."""

from __future__ import annotations

import gc
import pathlib

import pytest

from tests.doubles import cuda_runtime

FOLDER = pathlib.Path(__file__).parent
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def pytest_collection_modifyitems(items):
    if not cuda_runtime.is_installed():
        skip = pytest.mark.skip(reason="needs CuPy on the double of CUDA: make test-cuda")
        for item in items:
            if FOLDER in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def cuda(request):
    """The double, as new, with 4 GiB. At the end CuPy must have made no mistake that the test does not know of."""
    if request.node.get_closest_marker("skip") is not None:
        yield
        return
    import cupy

    import chainer_ooc

    pool = cupy.get_default_memory_pool()
    gc.collect()
    pool.free_all_blocks()
    if (
        pool.total_bytes()
    ):  # as cuDNN's states of dropout, which keep the 16 MiB that they lie in from being given back
        cupy.clear_memo()
        gc.collect()
        pool.free_all_blocks()
    assert not pool.total_bytes(), "another test's arrays are alive: limits are smaller than that"
    cuda_runtime.reset()
    cuda_runtime.setup(total=4 * GIB)
    yield cuda_runtime
    broken = cuda_runtime.complaints()
    cuda_runtime.reset()
    cuda_runtime.setup()
    chainer_ooc.disable()
    pool.set_limit(size=0)
    gc.collect()
    pool.free_all_blocks()
    assert broken == [] == cuda_runtime.complaints()


@pytest.fixture
def run_on_double(run_python):
    """Return a function that runs code in another process on the double, as ``run_python`` does."""

    def run(code, **given):
        return run_python("-m", "tests.doubles.cuda_runtime", "-c", code, **given)

    return run
