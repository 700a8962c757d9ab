"""Which cuDNN modules Chainer gets: CuPy's own, the ones of this package, or none."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import NoReturn

__all__ = [
    "CHOICES",
    "VARIABLE",
    "WithoutCuDNNError",
    "library_path",
    "native_usable",
    "refuse",
    "setting",
    "stands_in",
]

#: The environment variable that decides.
VARIABLE = "CHAINER_OOC_CUDNN"

#: Its words; every other value is the path of a library or of a directory that holds one.
CHOICES = ("auto", "native", "own", "off")

#: What has been said.
_said: set[str] = set()


class WithoutCuDNNError(ImportError):
    """Chainer runs without cuDNN, and the user knows why: it was wanted, or it has been said.

    Chainer catches the error, and would go on to advise reinstalling CuPy: see the edit of
    ``chainer.backends.cuda``.
    """

    has_been_said = True


def refuse(problem: str, error: type[WithoutCuDNNError] = WithoutCuDNNError) -> NoReturn:
    """Say in one line why Chainer runs without cuDNN, once, and raise ``error``, which Chainer hides.

    Args:
        problem: What is wrong and what to do, one line.
        error: What to raise.
    """
    if problem not in _said:
        _said.add(problem)
        # A place that is no file: Python would print the line of the source, too.
        warnings.warn_explicit(
            f"Chainer runs without cuDNN, many times slower: {problem}",
            RuntimeWarning,
            "<chainer_ooc>",
            1,
        )
    raise error(problem)


def setting() -> str:
    """Return the value of ``CHAINER_OOC_CUDNN``, ``"auto"`` when it is unset or empty.

    * ``auto``: CuPy's own modules where they load (CuPy 13 with cuDNN 8), else this package's when
      there is a GPU.
    * ``native``: only CuPy's own.
    * ``own``: this package's, also where CuPy has its own and on a machine without a GPU.
    * ``off``: none; Chainer runs without cuDNN.
    * a path (anything with a path separator): ``own`` with the library at that path: the file, or a
      directory that holds ``libcudnn.so.9`` itself, in ``lib`` or in ``lib64``.

    Raises:
        WithoutCuDNNError: If the value is neither a known word nor a path.
    """
    value = os.environ.get(VARIABLE, "").strip() or "auto"
    if value in CHOICES or os.sep in value:
        return value
    refuse(
        f"{VARIABLE}={value!r} is not understood: use one of {', '.join(CHOICES)}, or the path of "
        "libcudnn.so.9 or of its directory (a path needs a '/', as in ./libcudnn.so.9)"
    )


def library_path() -> str | None:
    """Return the path that the setting names, ``None`` when it names none."""
    value = setting()
    return value if os.sep in value else None


def native_usable() -> bool:
    """Return whether CuPy has cuDNN modules of its own and the library that they need loads."""
    try:
        environment = importlib.import_module("cupy._environment")
        environment._preload_library("cudnn")
        importlib.import_module("cupy_backends.cuda.libs.cudnn")
    except Exception:  # whatever the cause, Chainer could not use them either
        return False
    return True


def stands_in(native: bool) -> bool:
    """Return whether this package's modules take the names of CuPy's.

    Args:
        native: Whether the installed CuPy has modules of these names.

    Raises:
        WithoutCuDNNError: If the setting is ``off`` or not understood.
    """
    value = setting()
    if value == "off":
        raise WithoutCuDNNError(f"cuDNN is switched off by {VARIABLE}=off")
    if value == "native":
        return False
    if value == "auto":
        return not (native and native_usable())
    return True
