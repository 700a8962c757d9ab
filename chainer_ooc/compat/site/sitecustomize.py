"""Do the work of ``chainer_ooc.pth`` in child processes if no ``.pth`` file is installed.

``chainer_ooc.compat.child_environment`` puts this directory into ``PYTHONPATH``, so that Python
imports this module at its start. Another ``sitecustomize``, hidden by this one, is run as well.
"""

import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
_root = os.path.dirname(os.path.dirname(os.path.dirname(_here)))  # where chainer_ooc is
if _root not in sys.path:
    sys.path.append(_root)

import _chainer_ooc_startup  # noqa: E402, F401

sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != _here]
_this = sys.modules.pop("sitecustomize")
try:
    import sitecustomize  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "sitecustomize":
        raise
    sys.modules["sitecustomize"] = _this
