"""The tests notice what is changed in the package: a few mutants, or with --exhaustive those of the engine."""

from __future__ import annotations

import ast
import fnmatch

import pytest

from tests.conftest import ROOT
from tests.mutation.mutants import functions, mutants, tree_of
from tests.mutation.targets import ENGINE, EQUIVALENT, PLANTED, STATEMENTS, TELLING, TESTS, TOLD

SCRIPT = ROOT / "tests" / "mutation" / "run.py"
#: One of each kind: planted, an order between streams, a hold, a wait, a state, a retry, an event, a condition.
SAMPLE = (
    "planted: restore ",
    "swap.devices.cuda.streams.CopyStreams._copy: no stream.wait_event(event)",
    "swap.devices.cuda.streams.CopyStreams._record: never recorded",
    "swap.devices.cuda.transfers.StreamTransfer.__init__: self._owner = None",
    "swap.devices.cuda.transfers.StreamTransfer.join: no self._streams.let_compute_wait",
    "swap.storage.Storage.move_to: no raise",
    "planning.eviction.Evictor.release_unless_held: no storage.referenced_externally",
    "graph.attributes.PackedTuple.get: ",
    "graph.nodes._get_data: turn around",
)


@pytest.fixture(scope="module")
def everything():
    return mutants()


def test_all_modules_have_mutants_of_different_names(everything):
    names = [mutant.name for mutant in everything]
    assert len(set(names)) == len(names) > 600
    assert {mutant.module for mutant in everything} == {*ENGINE, *STATEMENTS}


def test_what_the_lists_name_is_there(everything):
    names = [mutant.name for mutant in everything]
    gone = [one for one in (*EQUIVALENT, *SAMPLE) if not any(n.startswith(one) for n in names)]
    gone += [test for tests in TESTS.values() for test in tests if not (ROOT / test).is_file()]
    for module, patterns in STATEMENTS.items():
        found = [name for name, _ in functions(tree_of(module))]
        gone += [one for one in patterns if not fnmatch.filter(found, one)]
    words = {
        name
        for module in ENGINE
        for node in ast.walk(tree_of(module))
        for name in (getattr(node, "attr", None), getattr(node, "name", None))
    }
    gone += [word for word in (*TOLD, *TELLING) if word not in words]
    assert not gone


def test_a_mutant_differs_in_its_module(everything):
    for mutant in [*everything[: len(PLANTED)], *everything[len(PLANTED) :: 40]]:
        changed = mutant.mutated()
        assert ast.unparse(changed) != ast.unparse(tree_of(mutant.module)), mutant.name
        compile(changed, mutant.file, "exec")


def kill(run_python, *words, timeout):
    done = run_python(SCRIPT, *words, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.count(" killed ")


@pytest.mark.slow
def test_some_are_noticed(run_python):
    assert kill(run_python, *SAMPLE, timeout=280) >= len(SAMPLE)


@pytest.mark.exhaustive
def test_all_of_the_engine_are_noticed(run_python):
    assert kill(run_python, "swap.", timeout=4 * 3600) > 400
