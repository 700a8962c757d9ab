"""What raises while room is made for an allocation arrives in the program as itself, whatever NumPy was about to do."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest

from chainer_ooc.swap import native
from tests.conftest import ROOT
from tests.swap.allocation_sweep import PLACES, calls

SCRIPT = ROOT / "tests" / "swap" / "allocation_sweep.py"
IS_NUMPY_1 = np.__version__.startswith("1.")

#: What NumPy 2 itself makes of an allocation that fails, whoever it fails for.
NUMPYS_OWN = {
    # It clears a buffer that it did not get: npysort's cleanup of references.
    "sort O 0": {"exit status -11": 1},
    "argsort O 0": {"exit status -11": 1},
}
#: Whose __setstate__ raises a bare MemoryError in place of any error (PyErr_NoMemory).
UNPICKLING = "pickle"

pytestmark = pytest.mark.skipif(native.allocator is None, reason="the C extension is not built")


@pytest.mark.parametrize(
    ("place", "one_of"),
    [
        *((place, 1) for place in ("main thread", "another thread")),
        *((place, 8) for place in PLACES if place not in ("main thread", "another thread")),
        *(
            pytest.param(place, 1, marks=pytest.mark.exhaustive)
            for place in PLACES
            if place not in ("main thread", "another thread")
        ),
    ],
)
def test_the_error_arrives_as_itself(place, one_of, run_python):
    done: subprocess.CompletedProcess[str] = run_python(SCRIPT, place, one_of, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads(done.stdout)
    assert len(results) >= len(calls()) // one_of
    made = sum(result["made"] for result in results.values())
    assert made > 3 * len(results)
    wrong = {name: result["odd"] for name, result in results.items() if result["odd"]}
    if not IS_NUMPY_1:
        for name, odd in NUMPYS_OWN.items():
            assert wrong.pop(name, odd) == odd
        replaced = wrong.pop(UNPICKLING, {})
        assert all(text.startswith(("MemoryError() for", "a stale")) for text in replaced)
        assert sum(replaced.values()) <= results.get(UNPICKLING, {"made": 0})["made"]
        assert not any(result["late"] for result in results.values())
    assert not wrong
