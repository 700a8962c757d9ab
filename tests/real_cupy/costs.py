"""What one iteration of ResNet-50 costs the host: calls of CUDA and of Python. Nothing is computed and no data moves.

    python -m tests.doubles.cuda_runtime tests/real_cupy/costs.py

prints them. ``costs.json`` has what they may be, as a fixed part and one for each copy: lower it when they become less.
"""

from __future__ import annotations

import gc
import json
import sys

import chainer
import cupy

import chainer_ooc
from tests.doubles import cuda_runtime

BATCH, SIDE = 64, 224
#: Iterations until a plan has been made, made again from better times, and tried.
SETTLED = 10
#: By what is measured: the functions of CUDA.
CALLS = {
    "events made": ("cudaEventCreateWithFlags",),
    "events recorded": ("cudaEventRecord",),
    "events asked": ("cudaEventQuery", "cudaStreamQuery"),
    "waits of the host": ("cudaEventSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize"),
    "times taken": ("cudaEventElapsedTime",),
    "waits of streams": ("cudaStreamWaitEvent",),
    "kernels": ("cuLaunchKernel",),
    "copies": ("cudaMemcpyAsync", "cudaMemcpy"),
    "memory of the GPU allocated": ("cudaMalloc", "cudaFree"),
    "memory of the host locked": ("cudaHostRegister", "cudaHostAlloc"),
    "current GPU asked or set": ("cudaGetDevice", "cudaSetDevice"),
}


class Classifier(chainer.Chain):
    """ResNet-50 and its loss."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.net = chainer.links.ResNet50Layers(pretrained_model=None)

    def forward(self, x, t):
        return chainer.functions.softmax_cross_entropy(self.net(x, layers=["fc6"])["fc6"], t)


def measured(step) -> dict[str, int]:
    """Return the calls of one iteration."""
    calls = [0, 0]

    def count(frame, event, argument):
        if event == "call":
            calls[0] += 1
            calls[1] += "/chainer_ooc/" in frame.f_code.co_filename

    gc.collect()
    cuda_runtime.reset()
    step()
    counts = cuda_runtime.counts()
    table = {what: sum(counts[name] for name in names) for what, names in CALLS.items()}
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return table | {"calls of Python": calls[0], "of them in chainer_ooc": calls[1]}


def all_costs() -> dict[str, dict[str, int]]:
    """Return the costs of an iteration in each mode."""
    cuda_runtime.setup(data=False, simulates_time=True)
    cuda_runtime.find_unchanged()
    model = Classifier()
    model.to_device("@cupy:0")
    optimizer = chainer.optimizers.MomentumSGD().setup(model)
    x = cupy.zeros((BATCH, 3, SIDE, SIDE), "f")
    t = cupy.zeros(BATCH, "i")

    def step() -> None:
        optimizer.update(model, x, t)

    for _ in range(2):
        step()
    costs = {"stock Chainer": measured(step)}
    needed = cuda_runtime.memory()["peak"]
    modes = {
        "all fits": {"limit": 2 * needed},
        "half the memory, by plan": {"limit": needed // 2, "single_backward": True},
    }
    for name, settings in modes.items():
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()
        with chainer_ooc.out_of_core_mode(**settings):
            for _ in range(SETTLED):
                step()
            costs[name] = measured(step)
    return costs


if __name__ == "__main__":
    json.dump(all_costs(), sys.stdout, indent=1)
    print()
