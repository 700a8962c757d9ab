"""The command line runs scripts as Python would, and refuses what it does not know."""

from __future__ import annotations

import pytest

import chainer_ooc

SHOW = """
import json, os, sys
import chainer
here = os.path.dirname(os.path.abspath(__file__))
json.dump([__name__, sys.argv, sys.path[0] == here], sys.stdout)
"""


def test_run_gives_the_script_its_arguments(run_python, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "show.py").write_text(SHOW)
    arguments = ["sub/show.py", "--limit", "1", "-x", "a b"]
    done = run_python("-m", "chainer_ooc", "run", "--in-core", *arguments)
    expected = '["__main__", ["sub/show.py", "--limit", "1", "-x", "a b"], true]'
    assert (done.stdout, done.stderr) == (expected, "")


@pytest.mark.parametrize("code, status", [("import sys; sys.exit(3)", 3), ("raise KeyError", 1)])
def test_run_ends_as_the_script_does(run_python, tmp_path, code, status):
    (tmp_path / "end.py").write_text(code)
    done = run_python("-m", "chainer_ooc", "run", "--in-core", "end.py")
    assert done.returncode == status


def test_run_without_the_script_is_one_clear_line(run_python):
    done = run_python("-m", "chainer_ooc", "run", "missing.py")
    assert done.returncode == 2
    assert done.stderr == "chainer_ooc run: no such script: missing.py\n"


def test_run_turns_out_of_core_mode_on(run_python, tmp_path):
    (tmp_path / "ask.py").write_text("import chainer_ooc; print(chainer_ooc.is_enabled())")
    assert run_python("-m", "chainer_ooc", "run", "ask.py").stdout == "True\n"
    assert run_python("-m", "chainer_ooc", "run", "--in-core", "ask.py").stdout == "False\n"


def test_an_unknown_command_names_those_there_are(run_python):
    done = run_python("-m", "chainer_ooc", "doktor")
    assert done.returncode == 2
    assert "doctor" in done.stderr
    assert "run" in done.stderr


def test_version(run_python):
    assert run_python("-m", "chainer_ooc", "--version").stdout == f"{chainer_ooc.__version__}\n"
