"""Libraries that Chainer imports and few programs use: they are imported when they are first used."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

__all__ = ["Later", "later"]


class Later:
    """Stands in for a module until one of its attributes is asked for.

    Args:
        name: Full name of the module.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        module = importlib.import_module(self._name)
        try:
            return getattr(module, attribute)
        except AttributeError:
            name = f"{self._name}.{attribute}"
            is_package = hasattr(module, "__path__") and not attribute.startswith("__")
            if not is_package or importlib.util.find_spec(name) is None:
                raise
            return importlib.import_module(name)  # a module below it that nobody has imported


def later(name: str) -> Any:
    """Return a module, or what stands in for it until it is used.

    Raises:
        ImportError: The library is not installed.
    """
    library = name.partition(".")[0]
    if library in sys.modules or importlib.util.find_spec(library) is None:
        return importlib.import_module(name)
    return Later(name)
