"""Every CUDA kernel of Chainer and ChainerMN compiles with NVRTC on this CuPy; needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.conftest import has_mpi4py

FOLDER = pathlib.Path(__file__).parent

#: Put together at run time; compiled from what their generators, or their callers on mocks, make.
PUT_TOGETHER = {
    "chainer.functions.pooling.average_pooling_nd",
    "chainer.functions.pooling.max_pooling_nd",
    "chainer.functions.rnn.tree_lstm",
    "chainer.optimizers.rmsprop",
    "chainer.utils.conv_nd",
    "chainermn.communicators.pure_nccl_communicator",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype"), [("80", "e"), ("80", "f"), ("80", "d"), ("70", "e"), ("90", "e")]
)
def test_kernels_compile(arch, dtype):
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("needs CuPy with CUDA's compiler: pip install 'cupy-cuda12x[ctk]'")
    path = os.pathsep.join([str(FOLDER.parents[2]), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, str(FOLDER / "chainer_kernels.py"), arch, dtype],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    if report["unknown"]:
        pytest.skip(report["unknown"])
    assert report["kernels"] > 130
    assert not report["problems"], "\n".join(report["problems"])
    expected = {name for name in PUT_TOGETHER if has_mpi4py() or not name.startswith("chainermn.")}
    assert {place.partition(":")[0] for place in report["dynamic"]} == expected
