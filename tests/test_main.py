"""The command line runs scripts as Python would, and refuses what it does not know."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys

import pytest

import chainer_ooc
from tests.conftest import environment_of_children

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


def test_run_without_a_program_says_what_is_missing(run_python):
    done = run_python("-m", "chainer_ooc", "run", "--limit", "1GiB")
    assert done.returncode == 2
    assert done.stderr.endswith("run: error: a script, -m, -c or - is missing\n")


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


BROKEN_PIPES = {
    "doctor": ["doctor"],
    "estimate": ["estimate", "nets.py:net", "--device", "v100", "--no-search", "--batchsize", "1"],
    "report": ["report", "."],
    "help": ["--help"],
    "help of a command": ["run", "--help"],
    "version": ["--version"],
}
NET = "import chainer.links as L\nnet = lambda: L.Classifier(L.Linear(None, 10))\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", BROKEN_PIPES.values(), ids=BROKEN_PIPES)
def test_a_reader_that_stops_reading_ends_a_command_without_a_word(
    arguments, unbuffered, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    (tmp_path / "nets.py").write_text(NET)
    (tmp_path / "log").write_text('[{"iteration": 1, "epoch": 1, "main/loss": 1.0}]')
    done = run_into_broken_pipe(["-m", "chainer_ooc", *arguments], tmp_path)
    assert done.stderr == ""
    ignored = unbuffered and arguments[-1].startswith("--")  # by argparse, which prints these
    assert done.returncode == (0 if ignored else 128 + signal.SIGPIPE)


def test_a_script_that_writes_to_a_broken_pipe_gets_its_error(tmp_path):
    (tmp_path / "script.py").write_text("print('words', flush=True)")
    for start in ([], ["-m", "chainer_ooc", "run", "--in-core"]):
        done = run_into_broken_pipe([*start, "script.py"], tmp_path)
        assert "BrokenPipeError: " in done.stderr
        assert done.returncode != 128 + signal.SIGPIPE


def test_without_a_standard_output_commands_run(tmp_path):
    (tmp_path / "log").write_text('[{"iteration": 1, "epoch": 1, "main/loss": 1.0}]')
    command = f"exec {shlex.quote(sys.executable)} -m chainer_ooc report . >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, cwd=tmp_path, check=False)
    assert (done.stderr, done.returncode) == (b"", 0)


def run_into_broken_pipe(arguments, directory):
    """Run Python with a standard output that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment_of_children(),
            stdout=writer,
            stderr=subprocess.PIPE,
            cwd=directory,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writer)
