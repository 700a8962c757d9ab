"""``benchmarks/gpu_check.py`` on the double: each step's code runs, and no number is written as if measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("cupy")


@pytest.mark.slow
def test_each_step_runs_and_nothing_is_measured(tmp_path):
    path = tmp_path / "check.json"
    command = [sys.executable, "benchmarks/gpu_check.py", "--on-double", "--json", path]
    environment = os.environ | {"PYTHONPATH": ""}  # of the check's own making
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    found = json.loads(path.read_text())
    assert found["on_double"]
    assert "(double)" in found["machine"]["measured"]["gpu"]
    reached = {step["step"]: step for step in found["steps"]}
    skipped = {
        name: step["reason"] for name, step in reached.items() if step["status"] == "skipped"
    }
    assert {name.split()[0] for name in skipped} <= {"nccl", "torch_times"}, skipped
    for name, step in reached.items():
        assert name in skipped or step["status"] == "ran, nothing computed"
        assert name in skipped or step["records"]
        assert all(record["measured"] is None for record in step["records"])
    assert "Nothing here was measured" in path.with_suffix(".md").read_text()
