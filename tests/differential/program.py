"""Random programs, as Python source: one of a seed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from tests.differential import steps

__all__ = ["Program", "make_program"]

KIB, MIB = 1 << 10, 1 << 20


@dataclasses.dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
        seed: What it was made of.
        steps: Pieces of source, run one after the other; what one raises is noted, and the next is run.
        settings: Those of out-of-core mode; ``None``: the program itself turns it on.
        constants: Sizes from which NumPy's allocations are announced and pooled (bytes).
        keeps: All that the program has made is left to the interpreter's end, instead of being looked for.
        last: Run as a script's end: what it raises ends the process.
        edits: It writes to arrays that may be saved, of which ``verify`` tells.
    """

    seed: int
    steps: list[str]
    settings: dict[str, Any] | None
    constants: dict[str, int]
    keeps: bool
    last: str
    edits: bool = False

    def __str__(self) -> str:
        lines = [f"# settings={self.settings}, constants={self.constants}, keeps={self.keeps}"]
        for number, step in enumerate(self.steps):
            lines += [f"# {number}", step]
        return "\n".join([*lines, "# last", self.last] if self.last else lines)


def make_program(seed: int) -> Program:
    """Return the program of a seed."""
    rng = random.Random(seed)
    names = steps.Names(rng)
    made = [steps.leaf(names), steps.leaf(names), steps.unary(names)]
    kinds, weights = zip(*steps.KINDS, strict=True)
    chosen = rng.choices(kinds, weights, k=rng.randint(6, 16))
    for kind in chosen:
        made.append(kind(names))
    made.append(steps.ending(names))
    how = settings(rng), constants(rng), rng.random() < 0.3, rng.choice(steps.LAST)
    return Program(seed, made, *how, steps.edit in chosen)


def settings(rng: random.Random) -> dict[str, Any] | None:
    """Return settings of out-of-core mode."""
    chosen: dict[str, Any] = rng.choices(
        [{"limit": "1MiB"}, {"above": rng.choice([1, 4, 16]) * MIB}, {"swap_all": True}, {}],
        [6, 3, 2, 1],
    )[0]
    more: list[tuple[float, Callable[[], dict[str, Any]]]] = [
        (0.7, lambda: {"min_bytes": rng.choice([1, 1000, 20000])}),
        (0.3, lambda: {"plan": False}),
        (0.25, lambda: {"discard_all": True}),
        (0.15, lambda: {"split": "exact"}),
    ]
    for chance, setting in more:
        if rng.random() < chance:
            chosen |= setting()
    aside = random.Random()
    aside.setstate(rng.getstate())  # what is drawn after it stays the same
    if aside.random() < 0.5:
        chosen |= {"swap_parameters": True, "parameters": "auto"}
    return None if rng.random() < 0.05 else chosen


def constants(rng: random.Random) -> dict[str, int]:
    """Return the sizes from which allocations are announced and pooled."""
    announced = rng.choice([1, 4 * KIB, 64 * KIB, MIB])
    return {"announced": announced, "pooled": rng.choice([1, 4 * KIB, 64 * KIB])}
