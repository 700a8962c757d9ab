"""Stock Chainer's GPU code runs on the cuDNN modules and gives what its CPU code gives."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent
CONVOLUTION = ("ConvolutionForward", "ConvolutionBackwardData", "ConvolutionBackwardFilter")
RNN = ("RNNForward", "RNNBackwardData_v8", "RNNBackwardWeights_v8", "GetRNNWeightParams")
NORMALIZATION = ("BatchNormalizationForwardTrainingEx", "BatchNormalizationBackwardEx")

#: Start of a case's name: the C functions that it must call.
CALLS = {
    "convolution_2d": CONVOLUTION,
    "convolution_2d autotune": tuple(
        f"FindConvolution{direction}AlgorithmEx"
        for direction in ("Forward", "BackwardData", "BackwardFilter")
    ),
    "convolution_nd": CONVOLUTION,
    "deconvolution_2d": (*CONVOLUTION, "AddTensor"),
    "deconvolution_nd": (*CONVOLUTION, "AddTensor"),
    "max_pooling": ("PoolingForward", "PoolingBackward"),
    "average_pooling": ("PoolingForward", "PoolingBackward"),
    "relu": ("ActivationForward", "ActivationBackward"),
    "sigmoid": ("ActivationForward", "ActivationBackward"),
    "tanh": ("ActivationForward", "ActivationBackward"),
    "clipped_relu": ("ActivationForward", "ActivationBackward"),
    "softmax": ("SoftmaxForward", "SoftmaxBackward"),
    "log_softmax": ("SoftmaxForward", "SoftmaxBackward"),
    "batch_normalization": NORMALIZATION,
    "spatial_transformer_grid": ("SpatialTfGridGeneratorForward", "SpatialTfGridGeneratorBackward"),
    "spatial_transformer_sampler": ("SpatialTfSamplerForward", "SpatialTfSamplerBackward"),
    "rnn": RNN,
    "lstm": RNN,
    "gru": RNN,
    "bi-": RNN,
    "dropout": ("DropoutForward", "DropoutBackward"),
    "channels last": (*CONVOLUTION, *NORMALIZATION),
}


def _print(program: str, *names: str, **environment: str) -> list[dict]:
    path = [str(FOLDER.parents[2]), str(FOLDER), os.environ.get("PYTHONPATH", "")]
    variables = {
        **{k: v for k, v in os.environ.items() if not k.startswith("CHAINER_OOC_")},
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    result = subprocess.run(
        [sys.executable, str(FOLDER / program), *names],
        env=variables, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def _run(*names: str, **environment: str) -> dict[str, dict]:
    cases = _print("chainer_on_stand_ins.py", *names, **environment)
    return {case["case"]: case for case in cases}


@pytest.fixture(scope="module")
def cases():
    return _run(CHAINER_OOC_CUDNN_RNN="1")


@pytest.mark.parametrize("name", CALLS)
def test_same_results_as_on_the_cpu(cases, name):
    chosen = [case for case in cases.values() if case["case"].startswith(name)]
    assert chosen
    for case in chosen:
        assert case["problem"] is None, case["problem"]
        missing = {"cudnn" + function for function in CALLS[name]} - set(case["called"])
        assert not missing, f"{case['case']} did not call {missing}"


def test_every_case_is_looked_at(cases):
    assert all(name.startswith(tuple(CALLS)) for name in cases)


def test_deterministic_pooling_and_search(cases):
    deterministic = cases["convolution_2d deterministic"]["called"]
    assert not any("Find" in function for function in deterministic)


def test_recurrent_networks_leave_cudnn_alone_by_default():
    cases = _run("lstm", "bi-gru", "rnn")
    assert len(cases) == 6
    for name, case in cases.items():
        assert not any("RNN" in function for function in case["called"]), name


def test_products_run_again_with_the_algorithm_of_the_first_run():
    """Where cuDNN calls that deterministic, and recomputation trusts it."""
    cases = {tuple(case["case"]): case for case in _print("reruns_on_stand_ins.py")}
    names = {name for name, *_ in cases} - {"linear", "before another"}
    assert len(names) == 6
    for name in names:
        for deterministic in (False, True):
            for trusts in (False, True):
                case = cases[name, deterministic, trusts]
                may = deterministic and trusts
                assert (case["may"], case["ran"]) == (may, [6, 6] if may else [6]), case
    on_request = cases["convolution_2d", True, False, "cudnn_deterministic"]
    assert (on_request["may"], on_request["ran"]) == (True, [6, 6])
    unknown = cases["before another", True, True]
    assert (unknown["may"], unknown["ran"]) == (False, [6, 6])
    for workspace in (None, ":4096:8", ":16:8", ":0:0"):
        for one_stream in (True, False):
            may = workspace in (":4096:8", ":16:8") and one_stream
            assert cases["linear", workspace, one_stream]["may"] is may
