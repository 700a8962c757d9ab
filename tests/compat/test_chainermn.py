"""ChainerMN trains under mpiexec; the communicators that version 7 removed map to successors."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import chainer
import chainermn
import numpy as np
import pytest

from chainer_ooc.compat import communicators

SCRIPT = Path(__file__).with_name("mn_train.py")


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["naive", "hierarchical"])
def test_two_ranks_train_to_the_same_parameters(run_python, tmp_path, name):
    script = shutil.copy(SCRIPT, tmp_path)
    code = f"import chainer_ooc, runpy, sys; sys.argv = ['', {name!r}, 'out']; "
    done = run_python("-c", f"{code} runpy.run_path({str(script)!r})", ranks=2, timeout=100)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    first, second = sorted(ranks, key=lambda rank: rank["rank"])
    assert (first["size"], second["size"]) == (2, 2)
    assert first["communicator"] == "NaiveCommunicator"
    assert first["iterations"] == 23  # of 24, the first one broadcasts the initial values
    assert first["weight"] == second["weight"]
    assert first["accuracy"] == second["accuracy"]
    assert first["accuracy"][-1] > 0.8
    assert first["batch"] == second["batch"] == [0, 1, 2]
    expected = 0 if name == "naive" else 1
    assert [len(first["warnings"]), len(second["warnings"])] == [expected, expected]
    assert "test.0.12" in first["saved"]  # by the checkpointer, after two epochs
    assert "test.1.12" in second["saved"]


@pytest.mark.parametrize("name", communicators.REMOVED)
@pytest.mark.parametrize(
    "gpu, nccl, replacement",
    [(True, True, "pure_nccl"), (True, False, "flat"), (False, True, "naive")],
)
def test_removed_communicators_map_to_what_fits(monkeypatch, name, gpu, nccl, replacement):
    monkeypatch.setattr(communicators, "_has_gpu", lambda: gpu)
    monkeypatch.setattr(communicators, "_has_nccl", lambda: nccl)
    with pytest.warns(UserWarning, match=f"'{name}' was removed .* using '{replacement}'"):
        assert communicators.current_name(name) == replacement


@pytest.mark.parametrize("name", ["naive", "flat", "pure_nccl", "non_cuda_aware", "dummy"])
@pytest.mark.filterwarnings("error")
def test_current_communicators_keep_their_name(name):
    assert communicators.current_name(name) == name


@pytest.mark.mpi
def test_an_unknown_communicator_is_an_error(run_python):
    code = "import chainer_ooc, chainermn; chainermn.create_communicator('hierachical')"
    done = run_python("-c", code)
    assert 'ValueError: Unrecognized communicator: "hierachical"' in done.stderr


@pytest.mark.mpi
@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy")
def test_what_needs_nccl_finds_it(run_python):
    """With no GPU the communicator can be made and configured, and the updater says that it can run."""
    code = (
        "import chainer_ooc, chainermn; from cupy.cuda import nccl\n"
        "from chainer.training.updaters import MultiprocessParallelUpdater as Updater\n"
        "communicator = chainermn.create_communicator('pure_nccl')\n"
        "communicator.set_config('allreduce_grad_dtype', 'float16')\n"
        "print(nccl.get_version() >= 20000, type(communicator).__name__, Updater.available())"
    )
    done = run_python("-c", code)
    if "libnccl" in done.stderr or "NCCL is not available" in done.stderr:
        pytest.skip("needs NCCL: pip install nvidia-nccl-cu12, or -cu13")
    assert done.stdout == "True PureNcclCommunicator True\n", done.stderr


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="needs mpi4py")
@pytest.mark.parametrize("transferred", ["float16", "float32"])
def test_gradients_are_unpacked_from_the_dtype_in_which_they_were_transferred(transferred):
    from chainermn.communicators import _memory_utility

    class Buffer:
        """Received memory on the host."""

        memory = np.arange(6, dtype=transferred)

        def to_device(self, array, size, offset, stream):
            array[...] = self.memory.view("u1")[offset : offset + size].view(array.dtype)

    params = [chainer.Parameter(np.zeros(3, "f")) for _ in range(2)]
    for param in params:
        param.grad = np.zeros(3, "f")
    _memory_utility.unpack_params(params, "grad", Buffer(), np.dtype(transferred), False)
    assert [param.grad.tolist() for param in params] == [[0, 1, 2], [3, 4, 5]]
    assert params[0].grad.dtype == np.float32


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="needs mpi4py")
def test_the_warning_points_at_the_callers_line(monkeypatch):
    monkeypatch.setattr(communicators, "_has_gpu", lambda: False)
    with pytest.warns(UserWarning) as caught:
        chainermn.create_communicator("single_node", mpi_comm=_Comm())
    assert caught[0].filename == __file__


class _Comm:
    """As much of an MPI communicator of one rank as making a ChainerMN communicator needs."""

    rank, size = 0, 1

    def allgather(self, value):
        return [value]

    gather = allgather

    def bcast(self, value, root=0):
        return value

    def scatter(self, values, root=0):
        return values[0]
