"""Training ResNet-50 and GoogLeNet on a GPU, for ``gpu_steps.py``: in core, under limits and in unified memory."""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda_common import timed

import chainer_ooc

import chainer  # isort: skip
import chainer.functions as F  # isort: skip
import chainer.links as L  # isort: skip
import cupy  # isort: skip

MIB = 1 << 20
CLASSES = 1000
#: Chainer's class, the layer before the average over all places, and the name of the last link.
NETS = {
    "resnet50": (L.ResNet50Layers, "res5", "fc6"),
    "googlenet": (L.GoogLeNet, "inception_5b", "loss3_fc"),
}


class Classifier(chainer.Chain):
    """A network for images of any size that returns its loss."""

    def __init__(self, net: str) -> None:
        super().__init__()
        make, self.layer, self.last = NETS[net]
        with self.init_scope():
            self.net = make(pretrained_model=None)

    def forward(self, x: Any, t: Any) -> Any:
        h = self.net(x, layers=[self.layer])[self.layer]
        h = F.average_pooling_2d(h, h.shape[2:])
        if self.last == "loss3_fc":
            h = F.dropout(h, 0.4)
        return F.softmax_cross_entropy(self.net[self.last](h), t)


@functools.cache
def _on_host(net: str, mixed: bool) -> Classifier:
    np.random.seed(0)
    return Classifier(net)


class Trainer:
    """A network with its optimizer and one batch, on the current GPU.

    Args:
        net: A key of ``NETS``.
        side: Height and width of the images (pixels).
        batch: How many there are.
        mixed: Whether data and parameters are float16, with updates in float32.
    """

    def __init__(self, net: str, side: int, batch: int, mixed: bool = False) -> None:
        cupy.random.seed(0)
        with chainer.using_config("dtype", chainer.mixed16 if mixed else np.dtype("f")):
            self.model = copy.deepcopy(_on_host(net, mixed))
            self.model.to_device("@cupy:0")
            self.optimizer = chainer.optimizers.MomentumSGD(0.01)
            if mixed:
                self.optimizer.use_fp32_update()
            self.optimizer.setup(self.model)
        rng = np.random.RandomState(0)
        images = rng.rand(min(batch, 4), 3, side, side).astype("e" if mixed else "f")
        self.x = cupy.tile(cupy.asarray(images), (-(-batch // len(images)), 1, 1, 1))[:batch]
        self.t = cupy.asarray(rng.randint(0, CLASSES, batch).astype("i"))

    def step(self) -> None:
        """Run one iteration: forward, backward, update."""
        self.optimizer.update(self.model, self.x, self.t)

    def digest(self) -> str:
        """Return a sum of all bits of the parameters and of the statistics of batch normalizations."""
        total = hashlib.sha256()
        for _, link in sorted(self.model.namedlinks()):
            for name in sorted(link._params | link._persistent):
                value = getattr(link, name)
                value = value.array if isinstance(value, chainer.Variable) else value
                total.update(np.ascontiguousarray(chainer.cuda.to_cpu(value)).tobytes())
        return total.hexdigest()


Make = Callable[[], Trainer]


class InUse(cupy.cuda.MemoryHook):
    """The most bytes of the pool that were in use at one time: cached blocks do not count."""

    name = "InUse"
    peak = 0

    def malloc_postprocess(self, **_given: Any) -> None:
        self.peak = max(self.peak, cupy.get_default_memory_pool().used_bytes())


def empty_pool() -> None:
    """Give back what nothing refers to."""
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.get_default_pinned_memory_pool().free_all_blocks()


def peak_in_core(make: Make, iterations: int = 2) -> int:
    """Train stock Chainer. Return the most bytes of the pool that were in use at one time.

    Graphs are cycles of references after backward. The collector comes in time, as when memory is short.
    """
    empty_pool()
    with InUse() as in_use:
        trainer = make()
        for _ in range(iterations):
            trainer.step()
            gc.collect()
    return in_use.peak


def time_in_core(make: Make, settled: int, repeat: int) -> dict[str, float]:
    """Time iterations of stock Chainer."""
    empty_pool()
    trainer = make()
    return timed(trainer.step, cupy.cuda.Device().synchronize, settled, repeat)


def time_under_limit(
    make: Make, limit: int, settled: int, repeat: int, **settings: Any
) -> dict[str, float]:
    """Time iterations under a limit (bytes). Also return what one of them moves, and the pool's peak (MiB)."""
    empty_pool()
    names = ("bytes_out", "bytes_in", "bytes_discarded")
    with chainer_ooc.out_of_core_mode(limit=limit, single_backward=True, **settings):
        trainer = make()
        for _ in range(settled):
            trainer.step()
        before = chainer_ooc.stats()
        found = timed(trainer.step, cupy.cuda.Device().synchronize, 0, repeat)
        after = chainer_ooc.stats()
        peak = cupy.get_default_memory_pool().total_bytes()
    moved = {
        f"{name.removeprefix('bytes_')}_mib": (getattr(after, name) - getattr(before, name))
        / repeat
        / MIB
        for name in names
    }
    return {"limit_mib": limit / MIB, **found, **moved, "taken_mib": peak / MIB}


def time_in_unified_memory(make: Make, nbytes: int, settled: int, repeat: int) -> dict[str, float]:
    """Time iterations of stock Chainer in unified memory, with so many bytes of the GPU's left for it."""
    empty_pool()
    free = cupy.cuda.runtime.memGetInfo()[0]
    slack = 256 * MIB  # what cuDNN and CUDA take for themselves
    if free < nbytes + slack:
        raise MemoryError(f"{free >> 20} MiB are free, {nbytes + slack >> 20} needed")
    ballast = cupy.cuda.Memory(free - nbytes - slack)
    pool = cupy.cuda.MemoryPool(cupy.cuda.malloc_managed)
    with cupy.cuda.using_allocator(pool.malloc):
        trainer = make()
        found = timed(trainer.step, cupy.cuda.Device().synchronize, settled, repeat)
    return {
        "limit_mib": nbytes / MIB,
        **found,
        "taken_mib": pool.total_bytes() / MIB,
        "occupied_mib": ballast.size / MIB,
    }
