"""The command line runs scripts as Python would, and refuses what it does not know."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from importlib.metadata import entry_points

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
    assert "run: error: a script, -m, -c or - is missing; " in done.stderr
    assert done.stderr.endswith("--help tells what there is\n")


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
    for command in ("--version", "version"):
        done = run_python("-m", "chainer_ooc", command)
        assert done.stdout == f"{chainer_ooc.__version__}\n"


BAD = {
    "run --limit foo s.py": "limit='foo'",
    "run --limit 0 s.py": "limit='0'",
    "run --limit -1 s.py": "limit='-1'",
    "run --limit=nan s.py": "limit='nan'",
    "run --swap-dir /nonexistent s.py": "swap_dir='/nonexistent'",
    "run --swap-dir s.py s.py": "swap_dir='s.py'|/s.py'",
    "run --trace /nonexistent/t.json s.py": "trace='/nonexistent/t.json'",
    "run --host-limit x s.py": "host_limit='x'",
    "run --recompute sometimes s.py": "'sometimes'",
    "run --split 3 s.py": "'3'",
    "run --lim 8GiB s.py": "--lim",
    "run --limit": "--limit",
    "run": "a script, -m, -c or - is missing",
    "estimate": "net",
    "estimate resnet50 --limit foo": "limit='foo'",
    "estimate resnet50 --insize x": "'x'",
    "estimate resnet50 --batchsize 0 --no-search": "batchsize=0",
    "estimate nothing.py:net": "nothing.py",
    "report /nonexistent": "'/nonexistent'",
    "report": "folder",
    "doctor --jsno": "--jsno",
    "version 2": "2",
    "": "COMMAND",
}


@pytest.mark.parametrize("command, named", BAD.items(), ids=BAD)
def test_a_bad_value_is_named_in_one_line(run_python, tmp_path, command, named):
    (tmp_path / "s.py").write_text("print('runs')")
    done = run_python("-m", "chainer_ooc", *command.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert re.search(named, done.stderr)


@pytest.mark.parametrize("code", ["pass", "import chainer"])
def test_a_limit_without_its_unit_is_told_once(run_python, code):
    done = run_python("-m", "chainer_ooc", "run", "--limit", "8", "-c", code)
    assert done.returncode == 0
    assert done.stderr.startswith("chainer_ooc run: limit='8' is 8 bytes, less than any training")
    assert done.stderr.count("\n") == 1


def test_a_bad_value_of_the_environment_is_named_with_its_variable(run_python, tmp_path):
    (tmp_path / "s.py").write_text("print('runs')")
    env = {"CHAINER_OOC_LIMIT": "foo"}
    done = run_python("-m", "chainer_ooc", "run", "s.py", env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("(from CHAINER_OOC_LIMIT)\n")
    assert done.stderr.count("\n") == 1
    assert (
        run_python("-m", "chainer_ooc", "run", "--limit", "1GiB", "s.py", env=env).returncode == 0
    )


@pytest.fixture
def script(tmp_path):
    """The console script, as installers write it."""
    (name,) = entry_points(group="console_scripts", name="chainer-ooc")
    path = tmp_path / "bin" / "chainer-ooc"
    path.parent.mkdir()
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {name.module} import {name.attr}\n"
        f"sys.exit({name.attr}())\n"
    )
    path.chmod(0o755)
    return path


def test_the_console_script_is_the_module(script, run_python, tmp_path):
    for arguments in (["version"], ["run", "--limit", "1GiB", "s.py", "-x"], ["run", "-c", SHOW]):
        (tmp_path / "s.py").write_text("import sys, chainer_ooc\nprint(sys.argv, sys.path)\n")
        module = run_python("-m", "chainer_ooc", *arguments)
        for start in ([], ["-u"], ["-X", "dev"]):
            done = run_python(*start, script, *arguments)
            assert (done.stdout, done.returncode) == (module.stdout, module.returncode)
    done = run_python(script, "run")
    assert done.stderr.startswith("chainer-ooc run: error: ")


def test_completion_by_shtab(script, tmp_path):
    shtab = pytest.importorskip("shtab")
    from chainer_ooc.__main__ import _PATHS, make_parser

    assert shtab.FILE == _PATHS
    parser = make_parser()
    for shell in shtab.SUPPORTED_SHELLS:
        assert "single-backward" in shtab.complete(parser, shell)
    parser.prog = "chainer-ooc"
    (tmp_path / "completion").write_text(shtab.complete(parser, "bash"))
    (tmp_path / "train.py").touch()

    def completed(*words):
        code = f"""
            . ./completion
            COMP_WORDS=(chainer-ooc {shlex.join(words)}); COMP_CWORD={len(words)}
            $(complete -p chainer-ooc | sed 's/.*-F \\([^ ]*\\).*/\\1/')
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        done = subprocess.run(
            ["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert completed("d") == ["doctor"]
    assert completed("run", "--lim") == ["--limit"]
    assert completed("run", "--recompute", "a") == ["auto"]
    assert completed("run", "--limit", "8GiB", "tr") == ["train.py"]
    assert completed("report", "--out", "tr") == ["train.py"]


BROKEN_PIPES = {
    "doctor": ["doctor"],
    "estimate": ["estimate", "nets.py:net", "--device", "v100", "--no-search", "--batchsize", "1"],
    "report": ["report", "."],
    "help": ["--help"],
    "help of a command": ["run", "--help"],
    "version": ["--version"],
    "version, as a command": ["version"],
    "findings": ["doctor", "--json"],
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
    ignored = unbuffered and arguments[-1] in (
        "--help",
        "--version",
    )  # by argparse, which prints these
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
