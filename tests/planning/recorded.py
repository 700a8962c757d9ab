"""The recorded iterations of the benchmarks."""

import importlib
import sys
from types import ModuleType

from tests.conftest import ROOT


def script(name: str) -> ModuleType:
    """Return a script of the benchmarks as a module.

    They import one another by names that scripts of the examples have, too: these must not be taken for them.
    """
    folder = ROOT / "benchmarks"
    names = {path.stem for path in folder.glob("*.py")}
    others = {one: sys.modules.pop(one) for one in names & sys.modules.keys()}
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        for one in names & sys.modules.keys():
            del sys.modules[one]
        sys.modules.update(others)


planner = script("planner")
