"""``python -m chainer_ooc doctor`` tells what is there, what is missing and how to get it."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

import chainer_ooc
from chainer_ooc import doctor

ROOT = Path(chainer_ooc.__file__).resolve().parents[1]
NAMES = ["Python", "NumPy", "Chainer", "extension", "mpi4py", "mpiexec", "examples", "CuPy"]
NAMES += ["CUDA", "cuDNN", "NCCL", "CPU", "memory", "swap disk", "settings"]


@pytest.mark.mpi
def test_the_report_names_everything_and_exits_0_where_the_main_job_can_run(run_python):
    pytest.importorskip("sklearn")
    done = run_python("-m", "chainer_ooc", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in NAMES:
        assert re.search(rf"^  (ok|--) {name} ", done.stdout, re.MULTILINE), name
    assert "  mpiexec -n 4 python examples/imagenet/train.py --ooc\n" in done.stdout
    assert "4 ranks tried" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 120


@pytest.mark.mpi
def test_as_json_it_says_the_same(run_python):
    text = run_python("-m", "chainer_ooc", "doctor")
    done = run_python("-m", "chainer_ooc", "doctor", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (text.returncode, "")
    assert document["can_run"] == (done.returncode == 0)
    assert document["chainer_ooc"] == chainer_ooc.__version__
    for finding in document["findings"]:
        assert finding.keys() == {"name", "text", "ok", "required", "fix"}
        mark = "ok" if finding["ok"] else "NO" if finding["required"] else "--"
        assert f"  {mark} {finding['name']:<10} " in text.stdout


@pytest.mark.parametrize("no_color, coloured", [(None, True), ("", True), ("1", False)])
def test_colours_are_for_terminals_whose_user_wants_them(monkeypatch, no_color, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    finding = doctor.Finding("NumPy", "2")
    assert doctor._mark(finding) == "ok"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert ("\033[" in doctor._mark(finding)) == coloured


def test_without_the_extension_it_says_what_that_means_and_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("chainer_ooc.swap.devices.ram.native.allocator", None)
    doctor.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 120
    found, fix = (line for line in lines if " extension " in line)
    assert re.match(r"  -- extension  not built: .*not announced.*between functions only$", found)
    assert re.match(
        r"  extension.* install a C compiler and Python\.h .*reinstall chainer_ooc$", fix
    )


def test_it_names_what_would_stay_of_a_chainer_that_was_there(tmp_path):
    info = tmp_path / "chainer-7.8.1.dist-info"
    info.mkdir()
    (info / "direct_url.json").touch()
    assert doctor.installation.leftovers(str(tmp_path)) == []
    (info / "INSTALLER").write_text("pip\n")
    assert doctor.installation.leftovers(str(tmp_path)) == []
    (info / "INSTALLER").write_text("chainer_ooc\n")
    assert doctor.installation.leftovers(str(tmp_path)) == [str(info / "direct_url.json")]


def test_it_passes_on_what_the_import_says_of_another_chainer(run_python, tmp_path):
    package = tmp_path / "site" / "chainer"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "_version.py").write_text("__version__ = '7.7.0'\n")
    code = (
        f"import sys; sys.path.insert(0, {str(package.parent)!r})\n"
        "from chainer_ooc import doctor\n"
        "(f,) = doctor._chainer(); print(f.ok, f.text, f.fix, sep='\\n')"
    )
    ok, text, fix = run_python("-c", code).stdout.splitlines()
    assert (ok, "Chainer 7.7.0 is installed in" in text) == ("False", True)
    assert re.match("(uv )?pip uninstall .*; (uv )?pip install ", fix)


def test_without_mpiexec_it_names_the_command_and_exits_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor.shutil, "which", lambda *args, **kwargs: None)
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert re.search(r"^  NO mpiexec +not found$", out, re.MULTILINE)
    assert re.search(r"^  mpiexec +pip install 'mpi4py>=4' 'mpich>=4'$", out, re.MULTILINE)
    assert "because of: mpiexec" in out


def _mpiexec(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "script, text, fix",
    [
        ("shift 2; for i in 1 2 3 4; do echo 'size 1;'; done", "another MPI", "pip install"),
        ("echo 'will not run as root' >&2; exit 1", "refuses root", "OMPI_ALLOW_RUN_AS_ROOT=1"),
        ("echo 'some reason' >&2; exit 7", "fails with 4 ranks: some reason", "pip install"),
    ],
)
def test_an_mpiexec_that_does_not_work_is_recognised(tmp_path, monkeypatch, script, text, fix):
    path = _mpiexec(tmp_path / "mpiexec", script)
    monkeypatch.setattr(doctor.shutil, "which", lambda *args, **kwargs: path)
    finding = list(doctor._mpi())[-1]
    assert (finding.name, finding.ok, finding.required) == ("mpiexec", False, True)
    assert text in finding.text
    assert fix in finding.fix


@pytest.mark.parametrize("directory, problem", [("missing", "not a directory"), ("", "GiB free")])
def test_the_swap_directory_is_looked_at(tmp_path, monkeypatch, directory, problem):
    monkeypatch.setenv("CHAINER_OOC_SWAP_DIR", str(tmp_path / directory))
    finding = doctor._swap_disk()
    assert problem in finding.text
    assert finding.ok is (directory == "")


@pytest.mark.parametrize(
    "variable, value, ok, text, fix",
    [
        ("CHAINER_OOC_LIMIT", "8GB", True, "CHAINER_OOC_LIMIT: limit=8000000000", ""),
        ("CHAINER_OOC_LIMIT", "8 gigs", False, "limit='8 gigs'", "unset CHAINER_OOC_LIMIT"),
        (
            "CHAINER_OOC_LIMT",
            "8GB",
            False,
            "did you mean CHAINER_OOC_LIMIT",
            "unset CHAINER_OOC_LIMT",
        ),
        ("CHAINER_OOC_PLAN", "", True, "the defaults", ""),
    ],
)
def test_the_settings_of_the_environment_are_shown(monkeypatch, variable, value, ok, text, fix):
    monkeypatch.setenv(variable, value)
    finding = doctor._settings()
    assert (finding.ok, finding.fix) == (ok, fix)
    assert text in finding.text


def test_a_swap_directory_in_memory_is_a_remark(monkeypatch):
    if doctor._filesystem("/dev/shm") != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    monkeypatch.setenv("CHAINER_OOC_SWAP_DIR", "/dev/shm")
    finding = doctor._swap_disk()
    assert (finding.ok, finding.required) == (False, False)
    assert "memory, not a disk" in finding.text


def test_missing_packages_of_the_examples_are_named(monkeypatch):
    monkeypatch.setitem(doctor._IMPORT_NAMES, "tqdm", "no_such_module")
    finding = doctor._examples()
    assert (finding.ok, finding.text, finding.fix) == (False, "without tqdm", "pip install tqdm")


@pytest.mark.parametrize(
    "driver, package", [((12, 8), "cupy-cuda12x"), ((13, 0), "cupy-cuda13x"), ((0, 0), "cupy-cuda")]
)
def test_the_packages_fit_the_driver(monkeypatch, driver, package):
    monkeypatch.setattr(doctor, "_driver_cuda_version", lambda: driver)
    monkeypatch.setattr(doctor, "_child", lambda command: (0, '{"cupy_error": "x"}', ""))
    findings = {finding.name: finding for finding in doctor._gpu()}
    assert package in findings["CuPy"].fix
    assert not any(finding.required for finding in findings.values())
    assert ("no NVIDIA driver" in findings["GPU"].text) is (driver == (0, 0))


def test_a_machine_with_everything_needs_nothing(monkeypatch):
    found = (
        '{"cupy": "14.2.0", "cuda": "12.9", "cudnn": "91002", "nccl": "2.27.3", "devices": ["H"]}'
    )
    monkeypatch.setattr(doctor, "_driver_cuda_version", lambda: (12, 9))
    monkeypatch.setattr(doctor, "_child", lambda command: (0, found + "\n", ""))
    findings = list(doctor._gpu())
    assert all(finding.ok and not finding.fix for finding in findings)
    assert [finding.name for finding in findings] == ["CuPy", "CUDA", "cuDNN", "NCCL", "GPU"]


def test_a_child_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "_TIMEOUT", 0.2)
    code = "import time; time.sleep(30)"
    assert doctor._child([sys.executable, "-c", code]) == (124, "", "no answer within 0.2 s")


def test_the_packages_are_those_of_the_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, packages in doctor.PACKAGES.items():
        assert list(packages) == project["optional-dependencies"][extra], extra


def test_versions_are_written_with_dots():
    assert doctor._dotted(12090) == "12.9"
    assert doctor._dotted(22703, 10000, 100) == "2.27.3"


@pytest.mark.parametrize("limit, said", [(3 << 30, True), (1 << 60, False), (None, False)])
def test_the_limit_of_the_cgroups_is_named_if_it_is_less_than_the_machine_has(
    monkeypatch, limit, said
):
    monkeypatch.setattr(doctor.memory, "cgroup_limit", lambda: limit)
    assert (", cgroup limit 3.0 GiB" in doctor._memory().text) is said
