"""Chainer's own GPU and cuDNN tests of the functions that use cuDNN.

``CHAINER_SOURCE=/path/to/chainer-7.8.1 pytest tests/gpu/test_cudnn_chainer_suite.py``
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

#: Under tests/chainer_tests.
FILES = (
    "functions_tests/connection_tests/test_convolution_2d.py",
    "functions_tests/connection_tests/test_convolution_nd.py",
    "functions_tests/connection_tests/test_deconvolution_2d.py",
    "functions_tests/connection_tests/test_deconvolution_nd.py",
    "functions_tests/pooling_tests/test_max_pooling_2d.py",
    "functions_tests/pooling_tests/test_max_pooling_nd.py",
    "functions_tests/pooling_tests/test_average_pooling_2d.py",
    "functions_tests/pooling_tests/test_average_pooling_nd.py",
    "functions_tests/normalization_tests/test_batch_normalization.py",
    "functions_tests/normalization_tests/test_group_normalization.py",
    "functions_tests/activation_tests/test_relu.py",
    "functions_tests/activation_tests/test_sigmoid.py",
    "functions_tests/activation_tests/test_tanh.py",
    "functions_tests/activation_tests/test_clipped_relu.py",
    "functions_tests/activation_tests/test_softmax.py",
    "functions_tests/activation_tests/test_log_softmax.py",
    "functions_tests/noise_tests/test_dropout.py",
    "functions_tests/array_tests/test_spatial_transformer_grid.py",
    "functions_tests/array_tests/test_spatial_transformer_sampler.py",
    "functions_tests/rnn_tests/test_function_n_step_lstm.py",
    "functions_tests/rnn_tests/test_function_n_step_gru.py",
    "functions_tests/rnn_tests/test_function_n_step_rnn.py",
    "links_tests/connection_tests/test_convolution_2d.py",
    "links_tests/normalization_tests/test_batch_normalization.py",
)


@pytest.fixture(scope="module")
def source():
    path = os.environ.get("CHAINER_SOURCE")
    if not path:
        pytest.skip("needs CHAINER_SOURCE: a checkout of Chainer v7.8.1")
    tests = pathlib.Path(path) / "tests" / "chainer_tests"
    assert tests.is_dir(), f"CHAINER_SOURCE={path} has no tests/chainer_tests"
    return tests


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_chainers_own(chainer_gpu, source, tmp_path, file):
    suite = ROOT / "tests" / "chainer_suite"
    command = [sys.executable, "-P", "-m", "pytest", str(source / file), "-q", "--tb=short"]
    command += ["-m", "(gpu or cudnn) and not multi_gpu and not ideep and not chainerx"]
    command += ["-c", str(suite / "pytest.ini"), "--rootdir", str(source.parent)]
    command += ["-p", "tests.chainer_suite.plugin", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CHAINER_OOC_CUDNN_RNN": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800
    )
    # 5: nothing was collected for these markers
    assert done.returncode in (0, 5), done.stdout[-6000:]
