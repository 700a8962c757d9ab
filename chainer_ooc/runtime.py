"""Turn out-of-core mode on and off: for the process, for a thread, in a forked child."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from chainer_ooc import state, wording
from chainer_ooc.compat import run
from chainer_ooc.graph import hooks, parameters
from chainer_ooc.settings import Settings
from chainer_ooc.swap.devices.protocol import Device
from chainer_ooc.swap.devices.ram import RamDevice, native
from chainer_ooc.swap.manager import SwapManager
from chainer_ooc.swap.system import forks

if TYPE_CHECKING:
    from chainer_ooc.report.trace import Trace

__all__ = ["disable", "enable", "is_enabled", "make_manager", "out_of_core_mode"]

_traces: dict[str, Trace] = {}
_has_warned = False  # of a missing C extension


def is_enabled() -> bool:
    """Return whether out-of-core mode is on in the calling thread."""
    return state.current() is not None


def enable(**given: Any) -> None:
    """Turn out-of-core mode on in all threads. See :func:`chainer_ooc.enable`."""
    settings = Settings.resolve(given)
    _prepare(settings)
    state.process.enabled = settings
    state.process.inherit = None
    os.environ[run.PARENT] = str(os.getpid())
    state.void_levels()
    _write_traces()


def disable() -> None:
    """Turn out-of-core mode off in all threads. Saved arrays are restored when they are read, as before."""
    state.process.enabled = None
    state.process.inherit = None
    if os.environ.get(run.PARENT) == str(os.getpid()):
        del os.environ[run.PARENT]
    state.void_levels()
    state.unhook_allocations()
    state.keep_no_free_memory()  # not even for other threads
    if state.process.gpus is not None:
        state.process.gpus.disable()
    _tell_shortages()
    _write_traces()
    _check_remade()


@contextlib.contextmanager
def out_of_core_mode(on: bool, given: dict[str, Any]) -> Iterator[None]:
    """Turn out-of-core mode on, or off, in the calling thread, for the length of a ``with``."""
    entry: Any = state.OFF
    if on:
        entry = Settings.resolve(given, state.current())
        _prepare(entry)
    state.local.stack.append(entry)
    state.void_levels()
    try:
        yield
    finally:
        _leave(entry)
        state.void_levels()
        settings = state.current()
        if settings is None:
            state.unhook_allocations()
        if (gpus := state.process.gpus) is not None:
            if settings is not None:
                gpus.enable(settings)
            elif state.process.enabled is None:
                gpus.disable()
        if settings is None and all(m.is_between_graphs() for m in state.managers()):
            _tell_shortages()
        _write_traces()
    _check_remade()


def _leave(entry: Any) -> None:
    """Remove the last such entry. Generators leave in any order, and a forked child has no entry."""
    stack = state.local.stack
    for index in reversed(range(len(stack))):
        if stack[index] is entry:
            del stack[index]
            return


def _prepare(settings: Settings) -> None:
    """Patch Chainer, make the managers and check the settings against the machine."""
    hooks.install()
    parameters.install()
    state.process.describe = hooks.describe
    _warn_without_extension()
    with state.process.lock:
        state.process.last = settings
        manager = state.manager_of_ram() or _make_ram_manager(settings)
        manager.device.move_to(settings.directory)
        state.local.stack.append(settings)
        try:
            manager.limit  # noqa: B018  # limit=None means the memory that is free now, so compute it now
            if state.process.announced is not None:
                state.announce()
            _prepare_gpus(settings)
        finally:
            state.local.stack.pop()
        if settings.trace is not None and settings.trace not in _traces:
            _begin_trace(settings.trace)


def _warn_without_extension() -> None:
    """Warn once per process if the package was built without its C extension."""
    global _has_warned
    if native.allocator is None and not _has_warned:
        _has_warned = True
        message = (
            f"chainer_ooc has no C extension here: {native.WITHOUT_IT}; {native.HOW_TO_GET_IT}"
        )
        wording.warn_user(message)


def _make_ram_manager(settings: Settings) -> SwapManager:
    manager = state.process.managers["ram"] = make_manager(RamDevice(settings.directory))
    return manager


def make_manager(device: Device) -> SwapManager:
    """Return a new manager for a device, connected with the settings and the graph."""
    return SwapManager(
        device,
        state.current_or_last,
        hooks.save_pending,
        hooks.is_read_only,
        state.observers,
        parameters.collect,
    )


def _prepare_gpus(settings: Settings) -> None:
    cupy = sys.modules.get("cupy")  # Chainer imports CuPy if it is installed
    if state.process.gpus is None and cupy is not None and cupy.cuda.is_available():
        from chainer_ooc.swap.gpus import Gpus

        state.process.gpus = Gpus(
            cupy,
            make_manager,
            state.current,
            lambda: hooks.describe(state.local.running),
            state.note_used,
        )
    if state.process.gpus is not None:
        state.process.gpus.enable(settings)


def _begin_trace(path: str) -> None:
    from chainer_ooc.report.plans import plans
    from chainer_ooc.report.trace import Trace
    from chainer_ooc.statistics import stats

    def facts() -> dict[str, Any]:
        planned = [dataclasses.asdict(one) for one in plans()]
        now = stats()
        figures = {"stats": dataclasses.asdict(now), "plan": planned[0] if planned else None}
        return {"settings": dataclasses.asdict(state.process.last), **figures, "advice": now.advice}

    _traces[path] = Trace(path, facts)
    state.observers.append(_traces[path])


def _write_traces() -> None:
    """Write the traces that no active mode wants any more."""
    modes = (state.process.enabled, *state.local.stack)
    wanted = {mode.trace for mode in modes if isinstance(mode, Settings)}
    for path in _traces.keys() - wanted:
        trace = _traces.pop(path)
        state.observers.remove(trace)
        trace.close()


@atexit.register
def _tell_shortages() -> None:
    """Warn of shortages of which there was no warning yet."""
    for manager in state.managers():
        manager.shortages.tell()


@atexit.register
def _check_remade() -> None:
    """Raise an error if the last arrays that were computed again turn out to have other bits."""
    for manager in state.managers():
        manager.check_remade()


@atexit.register
def _write_last_traces() -> None:
    while _traces:
        _traces.popitem()[1].close()


def _after_fork() -> None:
    """Turn out-of-core mode off in a forked child, without touching the parent's file."""
    if state.local.hooked:
        native.allocator.uninstall()
    for manager in state.managers():
        manager.after_fork()
    was_on = state.process.enabled is not None or any(
        isinstance(mode, Settings) for mode in state.local.stack
    )
    inherit = _inherit if was_on or state.process.inherit else None
    state.process.__init__(last=state.process.last, inherit=inherit)  # type: ignore[misc]
    state.local.__init__()  # type: ignore[misc]
    _traces.clear()
    state.observers.clear()


forks.register(_after_fork)


def _inherit() -> None:
    """In a child, before the first function that trains: turn the mode on under ``run``, or say that it is off."""
    state.process.inherit = None
    if run.is_started():
        enable()
    else:
        wording.warn(
            f"process {os.getpid()} trains in core: another one, in out-of-core mode, started it, but the mode is not "
            "inherited; call chainer_ooc.enable(limit=...) in it, with its share of the memory, or start the program "
            "with chainer-ooc run"
        )


if run.is_started():
    enable()
elif run.has_parent():
    hooks.install()
    state.process.inherit = _inherit
