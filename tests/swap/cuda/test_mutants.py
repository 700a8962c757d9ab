"""The tests of the swap engine notice what is taken out of it: a few mutants, or with --exhaustive all of them."""

from __future__ import annotations

import ast

import pytest

from tests.conftest import ROOT
from tests.swap.cuda import mutants

#: One of each kind: an order between streams, a hold, a wait, a state, a retry, an event, a condition.
SAMPLE = (
    "cuda_streams.CopyStreams._copy: no stream.wait_event(event)",
    "cuda_streams.CopyStreams._record: never recorded",
    "cuda_transfers.StreamTransfer.__init__: self._owner = None",
    "cuda_transfers.StreamTransfer.join: no self._streams.let_compute_wait",
    "storage.Storage.move_to: no raise",
    "reclaimer.Reclaimer.release_unless_held: no storage.held",
)


def test_all_modules_of_the_engine_have_mutants():
    found = mutants.mutants()
    names = [mutant.name for mutant in found]
    assert len(set(names)) == len(names)
    assert {mutant.module for mutant in found} == set(mutants.modules())
    assert len(names) > 400
    assert all(any(name.startswith(word) for name in names) for word in SAMPLE)
    unknown = [begin for begin in mutants.EQUIVALENT if not any(n.startswith(begin) for n in names)]
    assert not unknown


def test_a_mutant_differs_in_one_place():
    for mutant in mutants.mutants()[::40]:
        original = ast.unparse(ast.parse(mutants.source(mutant.module).read_text())).splitlines()
        changed = ast.unparse(mutants.mutated(mutant)).splitlines()
        assert original != changed, mutant.name


def kill(run_python, *words, timeout):
    done = run_python(ROOT / "tests/swap/cuda/mutants.py", "all", *words, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.count(" killed ")


@pytest.mark.slow
def test_some_are_noticed(run_python):
    assert kill(run_python, *SAMPLE, timeout=120) >= len(SAMPLE)


@pytest.mark.exhaustive
def test_all_are_noticed(run_python):
    assert kill(run_python, timeout=4 * 3600) > 400
