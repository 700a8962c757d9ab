"""Every CUDA kernel of Chainer and ChainerMN compiles with NVRTC on this CuPy; needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent

#: Put together at run time by code that :mod:`chainer_kernels` does not call.
NOT_COVERED = {"chainer.functions.rnn.tree_lstm", "chainer.optimizers.rmsprop"}


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype"), [("80", "e"), ("80", "f"), ("70", "e"), ("90", "e")])
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
    assert report["kernels"] > 130
    assert not report["problems"], "\n".join(report["problems"])
    generated = ("_pooling_nd", "chainer.utils.conv_nd")  # compiled from their generators
    missed = {place.partition(":")[0] for place in report["dynamic"]}
    assert {name for name in missed if not any(g in name for g in generated)} == NOT_COVERED
