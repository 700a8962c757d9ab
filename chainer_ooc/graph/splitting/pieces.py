"""Run functions whose temporaries do not fit below the limit in pieces, with the bits of the whole.

On NumPy a convolution makes one matrix of all its patches (im2col), far larger than its input and output.
If that does not fit, stock Chainer's own code runs for a few images at a time and writes into an array with
stock Chainer's layout. The gradient of the weights, which sums over images, runs for a few input channels
at a time; grouped convolutions for a few groups. Other functions of single images with large temporaries
work the same way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from chainer_ooc import state
from chainer_ooc.graph.splitting import gemm
from chainer_ooc.swap.manager import SwapManager

__all__ = ["Arrays", "Work", "patch"]

Arrays = tuple[np.ndarray, ...]

#: NumPy's floating-point errors: the names that handlers get, and those of numpy.errstate.
_KINDS = {
    "divide by zero": "divide",
    "overflow": "over",
    "underflow": "under",
    "invalid value": "invalid",
}


class Work(NamedTuple):
    """The work of a function, in units of which any number can be done at a time.

    Attributes:
        units: The number of units.
        unit_bytes: The temporaries of one unit (bytes).
        out_bytes: The whole results (bytes).
        run: Takes a first unit and the unit after the last; does them and returns their results.
        axis: The axis of the results along which the units lie.
        product: The matrix product in it; ``None`` if no element depends on the number of units.
        order: The axes of the results, the outermost in memory first. Empty: the order of a piece.
        names: The attributes of the function that take the last results. The others are returned.
    """

    units: int
    unit_bytes: int
    out_bytes: int
    run: Callable[[int, int], Arrays]
    axis: int = 0
    product: gemm.Product | None = None
    order: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


def patch(cls: Any, name: str, rule: Callable[..., Work | None]) -> None:
    """Replace a method by one that runs in pieces if the whole does not fit.

    Args:
        cls: A subclass of :class:`chainer.FunctionNode`.
        name: The name of the method. It takes arrays or a tuple of them first and returns a tuple of
            arrays.
        rule: Takes the stock method, the function and the arguments; returns the work, or ``None`` if it
            cannot be split.
    """
    stock = getattr(cls, name)

    @functools.wraps(stock)
    def forward(self: Any, *args: Any) -> Any:
        settings = state.current()
        # Below the low watermark allocations do not ask for room: run the whole.
        watched = state.local.hooked or state.local.growth is not None
        if settings is None or not watched or settings.split == "never":
            return stock(self, *args)
        arrays = args[0] if isinstance(args[0], tuple) else args
        if any(type(one) is not np.ndarray for one in arrays[:2]) or _uses_ideep(self):
            return stock(self, *args)
        work = rule(stock, self, *args)
        manager = state.manager_for(arrays[0])
        steps = [] if work is None else _steps(work, manager, settings.split == "exact")
        if work is None or not steps:
            return stock(self, *args)
        results = _run(work, steps)
        returned = len(results) - len(work.names)
        for name, array in zip(work.names, results[returned:], strict=True):
            setattr(self, name, array)
        return results[:returned]

    setattr(cls, name, forward)


def _uses_ideep(func: Any) -> bool:
    from chainer.backends import intel64

    return getattr(func, "_use_ideep", False) or bool(intel64.should_use_ideep(">=auto"))


def _room(manager: SwapManager, work: Work) -> int | None:
    """Return the bytes left for temporaries after everything movable has moved; ``None`` if all fits."""
    if manager.make_room(work.units * work.unit_bytes + work.out_bytes):
        return None
    return manager.budget.high - manager.budget.used_bytes() - work.out_bytes


def _steps(work: Work, manager: SwapManager | None, exact: bool) -> list[tuple[int, int]]:
    """Return the pieces; an empty list if the whole fits or cannot be split with the same bits."""
    if manager is None or manager.busy or work.units < 2:
        return []
    grain = least = 1
    if exact and work.product is not None:
        grain, least = work.product.grain, work.product.least
    smallest = math.ceil(least / grain) * grain
    if work.units - smallest < least:
        return []  # before making room: stock Chainer may need less than computed here
    room = _room(manager, work)
    if room is None:
        return []
    if exact and work.product is not None and not work.product.can_be_split(work.units):
        return []
    size = max(room // max(work.unit_bytes, 1), 1)
    size = max(size // grain * grain, smallest)
    # The same number of pieces, of about equal size: no small rest.
    even = math.ceil(work.units / math.ceil(work.units / size))
    size = max(math.ceil(even / grain) * grain, smallest)
    starts = list(range(0, work.units, size))
    if len(starts) > 1 and work.units - starts[-1] < least:
        starts.pop()  # the last part is too small: join it to the one before
    return list(zip(starts, [*starts[1:], work.units], strict=True)) if len(starts) > 1 else []


def _run(work: Work, steps: list[tuple[int, int]]) -> Arrays:
    wholes: list[np.ndarray] = []
    told: set[str] = set()
    for start, stop in steps:
        pieces = _run_piece(work, start, stop, told)
        if not wholes:
            wholes = [_whole(piece, work, stop - start) for piece in pieces]
        for whole, piece in zip(wholes, pieces, strict=True):
            each = piece.shape[work.axis] // (stop - start)
            whole[(slice(None),) * work.axis + (slice(start * each, stop * each),)] = piece
        del pieces, piece  # before the next piece is made
    return tuple(wholes)


def _run_piece(work: Work, start: int, stop: int, told: set[str]) -> Arrays:
    """Do some units. Each of NumPy's errors reaches the user once, from the first piece that has it.

    Args:
        work: The work.
        start: The first unit.
        stop: The unit after the last.
        told: The errors that the user has got already. Updated.
    """
    found: set[str] = set()
    heard: Any = {kind: "call" for kind, how in np.geterr().items() if how != "ignore"}
    with np.errstate(call=lambda kind, flag: found.add(kind), **heard):
        pieces = work.run(start, stop)
    if found - told:
        del pieces
        with np.errstate(**{_KINDS[kind]: "ignore" for kind in told}):  # type: ignore[arg-type]
            pieces = work.run(start, stop)
        told |= found
    return pieces


def _whole(piece: np.ndarray, work: Work, units: int) -> np.ndarray:
    """Return an empty array for all units, in the memory order of ``piece``; a crop if ``piece`` is one."""

    def enlarged(shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            size // units * work.units if axis == work.axis else size
            for axis, size in enumerate(shape)
        )

    shape = enlarged(piece.shape)
    if work.order:
        memory = np.empty([shape[axis] for axis in work.order], piece.dtype)
        return memory.transpose(np.argsort(work.order))
    owner = piece.base
    if (
        owner is None
        or owner.ndim != piece.ndim
        or owner.shape == piece.shape
        or not owner.flags.c_contiguous
    ):
        if work.axis:
            return np.empty(shape, piece.dtype)
        # An image is dense, and the next one follows; a piece of one image may have any stride there.
        flat = np.empty(math.prod(shape), piece.dtype)
        strides = (flat.nbytes // shape[0], *piece.strides[1:])
        return np.ndarray(shape, piece.dtype, flat, 0, strides)
    # col2im cuts the padding off: its result lies in a larger array.
    offset = piece.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    starts = np.unravel_index(offset // piece.itemsize, owner.shape)
    crop = zip(starts, shape, strict=True)
    whole = np.empty(enlarged(owner.shape), piece.dtype)
    return whole[tuple(slice(int(start), int(start) + size) for start, size in crop)]
