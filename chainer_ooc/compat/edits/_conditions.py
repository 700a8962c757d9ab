"""Conditions under which an edit is needed; evaluated when the module is imported."""

from __future__ import annotations


def numpy_2() -> bool:
    """NumPy 2 or later is installed."""
    import numpy

    return int(numpy.__version__.partition(".")[0]) >= 2


def protobuf_has_builder() -> bool:
    """Protobuf 3.20 or later is installed: it builds messages from a serialized description."""
    from importlib.util import find_spec

    try:
        return find_spec("google.protobuf.internal.builder") is not None
    except ModuleNotFoundError:
        return False


def h5py_3() -> bool:
    """The installed h5py, if there is one, is version 3 or later."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return int(version("h5py").partition(".")[0]) >= 3
    except PackageNotFoundError:
        return False


def onnx_without_mapping() -> bool:
    """The installed ONNX, if there is one, has no module ``onnx.mapping``."""
    from importlib.util import find_spec

    return find_spec("onnx") is not None and find_spec("onnx.mapping") is None
