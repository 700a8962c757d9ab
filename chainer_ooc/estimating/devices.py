"""The devices that users can name, with the figures of their makers' data sheets."""

from __future__ import annotations

import dataclasses
import difflib

from chainer_ooc.estimating.errors import EstimateError

__all__ = ["DEVICES", "Gpu", "find"]

#: The share of its peak that a GPU reaches in convolutions and large products, in memory-bound functions
#: and on its link, unless it is measured.
COMPUTE_SHARE, MEMORY_SHARE, LINK_SHARE = 0.6, 0.8, 0.85
#: Launching the kernels of one function, forward or backward, from Python (seconds).
LAUNCH_SECONDS = 60e-6


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: The name that users give.
        memory_bytes: The memory that a program can have: 2 % less than the GPU is sold with.
        flops: Peak floating-point operations per second, float32 without tensor cores.
        half_flops: The same, float16 with tensor cores, dense.
        bandwidth: Peak bytes per second of its memory.
        link: Peak bytes per second to host memory, each direction.
        link_name: The name of the link.
        source: The source of the figures.
    """

    name: str
    memory_bytes: int
    flops: float
    half_flops: float
    bandwidth: float
    link: float
    link_name: str
    source: str


def _gpu(name: str, gb: int, tflops: float, half: float, gbs: float, link: str, source: str) -> Gpu:
    rate = {"PCIe 3": 16e9, "PCIe 4": 32e9, "PCIe 5": 64e9, "NVLink-C2C": 450e9}[link]
    usable = int(0.98 * (gb << 30))
    return Gpu(name, usable, tflops * 1e12, half * 1e12, gbs * 1e9, rate, link, source)


DEVICES = {
    gpu.name: gpu
    for gpu in (
        # name, memory, float32 and float16 TFLOP/s, memory GB/s, link, source
        _gpu("p100", 16, 10.6, 21.2, 732, "PCIe 3", "NVIDIA Tesla P100 (SXM2) data sheet"),
        _gpu("v100", 16, 15.7, 125, 900, "PCIe 3", "NVIDIA V100 (SXM2) data sheet"),
        _gpu("v100-32gb", 32, 15.7, 125, 900, "PCIe 3", "NVIDIA V100 (SXM2) data sheet"),
        _gpu("t4", 16, 8.1, 65, 320, "PCIe 3", "NVIDIA T4 data sheet"),
        _gpu("rtx3090", 24, 35.6, 142, 936, "PCIe 4", "NVIDIA Ampere GA102 white paper"),
        _gpu("rtx4090", 24, 82.6, 330, 1008, "PCIe 4", "NVIDIA Ada Lovelace white paper"),
        _gpu("a10", 24, 31.2, 125, 600, "PCIe 4", "NVIDIA A10 data sheet"),
        _gpu("a100", 40, 19.5, 312, 1555, "PCIe 4", "NVIDIA A100 (SXM4) data sheet"),
        _gpu("a100-80gb", 80, 19.5, 312, 2039, "PCIe 4", "NVIDIA A100 (SXM4) data sheet"),
        _gpu("l4", 24, 30.3, 121, 300, "PCIe 4", "NVIDIA L4 data sheet"),
        _gpu("l40s", 48, 91.6, 362, 864, "PCIe 4", "NVIDIA L40S data sheet"),
        _gpu("h100", 80, 67, 989, 3350, "PCIe 5", "NVIDIA H100 (SXM5) data sheet"),
        _gpu("h200", 141, 67, 989, 4800, "PCIe 5", "NVIDIA H200 (SXM) data sheet"),
        _gpu("gh200", 96, 67, 990, 4000, "NVLink-C2C", "NVIDIA GH200 data sheet"),
    )
}


def find(name: str) -> Gpu | None:
    """Return a GPU by its name; ``None`` for ``"cpu"``.

    Raises:
        EstimateError: If there is no such device.
    """
    key = (
        name.strip().lower().replace("nvidia-", "").replace("_", "-")
        if isinstance(name, str)
        else ""
    )
    if key == "cpu":
        return None
    if key in DEVICES:
        return DEVICES[key]
    near = difflib.get_close_matches(key, ["cpu", *DEVICES], 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise EstimateError(
        f"device={name!r} is not known{hint}; choose one of cpu, {', '.join(DEVICES)}"
    )
