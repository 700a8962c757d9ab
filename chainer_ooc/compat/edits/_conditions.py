"""Conditions under which an edit is needed; evaluated when the module is imported."""

from __future__ import annotations


def numpy_2() -> bool:
    """NumPy 2 or later is installed."""
    import numpy

    return int(numpy.__version__.partition(".")[0]) >= 2


def protobuf_has_builder() -> bool:
    """Protobuf 3.20 or later, the first that can build messages from a serialized description, is installed."""
    from importlib.util import find_spec

    try:
        return find_spec("google.protobuf.internal.builder") is not None
    except ModuleNotFoundError:
        return False
