"""The conditions of edits, evaluated when the edited module is imported."""

from __future__ import annotations


def numpy_2() -> bool:
    """Return whether NumPy 2 or later is installed."""
    import numpy

    return int(numpy.__version__.partition(".")[0]) >= 2


def protobuf_has_builder() -> bool:
    """Return whether protobuf is 3.20 or later, which builds messages from a serialized description."""
    from importlib.util import find_spec

    try:
        return find_spec("google.protobuf.internal.builder") is not None
    except ModuleNotFoundError:
        return False


def h5py_3() -> bool:
    """Return whether the installed h5py, if there is one, is version 3 or later."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return int(version("h5py").partition(".")[0]) >= 3
    except PackageNotFoundError:
        return False


def onnx_without_mapping() -> bool:
    """Return whether the installed ONNX, if there is one, lacks the module ``onnx.mapping``."""
    from importlib.util import find_spec

    return find_spec("onnx") is not None and find_spec("onnx.mapping") is None
