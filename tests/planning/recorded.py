"""The recorded iterations of the benchmarks."""

import importlib
import sys

from tests.conftest import ROOT

sys.path.append(
    str(ROOT / "benchmarks")
)  # its modules import one another as the scripts that they are
try:
    planner = importlib.import_module("planner")
finally:
    sys.path.pop()
