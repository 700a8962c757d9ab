"""Import on first use libraries that Chainer imports but few programs use."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

__all__ = ["Later", "later"]


class Later:
    """A stand-in for a module, which imports the module when one of its attributes is read.

    Args:
        name: The full name of the module.
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
            return importlib.import_module(name)  # a submodule that is not imported yet


def later(name: str) -> Any:
    """Return a module, or a stand-in that imports it on first use.

    Raises:
        ImportError: If the library is not installed.
    """
    library = name.partition(".")[0]
    if library in sys.modules or importlib.util.find_spec(library) is None:
        return importlib.import_module(name)
    return Later(name)
