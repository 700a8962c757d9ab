"""The parts of a profile: steps, saved tensors, and how a step is run again."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "BACKWARD",
    "FORWARD",
    "OTHER",
    "PHASES",
    "Rerun",
    "SavedTensor",
    "Step",
    "describe_input",
    "key_of",
    "row_of",
    "signature_of",
    "step_of",
]

FORWARD, BACKWARD, OTHER = "forward", "backward", "other"
PHASES = (FORWARD, BACKWARD, OTHER)


@dataclasses.dataclass(frozen=True, slots=True)
class Rerun:
    """The bit-for-bit re-run of a forward step in backward.

    Attributes:
        seconds: The time of the re-run, fingerprints included.
        workspace_bytes: The most bytes it takes besides the storages that it reads and writes.
        reads: The storages that it reads (indexes): saved ones, or ones that other re-runs make.
        writes: The storages that it makes again (indexes).
        steps: The forward steps that run, in order, if not this step alone.
        open_reads: Those of ``reads`` to which code may write unnoticed as long as it refers to them.
        guard_seconds: The time of the fingerprints that tell whether anything was written to meanwhile.
    """

    seconds: float
    workspace_bytes: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    steps: tuple[int, ...] = ()
    guard_seconds: float = 0.0
    open_reads: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One function's forward or backward, or the time between and after them (the optimizer).

    While a step runs, memory holds ``Profile.fixed_bytes``, the resident saved storages, ``held_bytes``
    and, at the worst moment, ``workspace_bytes``.

    Attributes:
        label: The name of the function.
        phase: ``"forward"``, ``"backward"`` or ``"other"``.
        seconds: The time from its start to the next step's start, with everything in memory.
        workspace_bytes: The most bytes it takes for itself while it runs (im2col, cuDNN's workspace).
        held_bytes: Other arrays that are alive while it runs: gradients, unsaved outputs, those gradients
            of parameters that exist already.
        inputs: Descriptions of its inputs by :func:`describe_input`; empty for backward.
        function: For backward the index of the function's forward step, else -1.
        rerun: Its re-run, ``None`` if it cannot be run again. Forward only.
    """

    label: str
    phase: str
    seconds: float
    workspace_bytes: int = 0
    held_bytes: int = 0
    inputs: tuple[str, ...] = ()
    function: int = -1
    rerun: Rerun | None = None

    @property
    def key(self) -> str:
        """The identity of this step: phase, label and inputs."""
        return key_of(self.phase, self.label, self.inputs)


def key_of(phase: str, label: str, inputs: Iterable[str]) -> str:
    """Return the identity of a step."""
    return f"{phase} {label}({', '.join(inputs)})"


@dataclasses.dataclass(frozen=True, slots=True)
class SavedTensor:
    """One allocation made in forward. It is saved if backward uses it.

    Attributes:
        nbytes: The size (bytes).
        producer: The index of the step that makes it.
        free_from: From the start of this step on only the graph refers to it, so that it can leave.
        uses: The backward steps that need it (indexes, ascending). Empty for a storage that is not saved
            but that re-runs make on the way; its bytes are part of the steps' ``held_bytes``.
        label: The name of the function that made it.
    """

    nbytes: int
    producer: int
    free_from: int
    uses: tuple[int, ...]
    label: str = ""


def describe_input(dtype: Any, shape: Sequence[int], producer: int = -1) -> str:
    """Return the description of a function's input: its dtype, its shape and the step that made it.

    Args:
        dtype: Its dtype.
        shape: Its shape.
        producer: The index of the step that made it, -1 for a leaf.
    """
    text = f"{_name_of(dtype)}[{','.join(map(str, shape))}]"
    return text if producer < 0 else f"{text}@{producer}"


@functools.lru_cache(64)
def _name_of(dtype: Any) -> str:
    return str(dtype)  # NumPy takes microseconds for that


def signature_of(keys: Iterable[str]) -> str:
    """Return the signature (hexadecimal) of a graph from the keys of its forward steps, in order."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key.encode() + b"\n")
    return digest.hexdigest()[:16]


def row_of(step: Step) -> list[Any]:
    """Return a step as a list for JSON."""
    rerun = step.rerun and [*dataclasses.astuple(step.rerun)]
    while rerun and len(rerun) > 4 and not rerun[-1]:  # as if it were not given
        rerun.pop()
    return [
        step.label,
        step.phase,
        step.seconds,
        step.workspace_bytes,
        step.held_bytes,
        step.inputs,
        step.function,
        rerun,
    ]


def step_of(row: list[Any]) -> Step:
    """Return the step that :func:`row_of` turned into a list."""
    label, phase, seconds, workspace, held, inputs, function, rerun = row
    if rerun is not None:
        parts: list[Any] = [tuple(part) if isinstance(part, list) else part for part in rerun]
        rerun = Rerun(*parts)
    return Step(label, phase, seconds, workspace, held, tuple(inputs), function, rerun)
