"""Run Chainer's convolutions again as ``recompute`` does, on the stand-ins for CuPy and libcudnn.

A program of its own, as ``chainer_on_stand_ins.py``. Prints one JSON object per case: whether the function may run
again, and the algorithms of cuDNN that its first run and its second one have used.
"""

from __future__ import annotations

import contextlib
import json
import os
import types

import numpy
from chainer_on_stand_ins import F, L, chainer, cupy, fake
from fake_cudnn import Offer

from chainer_ooc.compat.cudnn import convolution as compat
from chainer_ooc.graph import recompute

BIAS = chainer.Variable(cupy.ones(6, "f"))  # functions do not keep theirs
DIRECTIONS = {"cudnnConvolutionForward": "Forward", "cudnnConvolutionBackwardData": "BackwardData"}


def convolution(x, **options):
    return F.convolution_2d(x, cupy.ones((6, 4, 3, 3), "f"), **options)


#: The functions, of an array of (2, 4, 7, 6).
FUNCTIONS = {
    "convolution_2d": convolution,
    "convolution_2d with a bias": lambda x: convolution(x, b=BIAS),
    "convolution_nd": lambda x: F.convolution_nd(
        F.reshape(x, (2, 4, 7, 3, 2)), cupy.ones((6, 4, 3, 2, 1), "f")
    ),
    "deconvolution_2d": lambda x: F.deconvolution_2d(x, cupy.ones((4, 6, 3, 3), "f")),
    "deconvolution_nd": lambda x: F.deconvolution_nd(x, cupy.ones((4, 6, 3, 3), "f")),
    "channels last": None,
}


def run(name, deterministic, trusts, **config):
    """Run a function, let cuDNN's advice change, and run it again if that may be."""
    for offers in fake.offers.values():
        offers[:] = [Offer(6, 64, deterministic=deterministic), Offer(1, 0)]
    fake.calls.clear()
    compat._plan.cache_clear()
    recompute._TRUSTS_LIBRARIES = trusts
    x = chainer.Variable(cupy.asarray(numpy.random.rand(2, 4, 7, 6).astype("f")))
    with contextlib.ExitStack() as stack:
        for key, value in config.items():
            stack.enter_context(chainer.using_config(key, value))
        if name == "channels last":
            with chainer.using_config("compute_mode", "cudnn_fast"):
                link = L.Convolution2D(4, 6, 3, nobias=True)
                link.to_device("@cupy:0")
                y = link(x.as_layout(chainer.memory_layouts.CUDNN_CHANNEL_LAST_X))
        else:
            y = FUNCTIONS[name](x)
        func = y.creator_node
        may = recompute._is_deterministic(func)
        inputs = [BIAS.array if node.data is None else node.data for node in func.inputs]
        for offers in fake.offers.values():
            offers.reverse()
        cupy.cudnn.set_max_workspace_size(32)  # another plan is made for the same shapes
        if may:
            again = object.__new__(type(func))
            again.__dict__.update(func.__dict__)
            (array,) = recompute._rules[type(func)].rerun(again, inputs)
            numpy.testing.assert_array_equal(array, y._data[0])
        cupy.cudnn.set_max_workspace_size(1 << 20)
    ran = [call.arguments["algo"] for call in fake.calls if call.function in DIRECTIONS]
    print(json.dumps({"case": [name, deterministic, trusts, *config], "may": may, "ran": ran}))


def linear(workspace, one_stream):
    """Tell whether a matrix product may run again."""
    recompute._TRUSTS_LIBRARIES = True
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if workspace is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace
    manager = types.SimpleNamespace(device=types.SimpleNamespace(on_one_stream=one_stream))
    recompute.state.manager_for = lambda array: manager
    y = F.linear(cupy.ones((4, 3), "f"), cupy.ones((2, 3), "f"))
    may = recompute._is_deterministic(y.creator_node)
    print(json.dumps({"case": ["linear", workspace, one_stream], "may": may, "ran": []}))


def main():
    recompute.state.array_types = lambda: {numpy.ndarray, cupy.ndarray}
    recompute.state.process.gpus = types.SimpleNamespace(array_type=cupy.ndarray, managers={})
    recompute.install()
    for name in FUNCTIONS:
        for deterministic in (False, True):
            for trusts in (False, True):
                run(name, deterministic, trusts)
    run("convolution_2d", True, False, cudnn_deterministic=True)
    FUNCTIONS["before another"] = lambda x: (convolution(x), convolution(x))[0]
    run("before another", True, True)
    for workspace in (None, ":4096:8", ":16:8", ":0:0"):
        for one_stream in (True, False):
            linear(workspace, one_stream)


if __name__ == "__main__":
    main()
