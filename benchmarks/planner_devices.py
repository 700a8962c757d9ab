"""Step times of named GPUs from a roofline model: what `planner.py` has in place of a clock.

The graph, the storages and their sizes are recorded ones. A function's time is the larger of its
arithmetic at ``ARITHMETIC`` of the device's peak and its traffic at ``TRAFFIC`` of its memory bandwidth, and a
launch. Backward counts twice the arithmetic and the traffic of forward. Nothing here was measured.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from chainer_ooc.planning.profile import BACKWARD, FORWARD, OTHER, Profile, Rerun, SavedTensor, Step

#: Shares of the peaks that well-tuned kernels reach, and the seconds to start one: assumptions.
ARITHMETIC, TRAFFIC, LAUNCH = 0.6, 0.8, 5e-6
#: CuPy's default limit of cuDNN's workspace (bytes), in place of NumPy's im2col: docs/planner.md was made with it.
WORKSPACE = 8 << 20


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak arithmetic (FLOP/s) of float32 convolutions and memory bandwidth (bytes/s)."""

    name: str
    flops: float
    bandwidth: float
    source: str


#: V100 has no tensor-core path for float32; on A100 and H200 cuDNN's default takes TF32 (dense figures).
DEVICES = {
    "v100": Device(
        "V100 SXM2 (modelled)", 15.7e12, 900e9, "NVIDIA V100 datasheet: 15.7 TFLOPS FP32, 900 GB/s"
    ),
    "a100": Device(
        "A100 SXM 80 GB (modelled)",
        156e12,
        2039e9,
        "NVIDIA A100 datasheet: 156 TFLOPS TF32, 2,039 GB/s",
    ),
    "h200": Device(
        "H200 SXM (modelled)",
        494.5e12,
        4.8e12,
        "NVIDIA H200 datasheet: 989 TFLOPS TF32 with sparsity, half of it dense, 4.8 TB/s",
    ),
}

#: Functions whose re-runs are checked on a CPU, and need a deterministic library on a GPU.
PRODUCTS = ("Convolution", "Deconvolution", "Linear")
_INPUT = re.compile(r"(\w+)\[([\d,]*)\](?:@(\d+))?")


def guarded(profile: Profile, bandwidth: float) -> Profile:
    """Return a profile whose re-runs of products take the time of their fingerprints, too.

    Args:
        profile: The profile.
        bandwidth: The bytes per second of which fingerprints are taken.
    """
    size = [storage.nbytes for storage in profile.storages]
    steps = []
    for step in profile.steps:
        rerun = step.rerun
        if rerun is not None and step.label.startswith(PRODUCTS):
            guard = 2 * sum(size[i] for i in rerun.writes) / bandwidth
            rerun = dataclasses.replace(rerun, seconds=rerun.seconds + guard, guard_seconds=guard)
        steps.append(dataclasses.replace(step, rerun=rerun))
    return dataclasses.replace(profile, steps=tuple(steps))


def _parse(text: str) -> tuple[int, tuple[int, ...], bool]:
    """Return bytes, shape, and whether it is a leaf."""
    dtype, shape, producer = _INPUT.fullmatch(text).groups()
    sizes = tuple(int(n) for n in shape.split(",") if n)
    return np.dtype(dtype).itemsize * math.prod(sizes), sizes, producer is None


def _arithmetic(step: Step, made: int) -> float:
    """Return the FLOPs of a forward step that makes ``made`` bytes."""
    if step.label.startswith(("Convolution", "Linear")):
        _, weights, _ = _parse(step.inputs[1])
        return 2 * made / 4 * math.prod(weights[1:])
    return made / 4 * 4


def _sizes(profile: Profile) -> tuple[list[int], list[int]]:
    """Return the bytes that each step makes, and those of the parameters that it reads."""
    made = [0] * len(profile.steps)
    for storage in profile.storages:
        made[storage.producer] += storage.nbytes
    parameters = [
        sum(
            nbytes
            for nbytes, _, leaf in map(_parse, step.inputs[1:])
            if leaf and step.label.startswith(("Conv", "Linear", "Batch"))
        )
        for step in profile.steps
    ]
    return made, parameters


def traffic(profile: Profile, scale: int = 1) -> list[int]:
    """Return the bytes that each step reads and writes with a batch ``scale`` times as large."""
    made, parameters = _sizes(profile)
    moved = []
    for number, step in enumerate(profile.steps):
        if step.phase == OTHER:
            moved.append(5 * sum(parameters))
            continue
        source = step.function if step.phase == BACKWARD else number
        read = sum(nbytes for nbytes, _, _ in map(_parse, profile.steps[source].inputs))
        activations = read - parameters[source] + made[source]
        twice = 2 if step.phase == BACKWARD else 1
        moved.append(twice * (scale * activations + parameters[source]))
    return moved


def parameter_bytes(profile: Profile) -> list[int]:
    """Return the bytes of the parameters that each step reads."""
    return _sizes(profile)[1]


def modelled(profile: Profile, device: Device, scale: int = 1) -> Profile:
    """Return a profile with the times of a GPU and a batch ``scale`` times as large.

    Parameters and their gradients keep their size, all else grows with the batch.
    """
    made, parameters = _sizes(profile)
    moved = traffic(profile, scale)
    # Gradients of parameters live through forward, are cleared, and come one by one in backward.
    all_gradients = sum(parameters) if scale > 1 else 0
    gradients = 0
    steps = []
    for number, step in enumerate(profile.steps):
        forward = profile.steps[step.function] if step.phase == BACKWARD else step
        source = step.function if step.phase == BACKWARD else number
        heavy = forward.label.startswith(("Convolution", "Linear"))
        twice = {FORWARD: 1, BACKWARD: 2, OTHER: 0}[step.phase]
        flops = twice * scale * _arithmetic(forward, made[source])
        seconds = LAUNCH + max(
            flops / (ARITHMETIC * device.flops), moved[number] / (TRAFFIC * device.bandwidth)
        )
        fixed = all_gradients if step.phase == FORWARD else gradients
        held = fixed + scale * max(0, step.held_bytes - fixed)
        unsaved = sum(s.nbytes for s in profile.storages if s.producer == number and not s.uses)
        workspace = step.workspace_bytes
        if heavy and step.phase == FORWARD:
            workspace = scale * unsaved + WORKSPACE
        elif heavy:
            first, _, leaf = _parse(forward.inputs[0])
            workspace = (0 if leaf else scale * first) + parameters[source] + WORKSPACE
        else:
            workspace = scale * workspace
        if step.phase == BACKWARD and scale > 1:
            gradients += parameters[source]
        rerun = step.rerun
        if rerun is not None:
            own = WORKSPACE if heavy else scale * rerun.workspace_bytes
            rerun = Rerun(seconds, own, rerun.reads, rerun.writes)
        steps.append(
            dataclasses.replace(
                step, seconds=seconds, held_bytes=held, workspace_bytes=workspace, rerun=rerun
            )
        )
    storages = tuple(
        SavedTensor(scale * s.nbytes, s.producer, s.free_from, s.uses, s.label)
        for s in profile.storages
    )
    return Profile(profile.name, device.name, True, profile.fixed_bytes, tuple(steps), storages)
