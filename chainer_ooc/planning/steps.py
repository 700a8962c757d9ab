"""What a profile consists of: steps, storages, and how a step is run again."""

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
    """How a forward step is run again in backward, bit for bit.

    Attributes:
        seconds: How long that takes.
        workspace_bytes: What it takes for itself meanwhile, without what it reads and writes.
        reads: The storages that it needs (indexes), saved ones or such that another re-run makes.
        writes: The storages that it makes again (indexes).
    """

    seconds: float
    workspace_bytes: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One function's forward or backward, or what runs between and after them (the optimizer).

    While a step runs, memory holds ``Profile.fixed_bytes``, the saved storages that are resident,
    ``held_bytes`` and, at the worst moment, ``workspace_bytes``.

    Attributes:
        label: The function's name.
        phase: ``"forward"``, ``"backward"`` or ``"other"``.
        seconds: The time from its start to the next step's start with everything in memory.
        workspace_bytes: The most that it takes for itself while it runs (im2col, cuDNN's workspace).
        held_bytes: Arrays besides the saved storages that live while it runs: gradients, outputs that
            nobody saved, gradients of parameters as far as there are any yet.
        inputs: Its inputs as :func:`describe_input` gives them; empty for backward.
        function: For backward the index of the forward step of the same function, else -1.
        rerun: How it can be run again, ``None`` if it must not be; forward only.
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
        """What tells this step from others: phase, label and inputs."""
        return key_of(self.phase, self.label, self.inputs)


def key_of(phase: str, label: str, inputs: Iterable[str]) -> str:
    """Return what tells a step from others."""
    return f"{phase} {label}({', '.join(inputs)})"


@dataclasses.dataclass(frozen=True, slots=True)
class SavedTensor:
    """One allocation made in forward. It is saved if backward uses it.

    Attributes:
        nbytes: Its size (bytes).
        producer: The step that makes it (index).
        free_from: From the start of this step on nothing but the graph refers to it, so that it can leave.
        uses: The backward steps that need it (indexes, ascending). Empty if nobody saved it: then it is
            here because re-runs pass through it, and its bytes count in the steps' ``held_bytes``.
        label: The function that made it.
    """

    nbytes: int
    producer: int
    free_from: int
    uses: tuple[int, ...]
    label: str = ""


def describe_input(dtype: Any, shape: Sequence[int], producer: int = -1) -> str:
    """Describe one input of a function: its dtype, its shape and which step made it.

    Args:
        dtype: Its dtype.
        shape: Its shape.
        producer: The step (index), -1 for a leaf.
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
    rerun = step.rerun and dataclasses.astuple(step.rerun)
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
    """Return what :func:`row_of` made a list of."""
    label, phase, seconds, workspace, held, inputs, function, rerun = row
    if rerun is not None:
        again, own, reads, writes = rerun
        rerun = Rerun(again, own, tuple(reads), tuple(writes))
    return Step(label, phase, seconds, workspace, held, tuple(inputs), function, rerun)
