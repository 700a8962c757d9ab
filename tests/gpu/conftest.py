"""Tests that need an NVIDIA GPU: skipped where there is none."""

from __future__ import annotations

import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parent


def _reason() -> str | None:
    """Return why the tests cannot run, ``None`` if they can."""
    try:
        import cupy
    except Exception as error:
        return f"needs CuPy ({type(error).__name__}: {str(error).strip().splitlines()[-1]})"
    try:
        return None if cupy.cuda.runtime.getDeviceCount() else "needs a GPU"
    except Exception as error:
        return f"needs a GPU ({error})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if FOLDER in item.path.parents]
    reason = _reason() if here else None
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def chainer_gpu():
    """Chainer with cuDNN enabled, on the modules of this package or on CuPy's own.

    Skips when Chainer runs without cuDNN.
    """
    import chainer_ooc  # noqa: F401, I001  before Chainer, which it edits
    import chainer

    if not chainer.backends.cuda.cudnn_enabled:
        pytest.skip(f"Chainer runs without cuDNN: {chainer.backends.cuda._resolution_error}")
    return chainer


@pytest.fixture(autouse=True)
def _clean_configuration(request):
    """Every test starts with the default math mode, workspace limit and an empty pool."""
    if request.node.get_closest_marker("skip") is not None:
        yield
        return
    import cupy

    yield
    module = getattr(cupy, "cudnn", None)
    if module is not None and hasattr(module, "set_math_mode"):
        module.set_math_mode("fp32")
    cupy.get_default_memory_pool().free_all_blocks()
