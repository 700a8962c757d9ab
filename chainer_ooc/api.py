"""The functions of the public API. :mod:`chainer_ooc` loads them on first use."""

from __future__ import annotations

import contextlib
from typing import Any, Unpack

from chainer_ooc import runtime
from chainer_ooc.errors import SettingError
from chainer_ooc.settings import Arguments, check_names, show_settings
from chainer_ooc.statistics import stats
from chainer_ooc.wording import repr_of

__all__ = ["disable", "enable", "is_enabled", "out_of_core_mode"]

_UNSET: Any = object()


@show_settings
def enable(limit: int | float | str | None = _UNSET, /, **settings: Unpack[Arguments]) -> None:
    """Turn out-of-core mode on for the whole process.

    From now on arrays that backward will need leave memory when it gets short, and come back in time. The
    results are bit for bit those of stock Chainer. A setting that is not given has the value of
    ``CHAINER_OOC_<NAME>`` in the environment, or else its default. A second call replaces all settings.

    Args:
        limit: The memory that training may take.
        **settings: The others, each described at its field of :class:`~chainer_ooc.settings.Settings`.

    Raises:
        SettingError: If a value is not allowed.
        TypeError: If there is no such setting.
    """
    by_position = {} if limit is _UNSET else {"limit": limit}
    runtime.enable(**by_position, **settings)  # Python raises TypeError if limit is given twice


def disable() -> None:
    """Turn out-of-core mode off. Existing graphs stay valid: arrays outside of memory are fetched when read."""
    runtime.disable()


def is_enabled() -> bool:
    """Return whether out-of-core mode is on in the calling thread."""
    return runtime.is_enabled()


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

    It takes the settings of :func:`enable`, by name, and nests like :func:`chainer.using_config`: settings
    that are not given are those of the mode outside. Arrays saved inside stay out of core after the
    ``with``.

    Args:
        enabled: ``False`` turns it off inside.
        async_: Accepted for programs written for IBM's out-of-core Chainer (there spelled ``async``, a
            reserved word today; ``**{"async": True}`` works). Copies are asynchronous whatever it says.
        fine_granularity: As ``async_``: every array moves on its own whatever it says.
        debug: As ``async_``: prints :func:`stats` at the end of the ``with``.
        devices: As ``async_``: arrays on any device are saved.
        **settings: See :func:`enable`.

    Raises:
        SettingError: If a value is not allowed.
        TypeError: If there is no such argument.
    """
    given = {name: value for name, value in settings.items() if name != "async"}
    check_names(given)
    if not isinstance(enabled, bool):
        raise SettingError(f"enabled={repr_of(enabled)} is not allowed; give True or False")
    context = runtime.out_of_core_mode(enabled, given)
    return _printing(context) if debug else context


@contextlib.contextmanager
def _printing(context: contextlib.AbstractContextManager[None]) -> Any:
    with context:
        yield
    print(stats())
