"""Pytest plugin under which Chainer 7.8.1's own tests run on today's NumPy.

``pytest -p tests.chainer_suite.plugin …`` does two things:

* it imports ``chainer_ooc``, whose import hook makes stock Chainer importable
  (``CHAINER_SUITE_STOCK=1``: it does not, so that the two can be compared);
* it gives the names that NumPy removed (``numpy.float``, ``numpy.int``, …) to the *test modules*,
  which use them in their own code. Chainer itself and every other library still get the
  ``AttributeError``, so nothing is hidden.
"""

from __future__ import annotations

import os
import sys

import numpy

_REMOVED = {
    "float": float,
    "int": int,
    "bool": bool,
    "object": object,
    "complex": complex,
    "Inf": float("inf"),
    "NaN": float("nan"),
    "product": numpy.prod,
    "in1d": numpy.isin,
}
_TESTS = os.sep + "tests" + os.sep

if os.environ.get("CHAINER_SUITE_STOCK", "0") != "1":
    import chainer_ooc  # noqa: F401

_numpy_getattr = getattr(numpy, "__getattr__", None)


def _getattr(name: str) -> object:
    """Stand in for ``numpy.__getattr__``, asked for the names that NumPy does not have."""
    if name in _REMOVED and _TESTS in sys._getframe(1).f_code.co_filename:
        return _REMOVED[name]
    if _numpy_getattr is not None:
        return _numpy_getattr(name)
    raise AttributeError(f"module 'numpy' has no attribute {name!r}")


numpy.__getattr__ = _getattr
