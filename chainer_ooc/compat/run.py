"""What ``chainer_ooc run`` leaves in the environment, so that the interpreter that it becomes trains out of core.

``run`` validates its settings, puts them into ``CHAINER_OOC_*`` variables, and replaces its process by ``python`` with
the rest of the command line. There an edit of :mod:`chainer` calls :func:`start` when Chainer has been imported.
"""

from __future__ import annotations

import os

__all__ = ["VARIABLE", "is_started", "start"]

#: Set to 1 by ``run``, also for the processes that a script starts.
VARIABLE = "CHAINER_OOC_RUN"


def is_started() -> bool:
    """Return whether ``run`` started this process, or one that started it."""
    return os.environ.get(VARIABLE) == "1"


def start() -> None:
    """Turn out-of-core mode on if ``run`` started this process. Called at the end of ``import chainer``."""
    if is_started():
        from importlib import import_module

        import_module("chainer_ooc.runtime")  # turns it on when it is imported
