"""Time the layers of ResNet50 in Chainer on cuDNN, and in torch in the same run.

    python benchmarks/cuda_layers.py --batch 32 128 --json layers.json

Forward and backward of each distinct layer, in milliseconds. ``ratio`` is torch's time divided by
Chainer's: above 1 Chainer is faster. Memory layout is NCHW in both.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import cuda_common as common

#: Name, kind, input channels, spatial size, output channels, kernel, stride.
LAYERS = (
    ("conv1", "conv", 3, 224, 64, 7, 2),
    ("pool1", "pool", 64, 112, 64, 3, 2),
    ("res2 1x1", "conv", 64, 56, 64, 1, 1),
    ("res2 3x3", "conv", 64, 56, 64, 3, 1),
    ("res2 1x1 up", "conv", 64, 56, 256, 1, 1),
    ("res3 3x3 down", "conv", 128, 56, 128, 3, 2),
    ("res3 3x3", "conv", 128, 28, 128, 3, 1),
    ("res3 1x1 up", "conv", 128, 28, 512, 1, 1),
    ("res4 3x3", "conv", 256, 14, 256, 3, 1),
    ("res4 1x1 up", "conv", 256, 14, 1024, 1, 1),
    ("res5 3x3", "conv", 512, 7, 512, 3, 1),
    ("res5 1x1 down", "conv", 2048, 7, 512, 1, 1),
    ("bn1", "norm", 64, 112, 64, 0, 1),
    ("res2 bn", "norm", 256, 56, 256, 0, 1),
    ("res5 bn", "norm", 2048, 7, 2048, 0, 1),
    ("res2 relu", "relu", 256, 56, 256, 0, 1),
    ("pool5", "average", 2048, 7, 2048, 7, 1),
)


def chainer_step(layer: tuple[Any, ...], batch: int, dtype: str) -> Any:
    """Return a function that runs a layer forward and backward."""
    import chainer
    import chainer.functions as F
    import cupy

    _, kind, channels, size, out, kernel, stride = layer
    x = chainer.Variable(cupy.random.uniform(-1, 1, (batch, channels, size, size)).astype(dtype))
    if kind == "conv":
        w = cupy.random.uniform(-0.1, 0.1, (out, channels, kernel, kernel)).astype(dtype)
        parameters = [chainer.Variable(w)]
        run = lambda: F.convolution_2d(x, *parameters, stride=stride, pad=kernel // 2)  # noqa: E731
    elif kind == "norm":
        parameters = [chainer.Variable(f(channels, "f")) for f in (cupy.ones, cupy.zeros)]
        average, variance = cupy.zeros(channels, "f"), cupy.ones(channels, "f")
        run = lambda: F.batch_normalization(  # noqa: E731
            x, *parameters, running_mean=average, running_var=variance
        )
    else:
        parameters = []
        run = {
            "pool": lambda: F.max_pooling_2d(x, kernel, stride, pad=1, cover_all=False),
            "average": lambda: F.average_pooling_2d(x, kernel, stride),
            "relu": lambda: F.relu(x),
        }[kind]
    y = run()
    gy = cupy.random.uniform(-1, 1, y.shape).astype(dtype)
    del y

    def step() -> None:
        x.cleargrad()
        for parameter in parameters:
            parameter.cleargrad()
        y = run()
        y.grad = gy
        y.backward()

    return step


def torch_step(layer: tuple[Any, ...], batch: int, dtype: str) -> Any:
    import torch
    from torch import nn

    _, kind, channels, size, out, kernel, stride = layer
    type_ = getattr(torch, dtype)
    x = torch.rand(batch, channels, size, size, device="cuda", dtype=type_, requires_grad=True)
    module: Any = {
        "conv": lambda: nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False).to(type_),
        "norm": lambda: nn.BatchNorm2d(channels),
        "pool": lambda: nn.MaxPool2d(kernel, stride, 1),
        "average": lambda: nn.AvgPool2d(kernel, stride),
        "relu": lambda: nn.ReLU(),
    }[kind]().cuda()
    gy = torch.rand_like(module(x))

    def step() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(gy)

    return step


def worker(options: argparse.Namespace, task: dict[str, Any]) -> list[dict[str, Any]]:
    """Time all layers for one batch size and mode."""
    import chainer
    import cupy

    import chainer_ooc  # noqa: F401

    common.set_mode(task["mode"], options.workspace, not options.no_autotune)
    dtype = common.MODES[task["mode"]]["dtype"]
    try:
        import torch

        with_torch = torch.cuda.is_available()
    except ImportError:
        with_torch = False
    results = []
    for layer in LAYERS:
        result: dict[str, Any] = {"layer": layer[0], **task}
        variants = [("chainer", chainer_step, {})]
        if with_torch:
            variants.append(("torch", torch_step, {}))
        if options.without_cudnn:
            variants.append(("without_cudnn", chainer_step, {"use_cudnn": "never"}))
        for name, make, config in variants:
            # Reading the setting is part of a step, so it holds for all of it.
            with chainer.using_config("use_cudnn", config.get("use_cudnn", "auto")):
                try:
                    step = make(layer, task["batch"], dtype)
                    result[name] = common.milliseconds(step, options.repeat)
                except Exception as error:
                    result[f"{name}_error"] = f"{type(error).__name__}: {error}"[:300]
            step = None
            cupy.get_default_memory_pool().free_all_blocks()
            if with_torch:
                torch.cuda.empty_cache()
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.common_arguments(parser)
    options = parser.parse_args()
    common.need_gpu()
    if options.worker:
        print(json.dumps(worker(options, json.loads(options.worker))))
        return
    import chainer_ooc  # noqa: F401

    about = common.machine()
    print(json.dumps(about))
    results = []
    for mode in options.mode:
        for batch in options.batch:
            found = common.in_worker(__file__, options, {"mode": mode, "batch": batch}) or []
            results += found
            print(f"\n{mode}, batch {batch}: milliseconds forward + backward")
            rows = [
                (r["layer"], r.get("chainer"), r.get("torch"),
                 common.ratio(r.get("torch"), r.get("chainer")), r.get("without_cudnn"),
                 "; ".join(v for k, v in r.items() if k.endswith("_error")))
                for r in found
            ]  # fmt: skip
            header = ("layer", "chainer", "torch", "ratio", "without cuDNN", "errors")
            common.table(header, rows)
    common.write(options.json, results, about)
    if not results:
        sys.exit("nothing could be measured")


if __name__ == "__main__":
    main()
