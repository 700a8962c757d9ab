"""Load Chainer's ``.npz`` files without running code that they contain."""

from __future__ import annotations

import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from typing import IO, Any

import chainer
import numpy as np

__all__ = ["load_npz"]

_HEADERS: dict[tuple[int, int], Callable[[IO[bytes]], tuple[tuple[int, ...], bool, Any]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
#: The largest ratio by which deflate compresses.
_MOST_SHRUNK = 1032
#: An upper bound of the size of a pickled None (bytes).
_MOST_OF_NONE = 1024

_Ignored = str | Callable[[str], bool]


def load_npz(
    file: str | os.PathLike[str] | IO[bytes],
    obj: Any,
    path: str = "",
    strict: bool = True,
    ignore_names: _Ignored | Sequence[_Ignored] | None = None,
) -> None:
    """Load an object as ``chainer.serializers.load_npz`` does, but unpickle nothing.

    Chainer's own function lets NumPy unpickle the file's objects, which runs any code that the file's
    author chose. This one reads arrays of numbers, truth values and text, and None.
    ``chainer.serializers.save_npz`` writes nothing else of models, optimizers and trainers.

    Args:
        file: A file of ``save_npz``: a path, or a seekable file that is open for reading.
        obj: The object to load, with Chainer's ``serialize``.
        path: The object's place in the file, such as ``"updater/model:main/"``.
        strict: A value that is missing in the file is an error. Otherwise the object keeps its value.
        ignore_names: Names of values to leave unchanged, or functions that take a name and return whether
            to.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not such a file, is damaged, or holds other Python objects.
        KeyError: If a value is missing.

    If it fails, some values may have been loaded already.
    """
    try:
        archive = zipfile.ZipFile(file)
    except OSError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(f"not an archive of arrays as save_npz writes it: {error}") from error
    with archive:
        chainer.serializers.NpzDeserializer(
            _Arrays(archive), path=path, strict=strict, ignore_names=ignore_names
        ).load(obj)


class _Arrays:
    """The arrays of an archive by name, each read on first use."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self:
            raise KeyError(f"{name} is not a file in the archive")
        try:
            return self._read(self._members[name])
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a damaged archive can raise anything
            raise ValueError(f"{name} in the archive cannot be used: {error}") from error

    def _read(self, member: zipfile.ZipInfo) -> np.ndarray:
        with self._archive.open(member) as file:
            shape, dtype = _header(file)
            size = member.file_size - file.tell()
            if dtype.hasobject:
                if shape == () and size <= _MOST_OF_NONE and _operations(file.read()) in _NONE:
                    return np.array(None, dtype=object)
                raise ValueError(
                    "it holds Python objects, and to load them would run whatever they say; "
                    "only arrays of numbers, truth values and text are loaded"
                )
        # Otherwise a few bytes could ask for any amount of memory.
        count = math.prod(shape)
        if min(shape, default=0) < 0 or size != count * dtype.itemsize or count > max(size, 1):
            raise ValueError(f"it has {size} bytes, which are not {dtype} of the shape {shape}")
        if member.file_size > _MOST_SHRUNK * (member.compress_size + 1):
            raise ValueError(f"it has fewer bytes than the {member.file_size} that it claims")
        with self._archive.open(member) as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        shape, _, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
    except Exception as error:  # also MemoryError, which Python's parser raises for deep nesting
        raise ValueError("it has not the header of an array") from error
    return shape, dtype


def _operations(data: bytes) -> list[tuple[str, Any]]:
    """Return the operations of a pickle without running them, in a form that does not depend on versions."""
    alike = {"NEWFALSE": ("BININT1", 0), "NEWTRUE": ("BININT1", 1)}
    found = []
    for operation, argument, _ in pickletools.genops(data):
        if isinstance(argument, str):
            argument = argument.replace("numpy.core.", "numpy._core.")
        if operation.name not in ("PROTO", "FRAME"):
            found.append(alike.get(operation.name, (operation.name, argument)))
    return found


_NONE = [
    _operations(pickle.dumps(np.array(None, dtype=object), protocol)) for protocol in (2, 3, 4)
]
