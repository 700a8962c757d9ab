"""Finding, loading and checking ``libcudnn.so.9``, and calling it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from chainer_ooc.compat.cudnn import choice
from chainer_ooc.compat.cudnn.constants import CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
from chainer_ooc.compat.cudnn.errors import CuDNNError
from chainer_ooc.compat.cudnn.prototypes import PROTOTYPES, argument_types

__all__ = ["SONAME", "Library", "LibraryNotFoundError", "load", "loaded"]

SONAME = "libcudnn.so.9"
_MAJOR = 9


class LibraryNotFoundError(choice.WithoutCuDNNError):
    """No usable cuDNN 9: the message is one line that says what to install."""


class Library:
    """A loaded cuDNN library.

    The functions of :data:`~.prototypes.PROTOTYPES` are its methods; each takes what the C function
    takes, raises :class:`CuDNNError` when the status is not success and returns nothing. Integers,
    ``None``, :func:`ctypes.byref` and ctypes arrays are accepted as pointers.

    Args:
        dll: The :class:`ctypes.CDLL`, or an object whose attributes are such function pointers.
        path: Where it was loaded from, for messages.
    """

    def __init__(self, dll: Any, path: str) -> None:
        self._dll = dll
        self.path = path
        #: cuDNN's version: 10000 x major + 100 x minor + patch.
        self.version: int = self._plain("cudnnGetVersion", ctypes.c_size_t)()
        #: The CUDA version that it was built for: 1000 x major + 10 x minor.
        self.cuda_version: int = self._plain("cudnnGetCudartVersion", ctypes.c_size_t)()

    def _plain(self, name: str, result: type | None, *arguments: type) -> Any:
        function = getattr(self._dll, name)
        function.restype = result
        function.argtypes = list(arguments)
        return function

    def __getattr__(self, name: str) -> Callable[..., None]:
        # Only reached once a function: the bound one becomes an attribute.
        if name not in PROTOTYPES:
            raise AttributeError(f"{name} is not a function of cuDNN that chainer_ooc calls")
        function = self._plain(name, ctypes.c_int, *argument_types(name))

        def call(*arguments: Any) -> None:
            status = function(*arguments)
            if status:
                raise self.error(status, name)

        call.__name__ = name
        self.__dict__[name] = call
        return call

    def create(self, function: str) -> int:
        """Call a ``cudnnCreate...`` function and return the address of what it made."""
        address = ctypes.c_void_p()
        getattr(self, function)(ctypes.byref(address))
        assert address.value is not None
        return address.value

    def size(self, function: str, *arguments: Any) -> int:
        """Call a function whose last parameter is a ``size_t*`` and return that size in bytes."""
        size = ctypes.c_size_t()
        getattr(self, function)(*arguments, ctypes.byref(size))
        return size.value

    def error(self, status: int, function: str) -> CuDNNError:
        """Return the exception for a status, with cuDNN's name and explanation."""
        name = self._plain("cudnnGetErrorString", ctypes.c_char_p, ctypes.c_int)(status)
        message = ctypes.create_string_buffer(512)
        # Per thread; empties itself when read.
        last = self._plain("cudnnGetLastErrorString", None, ctypes.c_char_p, ctypes.c_size_t)
        last(message, len(message))
        detail = " ".join(message.value.decode(errors="replace").split())
        kind = CuDNNError
        if status == CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED:
            from chainer_ooc.compat.cudnn.device import CuDNNOutOfMemoryError

            kind = CuDNNOutOfMemoryError
        return kind(status, function, (name or b"?").decode(), detail)

    def __repr__(self) -> str:
        version = f"{self.version // 10000}.{self.version // 100 % 100}.{self.version % 100}"
        return f"<cuDNN {version} for CUDA {self.cuda_version // 1000} at {self.path}>"


def _in_directory(directory: str) -> str | None:
    for folder in (directory, os.path.join(directory, "lib"), os.path.join(directory, "lib64")):
        path = os.path.join(folder, SONAME)
        if os.path.exists(path):
            return path
    return None


def _places() -> Iterator[str]:
    """Yield what may be loaded, the most specific first; last, what the system's loader finds."""
    try:
        wheel = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        wheel = None
    directories = list(wheel.submodule_search_locations or ()) if wheel is not None else []
    directories += [
        os.environ[name]
        for name in ("CUDNN_HOME", "CUDNN_PATH", "CUDA_PATH", "CUDA_HOME", "CONDA_PREFIX")
        if os.environ.get(name)
    ]
    directories += [sys.prefix, "/usr/local/cuda"]
    for directory in directories:
        path = _in_directory(directory)
        if path is not None:
            yield path
    yield SONAME


def _install_command(cuda_major: int) -> str:
    return f"pip install 'nvidia-cudnn-cu{cuda_major}>=9,<10'"


def load(cuda_major: int, path: str | None = None) -> Library:
    """Load cuDNN 9.

    Args:
        cuda_major: The major version of the CUDA runtime that CuPy uses (12 or 13).
        path: The library, or a directory that holds it; ``None`` searches the ``nvidia-cudnn-cu*``
            wheel, the directories named by CUDNN_HOME, CUDNN_PATH, CUDA_PATH, CUDA_HOME and
            CONDA_PREFIX, the interpreter's prefix, ``/usr/local/cuda``, and what the system's
            loader finds.

    Raises:
        LibraryNotFoundError: If there is none, or it has another major version, or it is for
            another CUDA.
    """
    command = _install_command(cuda_major)
    if path is None:
        candidates = list(_places())
    else:
        found = _in_directory(path) if os.path.isdir(path) else path
        if found is None or not os.path.exists(found):
            what = f"holds no {SONAME}" if os.path.isdir(path) else "does not exist"
            raise LibraryNotFoundError(
                f"{choice.VARIABLE}={path} {what}; name the library or its directory, "
                f"or unset it and: {command}"
            )
        candidates = [found]
    problem = f"{SONAME} was not found"
    for candidate in candidates:
        try:
            library = Library(ctypes.CDLL(candidate, mode=ctypes.RTLD_LOCAL), candidate)
        except (OSError, AttributeError) as error:
            if candidate != SONAME:
                problem = f"{candidate} cannot be loaded ({error})"
            continue
        if library.version // 10000 != _MAJOR:
            # Before version 9 the number was 1000 x major + 100 x minor + patch.
            problem = f"{candidate} is cuDNN version number {library.version}, not a cuDNN {_MAJOR}"
        elif library.cuda_version // 1000 != cuda_major:
            problem = (
                f"{candidate} is for CUDA {library.cuda_version // 1000}, "
                f"but CuPy uses CUDA {cuda_major}"
            )
        else:
            return library
    raise LibraryNotFoundError(f"cuDNN {_MAJOR} for CUDA {cuda_major}: {problem}; run: {command}")


_lock = threading.Lock()
_library: Library | None = None


def loaded() -> Library:
    """Return this process's library, loaded at the first call.

    Raises:
        LibraryNotFoundError: See :func:`load`.
    """
    global _library
    if _library is None:
        with _lock:
            if _library is None:
                from chainer_ooc.compat.cudnn import device

                _library = load(device.cuda_major_version(), choice.library_path())
    return _library
