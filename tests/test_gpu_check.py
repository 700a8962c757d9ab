"""``benchmarks/gpu_check.py`` writes down what became of each step, whatever that does, and ends in time."""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_check  # noqa: E402
import gpu_steps  # noqa: E402

sys.path.remove(str(BENCHMARKS))

#: Stands for gpu_steps.py: a step is a piece of code.
SCRIPT = """
import json, os, signal, subprocess, sys, time

def write(**record):
    with open(os.environ["GPU_CHECK_RECORDS"], "a") as file:
        file.write(json.dumps(record) + "\\n")

PIECES = {pieces!r}
exec(PIECES[sys.argv[1]])
"""
PIECES = {
    "machine": 'write(what="machine", measured={"gpu": "a GPU"})',
    "passes": 'write(what="speed", measured={"ms": 1.5})',
    "fails": 'write(what="one", measured={"ms": 2}); print("said"); sys.exit("no such thing")',
    "crashes": "print('before', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": 'write(what="one", measured={"ms": 3}); print("waits", flush=True); time.sleep(60)',
    "leaves_a_child": (
        'child = subprocess.Popen(["sleep", "60"]); write(what="child", measured={"pid": child.pid}); child.wait()'
    ),
    "skips": 'write(reason="torch is not installed"); sys.exit(77)',
    "ends_with_the_status_of_a_skip": "sys.exit(77)",
    "is_killed_while_it_writes": (
        'write(what="one", measured={}); '
        'open(os.environ["GPU_CHECK_RECORDS"], "a").write(\'{"what": "tw\'); sys.exit(3)'
    ),
    "interrupts": "os.kill(os.getppid(), signal.SIGINT); time.sleep(60)",
    "is_terminated": "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)",
}


@pytest.fixture
def check(tmp_path):
    """Return a function that runs steps and returns their results by name, as the file has them."""

    def run(*names, budget=60.0, limit=20.0, reserve=0.0, on_double=False, pieces=None):
        script = tmp_path / "steps.py"
        script.write_text(SCRIPT.format(pieces=PIECES | (pieces or {})))
        steps = [gpu_check.Step(name, f"whether it {name}", limit, reserve) for name in names]
        path = tmp_path / "folder" / "results.json"
        one = gpu_check.Check(path, on_double, budget, script)
        one.run(steps)
        text = path.with_suffix(".md").read_text()
        assert all(name in text for name in names)
        found = json.loads(path.read_text())
        assert list(path.parent.glob("*.part")) == []
        assert [step["step"] for step in found["steps"]] == list(names)
        return {step["step"]: step for step in found["steps"]}

    return run


def test_a_step_that_passes(check):
    (step,) = check("passes").values()
    assert step["status"] == "passed"
    assert step["records"] == [{"what": "speed", "measured": {"ms": 1.5}}]
    assert "tail" not in step


def test_the_rest_goes_on_after_failures(check):
    found = check("fails", "crashes", "hangs", "passes", limit=2)
    assert [step["status"] for step in found.values()] == [
        "failed", "crashed", "timed out", "passed"
    ]  # fmt: skip
    assert "said" in found["fails"]["tail"] and "no such thing" in found["fails"]["tail"]
    assert found["crashes"]["reason"] == "SIGSEGV" and "before" in found["crashes"]["tail"]
    assert found["hangs"]["reason"] == "took more than 2 s" and "waits" in found["hangs"]["tail"]


def test_what_was_measured_before_the_end_is_kept(check):
    found = check(
        "fails",
        "hangs",
        "is_killed_while_it_writes",
        limit=2,
    )
    assert [step["records"][0]["what"] for step in found.values()] == ["one"] * 3
    assert all(len(step["records"]) == 1 for step in found.values())


def test_children_of_a_step_end_with_it(check):
    (step,) = check("leaves_a_child", limit=2).values()
    assert step["status"] == "timed out"
    pid = step["records"][0]["measured"]["pid"]
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


def test_only_a_skip_with_a_reason_is_one(check):
    found = check("skips", "ends_with_the_status_of_a_skip")
    assert found["skips"]["status"] == "skipped"
    assert found["skips"]["reason"] == "torch is not installed"
    assert found["ends_with_the_status_of_a_skip"]["status"] == "failed"


def test_the_budget_ends_it(check):
    start = time.monotonic()
    found = check("hangs", "passes", budget=5, limit=60)
    assert time.monotonic() - start < 10
    assert [step["status"] for step in found.values()] == ["timed out", "not reached"]
    assert found["passes"]["reason"] == "the budget was used up"


def test_later_steps_have_their_time(check):
    found = check("hangs", "passes", budget=14, limit=60, reserve=8)
    assert [step["status"] for step in found.values()] == ["timed out", "passed"]


@pytest.mark.parametrize("piece", ["interrupts", "is_terminated"])
def test_what_is_there_when_it_is_interrupted_is_written(check, piece):
    callbacks, gc.callbacks[:] = gc.callbacks[:], []  # hypothesis has one: an error in it is lost
    numbers = (signal.SIGINT, signal.SIGTERM)  # which a shell may have had ignored
    before = [signal.signal(number, gpu_check._interrupt) for number in numbers]
    try:
        found = check("passes", piece, "hangs")
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        gc.callbacks[:] = callbacks
    assert [step["status"] for step in found.values()] == ["passed", "interrupted", "not reached"]


def test_without_a_gpu_only_the_doctor_is_asked(check, tmp_path):
    pieces = {"machine": 'sys.exit("CUDA sees none")', "doctor": PIECES["passes"]}
    found = check("doctor", "passes", pieces=pieces)
    assert found["doctor"]["status"] == "passed"
    assert found["passes"]["status"] == "not reached"
    assert found["passes"]["reason"] == "nothing can run here"
    assert "CUDA sees none" in (tmp_path / "folder" / "results.md").read_text()


def test_nothing_is_passed_on_the_double(check):
    (step,) = check("passes", on_double=True).values()
    assert step["status"] == "ran, nothing computed"


def test_the_double_writes_no_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("GPU_CHECK_RECORDS", str(tmp_path / "records"))
    monkeypatch.setattr(gpu_steps, "END", time.monotonic() + 60)
    for double in (False, True):
        monkeypatch.setattr(gpu_steps, "DOUBLE", double)
        gpu_steps.attempt("one", lambda: {"ms": 1.25})
    first, second = map(json.loads, (tmp_path / "records").read_text().splitlines())
    assert first == {"what": "one", "measured": {"ms": 1.25}}
    assert second == {"what": "one", "measured": None}


def test_one_thing_that_fails_does_not_end_a_step(tmp_path, monkeypatch):
    monkeypatch.setenv("GPU_CHECK_RECORDS", str(tmp_path / "records"))
    monkeypatch.setattr(gpu_steps, "DOUBLE", False)
    monkeypatch.setattr(gpu_steps, "END", time.monotonic() + 60)
    monkeypatch.setattr(gpu_steps, "_failed", [])

    def broken():
        raise ValueError("it is broken")

    def not_here():
        raise gpu_steps.Skip("it is not here")

    for name, function in (("a", broken), ("b", not_here), ("c", lambda: {"ms": 1})):
        gpu_steps.attempt(name, function)
    gpu_steps.attempt("d", lambda: {"ms": 2}, least=600)
    monkeypatch.setitem(gpu_steps.STEPS, "passes", lambda: None)
    found = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    assert found[0]["error"] == "ValueError: it is broken"
    assert found[1]["skipped"] == "it is not here"
    assert found[2] == {"what": "c", "measured": {"ms": 1}}
    assert found[3]["skipped"] == "no time was left"
    assert gpu_steps.main("passes") == 1  # because of a


@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_skipped_in_the_middle_keeps_what_failed(tmp_path, monkeypatch, first):
    monkeypatch.setenv("GPU_CHECK_RECORDS", str(tmp_path / "records"))
    for name in ("_failed", "_noted"):
        monkeypatch.setattr(gpu_steps, name, [])

    def step():
        if not first:
            gpu_steps.note("one", error="broken")
        raise gpu_steps.Skip("pytest is not installed")

    monkeypatch.setitem(gpu_steps.STEPS, "step", step)
    assert gpu_steps.main("step") == (gpu_check.SKIPPED if first else 1)
    assert "pytest is not installed" in (tmp_path / "records").read_text()


def test_what_is_not_installed_is_named(monkeypatch):
    assert gpu_steps.missing_packages() == []
    there = gpu_steps.has
    monkeypatch.setattr(gpu_steps, "has", lambda name: name != "xxhash" and there(name))
    assert gpu_steps.missing_packages() == ["xxhash"]


def test_steps_are_functions():
    assert {step.name.split()[0] for step in gpu_check.STEPS} == {*gpu_steps.STEPS} - {"machine"}


def test_the_reserves_fit_into_the_budget():
    assert sum(step.reserve for step in gpu_check.STEPS) < 420
    assert all(step.reserve < step.limit for step in gpu_check.STEPS)


def test_the_table_of_the_documentation_is_that_of_the_results():
    text = gpu_check.DOCS.read_text()
    assert text.split(gpu_check.BEGIN)[1].split(gpu_check.END)[0].strip() == gpu_check.docs_table()


def test_the_documentation_says_not_yet_until_there_are_results(tmp_path, monkeypatch):
    results = {"gpu_check_double": tmp_path / "double.json", "gpu_check": tmp_path / "gpu.json"}
    monkeypatch.setattr(gpu_check, "RESULTS", results)
    assert gpu_check.docs_table().count("**not yet**") == 2 * len(gpu_check.STEPS)
    ran = {"step": "pages", "status": "passed"}
    missed = {"step": "link", "status": "not reached", "reason": "the budget was used up"}
    about = {
        "date": "2027-01-02T03:04",
        "on_double": False,
        "machine": {"measured": {"gpu": "NVIDIA H200"}},
    }
    results["gpu_check"].write_text(json.dumps({**about, "steps": [ran, missed]}))
    table = gpu_check.docs_table()
    assert "passed, 2027-01-02, NVIDIA H200" in table
    assert table.count("**not yet**") == 2 * len(gpu_check.STEPS) - 1


def test_text_does_not_break_a_table():
    about = dict.fromkeys(["machine", "machine_error", "commit", "sha256_of_package"])
    about |= {"date": "today", "on_double": False}
    records = [{"what": "one", "measured": {"ms": 1234.5, "share": 0.12345}, "error": "a | b\nc"}]
    step = {"step": "s", "title": "t", "status": "failed", "reason": "x | y\nz", "seconds": 1.0}
    text = gpu_check.markdown(about, [{**step, "records": records, "tail": "```"}])
    assert "| s | failed | 1 | t: x \\| y z |" in text
    assert "- one: **failed** ms 1234, share 0.123, a \\| b c" in text
    assert text.count("```") == 2


def test_the_networks_of_torch_are_those_of_chainer():
    """As many parameters, and a step of each way, on the CPU."""
    torch = pytest.importorskip("torch")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import torch_nets
    finally:
        sys.path.remove(str(BENCHMARKS))
    import chainer.links as L

    torch.set_num_threads(1)
    theirs = {"resnet50": L.ResNet50Layers, "googlenet": L.GoogLeNet}
    for name, make in theirs.items():
        expected = sum(
            p.size
            for path, p in make(pretrained_model=None).namedparams()
            if not path.startswith(("/loss1", "/loss2"))
        )
        assert sum(p.numel() for p in torch_nets.NETS[name]().parameters()) == expected
        ways = torch_nets.steps(name, 64, 2, "cpu")
        for way in ("eager", "checkpoint", "save_on_cpu"):
            ways[way]()
