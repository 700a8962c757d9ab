"""The functions of the public API; :mod:`chainer_ooc` loads them when they are first asked for."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Unpack

from chainer_ooc import state
from chainer_ooc.errors import SettingError
from chainer_ooc.settings import Arguments, check_names, show_settings
from chainer_ooc.wording import repr_of

__all__ = ["Stats", "disable", "enable", "is_enabled", "out_of_core_mode", "stats"]

_UNSET: Any = object()


@dataclasses.dataclass(frozen=True)
class Stats:
    """What out-of-core mode has done in this process so far, over all devices.

    Attributes:
        bytes_out: Bytes copied out of the devices' memory.
        bytes_in: Bytes copied back.
        peak_bytes: The highest memory measured (the process's resident memory on the CPU).
        limit_bytes: The limit in force (bytes), ``None`` if out-of-core mode was never enabled.
        storages_out: Allocations copied out.
        storages_in: Allocations copied back.
        hits: Reads that found the array in memory.
        prefetched: Allocations whose copy back was begun before they were asked for.
        prefetch_hits: Those of them that were used before they had to go out again.
        bytes_discarded: Bytes that were given up with no copy, to be computed again.
        storages_remade: Allocations that were computed again.
        recompute_seconds: Time that took.
        copy_seconds: Time in which copies were under way, as far as they are known to have ended.
        stall_fetch_seconds: Time that computing threads waited for arrays that were fetched when they were asked
            for. On a GPU, where the streams wait, this and the next are what the host waited.
        stall_late_seconds: Time that they waited for arrays that were fetched ahead, too late.
        stall_room_seconds: Time that they waited for copies out, to make room.
        stall_trim_seconds: Time that they spent on giving freed memory back to the system.
    """

    bytes_out: int
    bytes_in: int
    peak_bytes: int
    limit_bytes: int | None
    storages_out: int
    storages_in: int
    hits: int
    prefetched: int
    prefetch_hits: int
    bytes_discarded: int
    storages_remade: int
    recompute_seconds: float
    copy_seconds: float
    stall_fetch_seconds: float
    stall_late_seconds: float
    stall_room_seconds: float
    stall_trim_seconds: float

    @property
    def stall_in_seconds(self) -> float:
        """Time that computing threads waited for copies back."""
        return self.stall_fetch_seconds + self.stall_late_seconds

    @property
    def stall_out_seconds(self) -> float:
        """Time that computing threads waited for copies out."""
        return self.stall_room_seconds

    @property
    def stall_seconds(self) -> float:
        """Time that computing threads waited, for whatever cause."""
        return self.stall_in_seconds + self.stall_out_seconds + self.stall_trim_seconds

    @property
    def prefetch_accuracy(self) -> float | None:
        """The share of what was fetched ahead that was used before it had to go out again; ``None`` for none."""
        return self.prefetch_hits / self.prefetched if self.prefetched else None

    @property
    def overlap_percent(self) -> float | None:
        """The share of the copies' time in which nobody waited for them (%); ``None`` where it is not measured."""
        if not self.copy_seconds:
            return None
        waited = self.stall_in_seconds + self.stall_out_seconds
        return 100 * max(1 - waited / self.copy_seconds, 0)


@show_settings
def enable(limit: int | float | str | None = _UNSET, /, **settings: Unpack[Arguments]) -> None:
    """Turn out-of-core mode on for the whole process.

    From now on what backward will need moves out of memory when memory gets short, and back in time. The
    results are bit for bit those of stock Chainer. What an argument leaves out is taken from
    ``CHAINER_OOC_<NAME>``, then from the default. Calling it again replaces the settings.

    Args:
        limit: The memory that training may take.
        **settings: The others, each described at its field of :class:`~chainer_ooc.settings.Settings`.

    Raises:
        SettingError: If a value is not allowed.
        TypeError: If there is no such setting.
    """
    by_position = {} if limit is _UNSET else {"limit": limit}
    state.enable(**by_position, **settings)  # both is an error of Python's
    import chainer

    chainer.out_of_core_mode = out_of_core_mode


def disable() -> None:
    """Turn out-of-core mode off. Graphs built before stay valid: what is out is fetched when it is read."""
    state.disable()


def is_enabled() -> bool:
    """Return whether out-of-core mode is on in the calling thread."""
    return state.is_enabled()


@show_settings
def out_of_core_mode(
    enabled: bool = True,
    *,
    async_: bool = True,
    fine_granularity: bool = True,
    debug: bool = False,
    devices: Any = None,
    **settings: Unpack[Arguments],
) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that turns out-of-core mode on, or off, in the calling thread.

    It takes the settings of :func:`enable`, by name, and nests like :func:`chainer.using_config`: those left out are
    those of the mode outside. What is computed inside is saved out of core, also when it is read after the ``with``.

    Args:
        enabled: ``False`` turns it off inside.
        async_: Accepted for programs written for IBM's out-of-core Chainer (there spelled ``async``, a
            reserved word today; ``**{"async": True}`` works). Copies are asynchronous whatever it says.
        fine_granularity: As ``async_``: every array moves on its own whatever it says.
        debug: As ``async_``: prints :func:`stats` at the end of the ``with``.
        devices: As ``async_``: what is on any device is saved.
        **settings: See :func:`enable`.

    Raises:
        SettingError: If a value is not allowed.
        TypeError: If there is no such argument.
    """
    given = {name: value for name, value in settings.items() if name != "async"}
    check_names(given)
    if not isinstance(enabled, bool):
        raise SettingError(f"enabled={repr_of(enabled)} is not allowed; give True or False")
    context = state.out_of_core_mode(enabled, given)
    return _printing(context) if debug else context


@contextlib.contextmanager
def _printing(context: contextlib.AbstractContextManager[None]) -> Any:
    with context:
        yield
    print(stats())


def stats() -> Stats:
    """Return what has been done so far, over all devices. The peak is the highest of any device."""
    managers = state.managers()
    totals = {
        field.name: sum(getattr(manager.counters, field.name) for manager in managers)
        for field in dataclasses.fields(Stats)
        if field.name not in ("peak_bytes", "limit_bytes")
    }
    return Stats(
        peak_bytes=max((manager.device.peak_bytes() for manager in managers), default=0),
        limit_bytes=max((manager.limit for manager in managers), default=None),
        **totals,
    )
