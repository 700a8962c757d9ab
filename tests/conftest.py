"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# BLAS reads it when it is loaded. With a thread for each core most of the tests' time was that of threads that spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from tests.doubles import cuda_runtime

if cuda_runtime.is_needed():  # before anything imports CuPy, as Chainer does
    cuda_runtime.install()

import chainer_ooc  # the import hook comes before any import of Chainer
from chainer_ooc import wording
from chainer_ooc.swap.devices.ram import native
from tests import forked_python as forked_python_module

ROOT = Path(chainer_ooc.__file__).resolve().parents[1]

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run what takes minutes, too")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many workers ``-n auto`` starts: one for each core, up to 8, as tests may take a GiB each."""
    return min(8, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    gpu = has_gpu() if any(item.get_closest_marker("gpu") for item in items) else False
    double = cuda_runtime.is_installed()
    for item in items:
        if item.get_closest_marker("exhaustive") and not config.getoption("--exhaustive"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest --exhaustive"))
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="no GPU, or no CuPy"))
        if item.get_closest_marker("gpu") and double and not item.get_closest_marker("on_double"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU that computes"))
        if item.get_closest_marker("extension") and native.allocator is None:
            reason = f"needs the C extension: {native.HOW_TO_GET_IT}"
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("mpi") and (mpiexec() is None or not has_mpi4py()):
            item.add_marker(pytest.mark.skip(reason="needs mpi4py and mpiexec"))


def has_gpu() -> bool:
    """Tell whether CuPy is installed and finds a GPU."""
    try:
        import cupy

        return bool(cupy.cuda.is_available())
    except Exception:
        return False


def has_mpi4py() -> bool:
    return importlib.util.find_spec("mpi4py") is not None


def mpiexec() -> str | None:
    """Return the path of ``mpiexec``, that of this interpreter's environment first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which("mpiexec", path=path)


@pytest.fixture(autouse=True, scope="module")
def garbage_of_this_module_only() -> None:
    """Let collections pass over what is there before a module's tests: modules, and thousands of tests and reports.

    Tests and the engine collect garbage often. With all of that it takes half a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Give every test the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    yield


@pytest.fixture(autouse=True)
def untold() -> None:
    """Let every test be told what was told in another one."""
    wording._said.clear()


def environment_of_children() -> dict[str, str]:
    """Return the environment of the interpreters that tests start."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if cuda_runtime.is_installed():
        paths.insert(0, str(cuda_runtime.SITE))
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)))
    if native.allocator is None:  # else all would say so
        environment.setdefault("PYTHONWARNINGS", "ignore:chainer_ooc has no C extension")
    return environment


@pytest.fixture(scope="session")
def forked_python() -> Iterator[str]:
    """Return an interpreter, for scripts, that has imported Chainer already."""
    modules = ("chainer_ooc", "chainer", "psutil")
    with (
        tempfile.TemporaryDirectory() as folder,
        forked_python_module.installed(Path(folder), modules, [], environment_of_children()) as one,
    ):
        yield str(one)


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Return a function that runs this interpreter in ``tmp_path`` with the package importable.

    ``run_python(*arguments, ranks=0, env=None, timeout=120, python=sys.executable)`` gives the
    ``CompletedProcess``, with its output as text. With ``ranks``, that many run under ``mpiexec``.
    """

    def run(
        *arguments: object,
        ranks: int = 0,
        env: dict[str, str] | None = None,
        timeout: float = 120,
        python: str = sys.executable,
    ) -> subprocess.CompletedProcess[str]:
        environment = environment_of_children() | (env or {})
        command = [python, *map(str, arguments)]
        if ranks:
            command = [str(mpiexec()), "-n", str(ranks), *command]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            timeout=timeout,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    return run
