"""Turn a step without data into the profile that the planner and its simulator read."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable

from chainer_ooc.estimating import devices, on_gpu
from chainer_ooc.estimating.calibration import CpuRates
from chainer_ooc.estimating.ledger import Segment
from chainer_ooc.estimating.step import BETWEEN, Node, Recording
from chainer_ooc.planning.profile import OTHER, Profile, SavedTensor, Step, describe_input

__all__ = ["make_profile", "on_cpu", "on_gpu_seconds"]

Cost = Callable[[Segment, Node | None], float]


def on_cpu(rates: CpuRates) -> Cost:
    """Return a function that estimates the time of a segment on this machine."""
    return lambda segment, node: rates.seconds(segment)


def on_gpu_seconds(gpu: devices.Gpu) -> Cost:
    """Return a function that estimates a segment's time on a GPU: the larger of arithmetic and memory traffic."""

    def cost(segment: Segment, node: Node | None) -> float:
        if node is None:
            touched = segment.work["simple"] + segment.work["copy"] + segment.work["fill"]
            return touched / (gpu.bandwidth * devices.MEMORY_SHARE)
        flops = segment.flops / gpu.flops
        for (m, n, k, itemsize), count in segment.gemms.items():
            peak = gpu.half_flops if itemsize == 2 else gpu.flops / max(1, itemsize // 4)
            flops += count * 2.0 * m * n * k / peak
        moved = node.in_bytes + node.out_bytes
        moved *= 1 if segment.phase == "forward" else 2
        return devices.LAUNCH_SECONDS + max(
            flops / devices.COMPUTE_SHARE, moved / (gpu.bandwidth * devices.MEMORY_SHARE)
        )

    return cost


@dataclasses.dataclass
class _Draft:
    label: str
    phase: str
    begin: int
    start_bytes: int
    peak_bytes: int
    seconds: float = 0.0
    node: Node | None = None


def make_profile(
    recording: Recording,
    cost: Cost,
    *,
    name: str,
    device: str,
    gpu: bool,
    process_bytes: int = 0,
    smallest: int = 64 << 10,
) -> Profile:
    """Return the profile of a step without data.

    Args:
        recording: The recorded step.
        cost: Returns the time of a segment (seconds).
        name: The name of the network.
        device: The device for which the times are.
        gpu: The temporaries are those of a GPU, not of NumPy.
        process_bytes: The memory of the process itself (bytes).
        smallest: Smaller allocations (bytes) never move.
    """
    segments = recording.segments
    offset = len(recording.ledger.segments) - len(segments)
    node_of = {node.segment: node for node in recording.nodes}
    for node in recording.nodes:
        node_of.update(dict.fromkeys(node.backwards, node))
    drafts, step_of = _drafts(recording, cost, node_of, offset)
    begins = [draft.begin for draft in drafts]

    made, dead = _lifetimes(recording, begins)
    survivors = [0] * len(drafts)
    for number, producer in made.items():
        if dead.get(number, len(drafts)) > producer:
            survivors[producer] += recording.sizes[number]

    count = len(drafts)
    uses: dict[int, set[int]] = {}
    last_read: dict[int, int] = {}
    for node in recording.nodes:
        forward = step_of[node.segment]
        for _, _, number in node.inputs:
            last_read[number] = max(last_read.get(number, -1), forward)
        for number in node.saved:
            if number in made and recording.sizes[number] >= smallest:
                later = {step_of[s] for s in node.backwards if step_of[s] > made[number]}
                uses.setdefault(number, set()).update(later)
    saved = sorted((number for number, steps in uses.items() if steps), key=lambda n: (made[n], n))
    storages = []
    for number in saved:
        producer = made[number]
        free = count if number in recording.held else max(producer, last_read.get(number, -1)) + 1
        label = drafts[producer].label
        storages.append(
            SavedTensor(
                recording.sizes[number],
                producer,
                min(free, count),
                tuple(sorted(uses[number])),
                label,
            )
        )

    steps = []
    saved_alive = _alive(storages, saved, dead, count)
    left_over = _left_over(recording, begins)
    made_bytes = [0] * count
    for storage in storages:
        made_bytes[storage.producer] += storage.nbytes
    forward_step = {id(node): step_of[node.segment] for node in recording.nodes}
    for number, draft in enumerate(drafts):
        held = max(
            0, draft.start_bytes - recording.fixed_bytes - saved_alive[number] - left_over[number]
        )
        own = draft.peak_bytes - draft.start_bytes
        if gpu:
            own = survivors[number]
            if draft.node is not None and on_gpu.takes_workspace(draft.label):
                own += on_gpu.WORKSPACE
        workspace = max(0, own - made_bytes[number])
        runs = draft.node
        inputs: tuple[str, ...] = ()
        function = -1
        if runs is not None and draft.phase == "forward":
            inputs = tuple(
                describe_input(dtype, shape, made.get(number, -1))
                for dtype, shape, number in runs.inputs
            )
        elif runs is not None and draft.phase == "backward":
            function = forward_step[id(runs)]
        phase = OTHER if draft.phase == BETWEEN else draft.phase
        steps.append(Step(draft.label, phase, draft.seconds, workspace, held, inputs, function))
    return Profile(
        name, device, True, recording.fixed_bytes + process_bytes, tuple(steps), tuple(storages)
    )


def _drafts(
    recording: Recording, cost: Cost, node_of: dict[int, Node], offset: int
) -> tuple[list[_Draft], dict[int, int]]:
    """Merge the time between two functions into the first of them. The time after backward is the update."""
    drafts: list[_Draft] = []
    step_of: dict[int, int] = {}
    last = len(recording.segments) - 1
    for index, segment in enumerate(recording.segments):
        node = node_of.get(index + offset) if segment.name else None
        seconds = cost(segment, node)
        if segment.phase == BETWEEN and drafts and index != last:
            draft = drafts[-1]
            draft.peak_bytes = max(draft.peak_bytes, segment.peak_bytes)
            draft.seconds += seconds
        else:
            label = segment.name or ("update" if index == last else "start")
            drafts.append(
                _Draft(
                    label,
                    segment.phase,
                    segment.begin,
                    segment.start_bytes,
                    segment.peak_bytes,
                    seconds,
                    node,
                )
            )
        step_of[index + offset] = len(drafts) - 1
    return drafts, step_of


def _lifetimes(recording: Recording, begins: list[int]) -> tuple[dict[int, int], dict[int, int]]:
    """Return for each allocation of the recorded step the step that made it, and the step in which it died."""
    made: dict[int, int] = {}
    dead: dict[int, int] = {}
    events = recording.ledger.events
    for event in range(recording.first_event, len(events)):
        number, nbytes = events[event]
        step = max(bisect.bisect_right(begins, event) - 1, 0)
        if nbytes > 0:
            made[number] = step
        elif number in made:
            dead[number] = step
    return made, dead


def _alive(
    storages: list[SavedTensor], saved: list[int], dead: dict[int, int], count: int
) -> list[int]:
    """Return the bytes of saved storages that are allocated when each step begins."""
    change = [0] * (count + 2)
    for storage, number in zip(storages, saved, strict=True):
        change[storage.producer + 1] += storage.nbytes
        change[dead.get(number, count) + 1] -= storage.nbytes
    alive, total = [], 0
    for step in range(count):
        total += change[step]
        alive.append(total)
    return alive


def _left_over(recording: Recording, begins: list[int]) -> list[int]:
    """Return the bytes that the previous step's graph still keeps when each step begins.

    Backward has used them: out of core they leave first.
    """
    first = recording.first_event
    events = recording.ledger.events
    dead = {number for number, nbytes in events[:first] if nbytes < 0}
    total = sum(recording.sizes[n] for n in recording.before - dead if n in recording.sizes)
    change = [0] * (len(begins) + 1)
    for event in range(first, len(events)):
        number, nbytes = events[event]
        if nbytes < 0 and number in recording.before:
            change[bisect.bisect_right(begins, event)] += nbytes
    left = []
    for step in range(len(begins)):
        total += change[step]
        left.append(total)
    return left
