"""``run`` is ``python``: each program prints the same, to both streams, and ends the same."""

from __future__ import annotations

import json
import os
import py_compile
import re
import signal
import subprocess
import sys
import zipfile
from typing import NamedTuple

import pytest

from tests.conftest import environment_of_children

#: What differs between two runs of Python: addresses, times.
CHANCE = re.compile(r"0x[0-9a-f]+|in \d+\.\d+s")


class Program(NamedTuple):
    arguments: list[str]
    files: dict[str, str]
    stdin: str = ""
    options: tuple[str, ...] = ()  # of Python
    env: dict[str, str] = {}  # noqa: RUF012


def script(text, *arguments, **others):
    return Program(["script.py", *arguments], {"script.py": text}, **others)


SHOW = "import sys, os; print(__name__, sys.argv, sys.path, sys.flags, sys.orig_argv[1:])\n"
IDENTITY = """
import inspect, sys
def f(): pass
print(globals().get("__file__"), __spec__, __package__, type(__loader__), __doc__, sorted(globals()))
print(sys.modules["__main__"].f is f, f.__module__, sys.executable)
print(inspect.getsource(f))
"""
POOL = """
import multiprocessing, sys
class Item:
    def __init__(self, value): self.value = value
def work(item): return Item(item.value + 1)
if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        print([one.value for one in pool.map(work, [Item(1), Item(2)])])
"""
TRAIN = """
import numpy as np, chainer, chainer.functions as F, chainer.links as L
np.random.seed(0)
model = L.Classifier(chainer.Sequential(L.Linear(8, 16), F.tanh, L.Linear(16, 3)))
optimizer = chainer.optimizers.Adam().setup(model)
x, t = np.random.randn(9, 8).astype("f"), np.arange(9, dtype="i") % 3
for _ in range(5): optimizer.update(model, x, t)
print(model.loss.array.tobytes().hex())
"""
PICKLED = """
import atexit, pickle
class State: pass
@atexit.register
def save(): print("saved", len(pickle.dumps(State())))
"""
THREAD = """
import threading, time, pickle
class State: pass
def late():
    time.sleep(0.2)
    print("late", pickle.loads(pickle.dumps(State())).__class__ is State)
threading.Thread(target=late).start()
print("end")
"""
HANDLED = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT); time.sleep(5)
except KeyboardInterrupt:
    print("handled")
"""
WARNS = """
import warnings
for _ in range(3): warnings.warn("once")
warnings.warn("old", DeprecationWarning)
"""
UNITTEST = """
import unittest
class Case(unittest.TestCase):
    def test_one(self): self.assertEqual(1, 2)
unittest.main(argv=["script.py", "-q"], buffer=True)
"""
DEPTH = """
def depth(n=0):
    try: return depth(n + 1)
    except RecursionError: return n
print(depth())
"""
FAILS_LATE = """
import atexit, threading
atexit.register(lambda: 1 / 0)
def fail(): raise ValueError("in the thread")
thread = threading.Thread(target=fail, name="one"); thread.start(); thread.join()
class Last:
    def __del__(self): raise OSError("in del")
x = Last(); del x
raise SystemExit("words")
"""
KILL = "import os, signal, time; print('go', flush=True); os.kill(os.getpid(), signal.{}); time.sleep(5)"
CHILD = (
    "import subprocess, sys; print(subprocess.run([sys.executable, '-c', 'print(2)']).returncode)"
)

PROGRAMS = {
    "shows what it is": script(SHOW, "a b", "--limit", "-m", "--", "-"),
    "shows its module": script(IDENTITY),
    "a module": Program(["-m", "one", "-x", "--"], {"one.py": SHOW + IDENTITY}),
    "a module, glued": Program(["-mone", "--limit"], {"one.py": SHOW}),
    "a package": Program(
        ["-m", "pack"], {"pack/__init__.py": "print(1)", "pack/__main__.py": SHOW + IDENTITY}
    ),
    "a module that imports its siblings": Program(
        ["-m", "pack.one"],
        {"pack/__init__.py": "", "pack/one.py": "from . import two", "pack/two.py": "print(2)"},
    ),
    "no such module": Program(["-m", "no_such_module"], {}),
    "code": Program(["-c", SHOW, "-c", "--", "x"], {}),
    "code, glued": Program([f"-c{SHOW}", "-i"], {}),
    "code that fails": Program(["-c", "1 / 0"], {}),
    "standard input": Program(["-", "a", "--in-core"], {}, stdin=SHOW),
    "standard input of a script": script("print(input(), input())", stdin="a\nb\n"),
    "a directory": Program(["folder", "x"], {"folder/__main__.py": SHOW + IDENTITY}),
    "a directory with nothing to run": Program(["folder"], {"folder/one.py": ""}),
    "an archive": Program(["program.zip"], {"zipped": "import sys; print(sys.path[0], __name__)"}),
    "a compiled script": Program(["one.pyc"], {"compiled.py": "print(__name__, __file__)"}),
    "a link": Program(["link.py"], {"sub/real.py": SHOW + "import beside", "sub/beside.py": ""}),
    "no such script": Program(["missing.py", "x"], {}),
    "a script that is no text": Program(["text.py"], {"text.py": "\0\1"}),
    "a syntax error": script("x = (1,\n"),
    "another encoding": script("# coding: latin-1\nprint(ascii('x'), __file__)"),
    "ends with a status": script("raise SystemExit(3)"),
    "ends with words": script("import sys; sys.exit('words')"),
    "ends with nothing": script("import sys; print(1); sys.exit(None)"),
    "ends with an error": script("def f(): raise KeyError('x')\nf()"),
    "ends with a chain of errors": script("try: 1 / 0\nexcept Exception: int('x')"),
    "ends at once": script("import os; print(1, flush=True); os._exit(5)"),
    "is terminated": script(KILL.format("SIGTERM")),
    "is killed": script(KILL.format("SIGKILL")),
    "is interrupted": script(KILL.format("SIGINT")),
    "handles an interrupt": script(HANDLED),
    "is interrupted while it trains": script(TRAIN + KILL.format("SIGINT")),
    "pickles at its end": script(PICKLED),
    "a thread goes on": script(THREAD),
    "fails late": script(FAILS_LATE),
    "a pool that forks": script(POOL, "fork"),
    "a pool that spawns": script(POOL, "spawn"),
    "a pool of a forkserver": script(POOL, "forkserver"),
    "a pool of a module": Program(["-m", "one", "spawn"], {"one.py": POOL}),
    "a child": script(CHILD),
    "trains": script(TRAIN),
    "warns": script(WARNS),
    "warnings are errors": script(WARNS, options=("-W", "error")),
    "tests": script(UNITTEST),
    "the depth of its stack": script(DEPTH),
    "the modules that are there": script("import sys; print(sorted(sys.modules))"),
    "signals": script("import signal; print([signal.getsignal(n) for n in range(1, 32)])"),
    "asserts nothing": script("assert False; print(1)", options=("-O",)),
    "a safe path": script(SHOW, options=("-P",)),
    "a safe path by the environment": script(
        SHOW + "import beside",
        env={"PYTHONSAFEPATH": "1", "PYTHONPATH": "library"},
    )._replace(files={"script.py": SHOW + "import beside", "library/beside.py": "print('beside')"}),
    "isolated": script(SHOW, options=("-I",)),
    "development mode": script(SHOW + "open(__file__)", options=("-X", "dev", "-u")),
    "the environment": script(
        "import os; print(sorted(k for k in os.environ if k != 'CHAINER_OOC_RUN'))"
    ),
    "under a profiler": script("print(1)", options=("-m", "cProfile", "-o", "profile")),
}


def make(program, folder):
    for name, text in program.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if "compiled.py" in program.files:
        py_compile.compile(str(folder / "compiled.py"), str(folder / "one.pyc"), "compiled.py")
    if "zipped" in program.files:
        with zipfile.ZipFile(folder / "program.zip", "w") as archive:
            archive.write(folder / "zipped", "__main__.py")
    if "link.py" in program.arguments:
        (folder / "link.py").symlink_to("sub/real.py")


def outcome(command, program, folder, **others):
    done = subprocess.run(
        [sys.executable, *program.options, *command, *program.arguments],
        cwd=folder,
        env=environment_of_children() | program.env,
        input=program.stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **others,
    )
    return done.returncode, CHANCE.sub("", done.stdout), CHANCE.sub("", done.stderr)


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_does_what_it_does_under_python(program, tmp_path):
    make(program, tmp_path)
    expected = outcome([], program, tmp_path)
    assert outcome(["-m", "chainer_ooc", "run"], program, tmp_path) == expected


def test_a_program_is_found_after_any_setting(tmp_path):
    program = script(SHOW, "--limit", "x")
    make(program, tmp_path)
    expected = outcome([], program, tmp_path)
    for settings in (
        ["--limit", "1GiB", "--swap-dir=.", "--no-plan", "--recompute", "never"],
        ["--limit=1GiB", "--single-backward", "--split", "exact", "--verify", "--strict"],
        ["--in-core"],
    ):
        assert outcome(["-m", "chainer_ooc", "run", *settings], program, tmp_path) == expected


def test_options_are_found_in_front_of_the_module_however_it_is_named(tmp_path):
    program = script(SHOW)
    make(program, tmp_path)
    for options in (["-u"], ["-X", "dev"], ["-Bu"]):
        expected = outcome(options, program, tmp_path)
        for module in (["-m", "chainer_ooc"], ["-mchainer_ooc"], ["-m", "chainer_ooc.__main__"]):
            assert outcome([*options, *module, "run"], program, tmp_path) == expected
    expected = outcome(["-Iu"], program, tmp_path)
    assert outcome(["-Ium", "chainer_ooc", "run"], program, tmp_path) == expected
    assert outcome(["-Iumchainer_ooc", "run"], program, tmp_path) == expected


IN_FORCE = """
import dataclasses, json, chainer
from chainer_ooc import state
print(json.dumps(dataclasses.asdict(state.current())))
"""


def test_every_setting_is_a_flag(run_python, tmp_path):
    (tmp_path / "ask.py").write_text(f"import os; os.chdir('/')\n{IN_FORCE}")
    (tmp_path / "swap").mkdir()
    flags = {
        "limit": "3GiB",
        "swap_dir": "swap",
        "host_limit": "1 MiB",
        "strict": True,
        "single_backward": True,
        "recompute": "never",
        "parameters": "auto",
        "split": "exact",
        "plan": False,
        "verify": True,
        "trace": "t.json",
    }
    arguments = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        arguments += [f"--{'' if value else 'no-'}{flag}"]
        arguments += [] if isinstance(value, bool) else [value]
    done = run_python("-m", "chainer_ooc", "run", *arguments, "ask.py")
    here = {"swap_dir": str(tmp_path / "swap"), "trace": str(tmp_path / "t.json")}
    given = flags | here | {"limit": 3 << 30, "host_limit": 1 << 20}
    from chainer_ooc.settings import Arguments

    assert given.keys() == Arguments.__annotations__.keys()
    found = json.loads(done.stdout)
    assert {name: found[name] for name in given} == given, done.stderr


@pytest.mark.parametrize(
    "first", ["import chainer", "import chainer_ooc", "import chainer_ooc.api"]
)
def test_the_mode_is_on_whatever_is_imported_first(run_python, tmp_path, first):
    (tmp_path / "ask.py").write_text(
        f"{first}\nimport chainer_ooc\nprint(chainer_ooc.is_enabled())"
    )
    assert run_python("-m", "chainer_ooc", "run", "ask.py").stdout == "True\n"
    assert run_python("-m", "chainer_ooc", "run", "--in-core", "ask.py").stdout == "False\n"
    nested = {"CHAINER_OOC_RUN": "1"}  # a run that starts another one
    done = run_python("-m", "chainer_ooc", "run", "--in-core", "ask.py", env=nested)
    assert done.stdout == "False\n"


def test_what_the_program_turns_off_stays_off(run_python, tmp_path):
    (tmp_path / "off.py").write_text(
        "import chainer_ooc; chainer_ooc.disable(); import chainer; print(chainer_ooc.is_enabled())"
    )
    assert run_python("-m", "chainer_ooc", "run", "off.py").stdout == "False\n"


@pytest.mark.parametrize("trace", [[], ["--trace", "t.json"]])
def test_an_interrupt_from_outside_ends_it_as_python(trace, tmp_path):
    code = "import time, chainer; print('go', flush=True); time.sleep(60)"
    for command in ([], ["-m", "chainer_ooc", "run", *trace]):
        with subprocess.Popen(
            [sys.executable, *command, "-c", code],
            cwd=tmp_path,
            env=environment_of_children(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout.readline() == "go\n"
            os.kill(process.pid, signal.SIGINT)
            error = process.communicate()[1]
        assert error.endswith("KeyboardInterrupt\n")
        assert process.returncode == -signal.SIGINT
