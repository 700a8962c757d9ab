"""A script in a fork of a process that has imported Chainer is run as the interpreter runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import environment_of_children

pytestmark = pytest.mark.skipif(
    "COVERAGE_PROCESS_START" in os.environ, reason="coverage takes the real interpreter"
)

WHAT_IT_SEES = """
import atexit, json, os, sys
import beside
atexit.register(print, "at exit")
names = sorted(name for name in globals() if not name.startswith("__"))
print(json.dumps([sys.argv, os.getcwd(), os.environ.get("MINE"), __name__, __file__, names, sys.stdin.read()]))
print(sys.modules["__main__"].names is names, beside.__file__ == os.path.join(os.path.dirname(__file__), "beside.py"))
print("to stderr", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


def test_it_sees_and_does_what_it_does_in_an_interpreter_of_its_own(
    forked_python, script, tmp_path
):
    (tmp_path / "beside.py").touch()
    path = script(WHAT_IT_SEES)
    results = []
    for python in (sys.executable, forked_python):
        results.append(
            subprocess.run(
                [python, str(path), "an argument", "--option"],
                input="some input",
                cwd=tmp_path.parent,
                env={**environment_of_children(), "MINE": "a value"},
                capture_output=True,
                text=True,
            )
        )
    expected, actual = ((r.returncode, r.stdout, r.stderr) for r in results)
    assert actual == expected
    assert expected[0] == 7
    assert expected[1].endswith("True True\nat exit\n")


def test_what_it_imports_is_there(run_python, forked_python, script):
    done = run_python(script("import sys; print('chainer' in sys.modules)"), python=forked_python)
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.parametrize(
    "arguments", [("-c", "import sys; print(sys.executable)"), ("script.py",)], ids=str
)
def test_what_it_cannot_do_the_interpreter_does(forked_python, script, tmp_path, arguments):
    script("import os, sys; print(sys.executable)")
    done = subprocess.run(
        [forked_python, *arguments],
        cwd=tmp_path,
        env={**environment_of_children(), "OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable)


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGKILL, signal.SIGTERM])
def test_a_signal_that_ends_the_script_ends_the_caller(run_python, forked_python, script, number):
    done = run_python(script(f"import os; os.kill(os.getpid(), {number})"), python=forked_python)
    assert done.returncode == -number


def test_a_script_ends_with_its_caller(forked_python, script, tmp_path):
    path = script("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [forked_python, str(path)],
        env=environment_of_children(),
        stdout=subprocess.PIPE,
        text=True,
    )
    child = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
