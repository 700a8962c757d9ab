"""Run stock Chainer 7.8.1 on today's Python, NumPy and CuPy, with none of its files touched.

An import hook (:mod:`chainer_ooc.compat.finder`) edits the few modules that need it while they are loaded.
The edits and their reasons are data in :mod:`chainer_ooc.compat.edits`. Nothing here imports Chainer, NumPy
or the rest of the package: in a process that never imports Chainer the hook costs next to nothing.
"""

from chainer_ooc.compat import installation
from chainer_ooc.compat.finder import install

__all__ = ["child_environment", "install"]


def child_environment() -> None:
    """Make the hook reach child processes if ``chainer_ooc.pth`` is not installed.

    This is for a checkout in ``PYTHONPATH``. multiprocessing's forkserver and spawn methods and
    :mod:`subprocess` start interpreters that import Chainer before any line of the script could install the
    hook. The function changes ``PYTHONPATH`` in :data:`os.environ`. If the ``.pth`` file has done its work,
    it does nothing.
    """
    import os
    import sys

    if "_chainer_ooc_startup" in sys.modules:
        return
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([installation.SITE, *paths])
