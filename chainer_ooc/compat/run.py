"""What the environment tells a process about out-of-core mode in those that started it.

``run`` validates its settings, puts them into ``CHAINER_OOC_*`` variables, and replaces its process by ``python`` with
the rest of the command line. There an edit of :mod:`chainer` calls :func:`start` when Chainer has been imported.
"""

from __future__ import annotations

import os
import sys

__all__ = ["PARENT", "VARIABLE", "has_parent", "is_child", "is_started", "start"]

#: The number of the process that ``run`` became. The processes that it starts inherit it.
VARIABLE = "CHAINER_OOC_RUN"
#: The number of the process that called ``enable()``, while the mode is on.
PARENT = "CHAINER_OOC_PARENT"


def is_started() -> bool:
    """Return whether ``run`` started this process, or one that started it."""
    return bool(os.environ.get(VARIABLE))


def is_child() -> bool:
    """Return whether another process started this one: a child of the process of ``run``, or of multiprocessing."""
    if is_started():
        return os.environ[VARIABLE] != str(os.getpid())
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None


def has_parent() -> bool:
    """Return whether this is a child of multiprocessing, of a process that is in out-of-core mode."""
    parent = os.environ.get(PARENT, "")
    return parent not in ("", str(os.getpid())) and is_child()


def start() -> None:
    """Turn out-of-core mode on if ``run`` started this process. Called at the end of ``import chainer``.

    In another child of a process in out-of-core mode, let the first function that trains say that it is not.
    """
    if is_started() or has_parent():
        from importlib import import_module

        import_module("chainer_ooc.runtime")  # does so when it is imported
