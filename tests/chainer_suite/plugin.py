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
from collections.abc import Generator

import numpy
import pytest

_REMOVED = {
    "float": float,
    "int": int,
    "bool": bool,
    "object": object,
    "complex": complex,
    "Inf": float("inf"),
    "NaN": float("nan"),
    "complex_": numpy.complex128,
    "product": numpy.prod,
    "in1d": numpy.isin,
}
_TESTS = os.sep + "tests" + os.sep

if os.environ.get("CHAINER_SUITE_STOCK", "0") != "1":
    from chainer_ooc.compat import child_environment

    child_environment()  # the tests start processes of several kinds

_numpy_getattr = getattr(numpy, "__getattr__", None)


def _getattr(name: str) -> object:
    """Stand in for ``numpy.__getattr__``, asked for the names that NumPy does not have."""
    if name in _REMOVED and _TESTS in sys._getframe(1).f_code.co_filename:
        return _REMOVED[name]
    if _numpy_getattr is not None:
        return _numpy_getattr(name)
    raise AttributeError(f"module 'numpy' has no attribute {name!r}")


numpy.__getattr__ = _getattr


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give each rank of an MPI job a JUnit report of its own."""
    directory = os.environ.get("CHAINER_SUITE_XML")
    if directory:
        rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
        config.option.xmlpath = os.path.join(directory, f"{rank}.xml")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Count as skipped what needs ChainerX, a compiled part that Chainer's wheel does not have.

    Most such tests carry the mark ``chainerx``; some only fail.
    """
    report = yield
    error = str(call.excinfo.value) if report.failed and call.excinfo else ""
    if "ChainerX is not available" in error or "module 'chainerx'" in error:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "needs ChainerX, which is not built")
    return report
