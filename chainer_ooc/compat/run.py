"""What ``chainer_ooc run`` leaves in the environment, so that the interpreter that it becomes trains out of core.

``run`` validates its settings, puts them into ``CHAINER_OOC_*`` variables, and replaces its process by ``python`` with
the rest of the command line. There an edit of :mod:`chainer` calls :func:`start` when Chainer has been imported.
"""

from __future__ import annotations

import os
import sys

__all__ = ["VARIABLE", "is_child", "is_started", "start"]

#: The number of the process that ``run`` became. The processes that it starts inherit it.
VARIABLE = "CHAINER_OOC_RUN"


def is_started() -> bool:
    """Return whether ``run`` started this process, or one that started it."""
    return bool(os.environ.get(VARIABLE))


def is_child() -> bool:
    """Return whether another process started this one: a child of the process of ``run``, or of multiprocessing."""
    if is_started():
        return os.environ[VARIABLE] != str(os.getpid())
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None


def start() -> None:
    """Turn out-of-core mode on if ``run`` started this process. Called at the end of ``import chainer``."""
    if is_started():
        from importlib import import_module

        import_module("chainer_ooc.runtime")  # turns it on when it is imported
