"""The result of an estimate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from chainer_ooc.tables import Shown, Table, format_bytes

__all__ = ["Estimate"]


@dataclasses.dataclass(frozen=True)
class Estimate(Shown):
    """The estimated memory, traffic and time of training a model. Its text is a summary.

    Bytes are of one process and one device. On the CPU they are resident memory, as ``limit`` bounds it, with
    the process itself (``process_bytes``); on a GPU they are bytes of CuPy's memory pool.

    Attributes:
        name: The name of the network.
        device: The device of the estimate.
        batchsize: The batch size, ``None`` if the inputs share none.
        insize: The height and width of images, ``None`` without images.
        limit_bytes: The limit (bytes).
        peak_in_core_bytes: The peak of stock Chainer, with everything in memory (bytes).
        peak_bytes: The peak under the limit (bytes).
        floor_bytes: The least limit that suffices (bytes).
        floor_function: The function that needs the most at one time.
        process_bytes: The part of the peaks that the process takes besides arrays (bytes).
        parameter_bytes: The size of the parameters (bytes).
        state_bytes: The size of the optimizer's state (bytes).
        saved_bytes: The size of the arrays that functions keep for backward and that can leave memory
            (bytes).
        bytes_out: The bytes moved out of memory per step.
        bytes_in: The bytes moved back per step.
        swap_bytes: The most space that copies take at one time (bytes).
        in_core_step_seconds: The time of a step with everything in memory (seconds).
        step_seconds: The time of a step under the limit (seconds).
        planned_step_seconds: The time of a step by the plan that the engine would make (seconds).
        planned_bytes_out: The bytes moved out of memory per step by that plan.
        planned_bytes_in: The bytes moved back per step by that plan.
        planned_bytes_again: The size of what functions that run again make per step by that plan (bytes).
        bound_step_seconds: The lower bound of the step time for any schedule of copies (seconds).
        stall_out_seconds: The part of ``step_seconds`` spent waiting for copies out (seconds).
        stall_in_seconds: The part spent waiting for copies back (seconds).
        flops: The floating-point operations of one step's matrix products and convolutions.
        bottleneck: The part that would have to be faster.
        largest: The largest batchsize and insize that fit ``in_core`` and ``out_of_core``; ``None`` if not
            searched, or if nothing fits.
        functions: The most expensive functions: (name, calls, seconds, saved bytes, most bytes for itself).
        assumed: The assumptions.
    """

    name: str
    device: str
    batchsize: int | None
    insize: int | None
    limit_bytes: int
    peak_in_core_bytes: int
    peak_bytes: int
    floor_bytes: int
    floor_function: str
    process_bytes: int
    parameter_bytes: int
    state_bytes: int
    saved_bytes: int
    bytes_out: int
    bytes_in: int
    swap_bytes: int
    in_core_step_seconds: float
    step_seconds: float
    planned_step_seconds: float
    planned_bytes_out: int
    planned_bytes_in: int
    planned_bytes_again: int
    bound_step_seconds: float
    stall_out_seconds: float
    stall_in_seconds: float
    flops: float
    bottleneck: str
    largest: dict[str, dict[str, int | None]]
    functions: tuple[tuple[str, int, float, int, int], ...]
    assumed: tuple[str, ...]

    @property
    def fits_in_core(self) -> bool:
        """Whether the step fits without moving anything."""
        return self.peak_in_core_bytes <= self.limit_bytes

    def to_json(self) -> str:
        """Return the estimate as JSON."""
        data: dict[str, Any] = dataclasses.asdict(self)
        data["fits_in_core"] = self.fits_in_core
        return json.dumps(data, indent=1)

    def _blocks(self) -> Iterator[str | Table]:
        moved = (
            f"{format_bytes(self.bytes_out)} out and {format_bytes(self.bytes_in)} back per step"
        )
        by_plan = (
            f"{format_bytes(self.planned_bytes_out)} out, {format_bytes(self.planned_bytes_in)} back, "
            f"{format_bytes(self.planned_bytes_again)} run again"
        )
        if self.fits_in_core:
            moved = by_plan = "nothing: it fits in core"
        images_per_second = (
            f", {self.batchsize / self.step_seconds:.3g} items/s" if self.batchsize else ""
        )
        what = [self.name]
        if self.insize:
            what.append(f"insize {self.insize}")
        if self.batchsize:
            what.append(f"batchsize {self.batchsize}")
        rows = [
            ("estimate of", f"{', '.join(what)} on {self.device}, limit {format_bytes(self.limit_bytes)}"),
            ("peak in core", format_bytes(self.peak_in_core_bytes)),
            ("peak out of core", f"{format_bytes(self.peak_bytes)}; it takes {format_bytes(self.floor_bytes)} "
             f"at the least ({self.floor_function})"),
            ("of that", f"{format_bytes(self.parameter_bytes)} parameters, {format_bytes(self.state_bytes)} "
             f"optimizer state, {format_bytes(self.process_bytes)} the process"),
            ("saved for backward", format_bytes(self.saved_bytes)),
            ("moves", moved),
            ("room outside", format_bytes(self.swap_bytes)),
            ("step", f"{self.step_seconds:.3g} s{images_per_second}; in core {self.in_core_step_seconds:.3g} s "
             f"({self.flops / 1e12:.3g} TFLOP)"),
            ("by a plan", f"{self.planned_step_seconds:.3g} s; {by_plan}; no schedule is below "
             f"{self.bound_step_seconds:.3g} s"),
            ("bottleneck", self.bottleneck),
        ]  # fmt: skip
        for what_largest, found in self.largest.items():
            known = [
                f"{found[key] if found[key] is not None else 'none'} {label}"
                for key, label in (("in_core", "in core"), ("out_of_core", "out of core"))
                if key in found
            ]
            rows.append((f"largest {what_largest}", ", ".join(known)))
        yield Table(rows, "<<")
        functions = [
            (f"{seconds * 1e3:.3g}", format_bytes(saved), format_bytes(own), str(calls), name)
            for name, calls, seconds, saved, own in self.functions
        ]
        yield Table(functions, ">>>><", ("ms", "saved", "for itself", "calls", "function"))
        yield Table([(f"- {text}",) for text in self.assumed], "<", ("assumed:",))
