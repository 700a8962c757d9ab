"""Time training steps of whole networks in Chainer on cuDNN, and in torch in the same run.

    python benchmarks/cuda_models.py --model resnet50 --batch 32 256 --json models.json

Forward, backward and momentum SGD of ImageNet networks, in images per second. ``ratio`` is
Chainer's speed divided by torch's. ``mixed16`` is float16 data and parameters with float32 updates
in Chainer, autocast in torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import cuda_common as common

#: Chainer's class and the layer before the softmax; torchvision's name and arguments.
MODELS = {
    "resnet50": ("ResNet50Layers", "fc6", "resnet50", {}),
    "googlenet": (
        "GoogLeNet",
        "loss3_fc",
        "googlenet",
        {"aux_logits": False, "init_weights": False},
    ),
    "vgg16": ("VGG16Layers", "fc8", "vgg16", {}),
}
CLASSES = 1000


def chainer_step(model: str, batch: int, mode: str) -> Any:
    import chainer
    import chainer.functions as F
    import chainer.links as L
    import cupy

    class_name, last, _, _ = MODELS[model]
    mixed = mode == "mixed16"
    chainer.global_config.dtype = chainer.mixed16 if mixed else "float32"
    net = getattr(L, class_name)(pretrained_model=None)
    net.to_device("@cupy:0")
    optimizer = chainer.optimizers.MomentumSGD(lr=0.01)
    if mixed:
        optimizer.use_fp32_update()
    optimizer.setup(net)
    dtype = "float16" if mixed else "float32"
    x = cupy.random.uniform(-1, 1, (batch, 3, 224, 224)).astype(dtype)
    t = cupy.random.randint(0, CLASSES, batch).astype("i")

    def step() -> None:
        y = net(x, layers=[last])[last]
        loss = F.softmax_cross_entropy(y, t)
        net.cleargrads()
        loss.backward()
        del y, loss
        optimizer.update()

    return step


def torch_step(model: str, batch: int, mode: str) -> Any:
    import torch
    import torchvision

    _, _, name, arguments = MODELS[model]
    net = getattr(torchvision.models, name)(weights=None, **arguments).cuda().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    x = torch.rand(batch, 3, 224, 224, device="cuda")
    t = torch.randint(0, CLASSES, (batch,), device="cuda")
    mixed = mode == "mixed16"

    def step() -> None:
        with torch.autocast("cuda", torch.float16, enabled=mixed):
            loss = torch.nn.functional.cross_entropy(net(x), t)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def worker(options: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """Time one network in one framework; memory is the peak that the framework's pool held."""
    import chainer
    import cupy

    import chainer_ooc  # noqa: F401

    common.set_mode(task["mode"], options.workspace, not options.no_autotune)
    framework, mode, batch = task["framework"], task["mode"], task["batch"]
    result = dict(task)
    with chainer.using_config("use_cudnn", "never" if framework == "without_cudnn" else "auto"):
        make = torch_step if framework == "torch" else chainer_step
        step = make(task["model"], batch, mode)
        time = common.milliseconds(step, options.repeat)
    result["images_per_second"] = 1000 * batch / time
    if framework == "torch":
        import torch

        result["memory_bytes"] = torch.cuda.max_memory_reserved()
    else:
        result["memory_bytes"] = cupy.get_default_memory_pool().total_bytes()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    common.common_arguments(parser)
    options = parser.parse_args()
    common.need_gpu()
    if options.worker:
        print(json.dumps(worker(options, json.loads(options.worker))))
        return
    import chainer_ooc  # noqa: F401

    about = common.machine()
    print(json.dumps(about))
    frameworks = ["chainer"]
    try:
        import torchvision  # noqa: F401

        frameworks.append("torch")
    except ImportError:
        print("torch is left out: pip install torch torchvision", file=sys.stderr)
    if options.without_cudnn:
        frameworks.append("without_cudnn")
    results, rows = [], []
    for model in options.model:
        for mode in options.mode:
            for batch in options.batch:
                speeds: dict[str, float] = {}
                for framework in frameworks:
                    task = {"model": model, "mode": mode, "batch": batch, "framework": framework}
                    found = common.in_worker(__file__, options, task)
                    if found is not None:
                        results.append(found)
                        speeds[framework] = found["images_per_second"]
                rows.append(
                    (model, mode, batch, speeds.get("chainer"), speeds.get("torch"),
                     common.ratio(speeds.get("chainer"), speeds.get("torch")),
                     speeds.get("without_cudnn"))
                )  # fmt: skip
    print()
    common.table(
        ("model", "mode", "batch", "chainer images/s", "torch", "ratio", "without cuDNN"), rows
    )
    common.write(options.json, results, about)
    if not results:
        sys.exit("nothing could be measured")


if __name__ == "__main__":
    main()
