"""What raises while room is made for an allocation arrives in the program as itself, whatever NumPy was about to do."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest

from chainer_ooc.swap.devices.ram import native
from tests.conftest import ROOT
from tests.swap.allocation_sweep import PLACES, calls

SCRIPT = ROOT / "tests" / "swap" / "allocation_sweep.py"
IS_NUMPY_1 = np.__version__.startswith("1.")

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
    # What is asked for may be more than there are addresses: a sanitizer's malloc says so.
    told = [line for line in done.stderr.splitlines() if "AddressSanitizer failed to" not in line]
    assert (done.returncode, told) == (0, [])
    results = json.loads(done.stdout)
    assert len(results) >= len(calls()) // one_of
    made = sum(result["made"] for result in results.values())
    assert made > 3 * len(results)
    wrong = {name: result["odd"] for name, result in results.items() if result["odd"]}
    if not IS_NUMPY_1:
        replaced = wrong.pop(UNPICKLING, {})
        assert all(text.startswith(("MemoryError() for", "a stale")) for text in replaced)
        assert sum(replaced.values()) <= results.get(UNPICKLING, {"made": 0})["made"]
        assert not any(result["late"] for result in results.values())
    assert not wrong


OF_SORTS = """
import chainer_ooc
import numpy as np
from chainer_ooc.errors import OutOfMemoryError
from chainer_ooc.swap.devices.ram import native

objects = np.random.RandomState(0).randint(0, 99, (40, 6)).astype(object)
calls = {
    "argsort": lambda: objects.argsort(axis=0),
    "copy": lambda: objects.copy(),
}
made, failing = [], 0


def before(nbytes):
    made.append(nbytes)
    if len(made) == failing:
        raise OutOfMemoryError("no room")


native.allocator.configure(before, 1, None, 1 << 60)
native.allocator.install()
for name, call in calls.items():
    for failing in (1, 2, 99):
        made.clear()
        try:
            call()
            for _ in range(9):
                pass
            print(name, failing, "nothing")
        except OutOfMemoryError:
            print(name, failing, made)
"""


@pytest.mark.skipif(IS_NUMPY_1, reason="NumPy 1 survives no refusal")
def test_of_a_sort_only_the_buffer_is_granted_that_it_does_not_survive_without(
    tmp_path, run_python
):
    script = tmp_path / "script.py"
    script.write_text(OF_SORTS)
    done = run_python(script)
    assert (done.returncode, done.stderr) == (0, "")
    array, buffer = 40 * 6 * 8, 40 * 8
    assert done.stdout.splitlines() == [
        f"argsort 1 [{array}]",  # the result is refused, and nothing is allocated after it
        f"argsort 2 [{array}, {buffer}]",  # granted, and the error is raised when all is sorted
        "argsort 99 nothing",
        f"copy 1 [{array}]",
        "copy 2 nothing",
        "copy 99 nothing",
    ]
