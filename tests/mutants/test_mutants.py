"""The planted mutants fit the code, and two of them are found."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from tests.mutants.run import KNOWN, PLANTED, generic, planted

SCRIPT = ROOT / "tests" / "mutants" / "run.py"


def test_each_planted_mutant_changes_what_it_names():
    mutants = list(planted())
    assert len(mutants) == len(PLANTED) >= 14
    for mutant in mutants:
        compile(mutant.source, mutant.path, "exec")


def test_generic_mutants_are_many_and_differ():
    mutants = list(generic())
    sources = [mutant.source for mutant in mutants]
    assert len(sources) > 500
    assert len(set(sources)) > 0.95 * len(sources)
    for part in KNOWN:
        assert any(part in mutant.name for mutant in mutants), f"{part!r} is no mutant any more"


@pytest.mark.slow
def test_two_planted_mutants_are_killed(run_python):
    done = run_python(SCRIPT, "--no-baseline", "--only", "restore ", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 killed" in done.stdout
