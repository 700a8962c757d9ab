"""Turn a step without data into the profile that the planner and its simulator read."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable

from chainer_ooc.estimating import devices
from chainer_ooc.estimating.calibration import CpuRates
from chainer_ooc.estimating.ledger import Segment
from chainer_ooc.estimating.step import Recording
from chainer_ooc.planning.profile import Profile

__all__ = ["make_profile", "on_cpu", "on_gpu_seconds", "without_left_over"]

#: Takes a segment of a step without data and returns its time (seconds).
Cost = Callable[[Segment], float]


def on_cpu(rates: CpuRates) -> Cost:
    """Return a function that estimates the time of a segment on this machine."""
    return rates.seconds


def on_gpu_seconds(gpu: devices.Gpu) -> Cost:
    """Return a function that estimates a segment's time on a GPU: the larger of arithmetic and memory traffic."""

    def cost(segment: Segment) -> float:
        if not segment.name:
            touched = segment.work["simple"] + segment.work["copy"] + segment.work["fill"]
            return touched / (gpu.bandwidth * devices.MEMORY_SHARE)
        flops = segment.flops / gpu.flops
        for (m, n, k, itemsize), count in segment.gemms.items():
            peak = gpu.half_flops if itemsize == 2 else gpu.flops / max(1, itemsize // 4)
            flops += count * 2.0 * m * n * k / peak
        moved = segment.in_bytes + segment.out_bytes
        moved *= 1 if segment.phase == "forward" else 2
        return devices.LAUNCH_SECONDS + max(
            flops / devices.COMPUTE_SHARE, moved / (gpu.bandwidth * devices.MEMORY_SHARE)
        )

    return cost


def make_profile(recording: Recording, cost: Cost, name: str, device: str) -> Profile:
    """Return the profile of a step without data, with estimated times.

    Args:
        recording: The recorded step.
        cost: Returns the time of a segment (seconds).
        name: The name of the network.
        device: The device for which the times are.
    """
    begins = recording.begins
    seconds = [0.0] * len(begins)
    for number, segment in enumerate(recording.segments, recording.first_segment):
        # What runs before the first function runs after the last one of the previous iteration.
        step = bisect.bisect_right(begins, number) - 1
        seconds[step] += cost(segment)
    profile = dataclasses.replace(recording.profile, name=name, device=device, modelled=True)
    return profile.at(seconds)


def without_left_over(profile: Profile, recording: Recording) -> Profile:
    """Return the profile as if the previous step's graph were dead.

    Backward has used what that keeps: on demand it leaves first, and no limit need have room for it.
    """
    steps = tuple(
        dataclasses.replace(step, held_bytes=max(0, step.held_bytes - left))
        for step, left in zip(profile.steps, recording.left_over, strict=True)
    )
    return dataclasses.replace(profile, steps=steps)
