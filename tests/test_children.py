"""Children of a process in out-of-core mode: out of core with a part of the limit under ``run``, else one line."""

from __future__ import annotations

import re

import pytest

POOL = """
import multiprocessing, os, sys, time
import numpy as np
def train(n):
    import chainer, chainer.functions as F, chainer_ooc
    x = chainer.Variable(np.ones((64, 1024), "f"))
    for _ in range(2):
        F.sum(F.tanh(F.exp(x))).backward()
    time.sleep(0.5)  # so that each process of the pool has one
    return chainer_ooc.is_enabled(), chainer_ooc.stats().limit_bytes, float(x.grad.sum())
def load(n):
    import chainer, chainer.functions as F
    with chainer.no_backprop_mode():
        F.exp(np.ones(3, "f"))
    return chainer.dataset.concat_examples([np.ones(3)]).shape
if __name__ == "__main__":
    work, method, *rest = sys.argv[1:]
    exec("".join(rest))
    with multiprocessing.get_context(method).Pool(3) as pool:
        for result in pool.map(globals()[work], range(3), chunksize=1):
            print(result)
        pool.close()
        pool.join()
"""
MIB = 1 << 20
METHODS = pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])


@pytest.fixture
def pool(run_python, tmp_path):
    def start(*arguments):
        (tmp_path / "pool.py").write_text(POOL)
        env = {"PYTHONWARNINGS": "ignore::DeprecationWarning"}  # of forks beside threads
        done = run_python(*arguments, env=env)
        assert done.returncode == 0, done.stderr
        return [eval(line) for line in done.stdout.splitlines()], done.stderr

    return start


def test_the_programs_results_are_those_of_stock_chainer(pool):
    stock, told = pool("pool.py", "train", "spawn")
    assert told == ""
    assert [one[:2] for one in stock] == [(False, None)] * 3
    found, _ = pool("-m", "chainer_ooc", "run", "--limit", "1GiB", "pool.py", "train", "spawn")
    assert [one[2] for one in found] == [one[2] for one in stock]


@METHODS
@pytest.mark.parametrize("before", ["", "import chainer"])
def test_under_run_children_train_out_of_core_with_a_part_of_the_limit(pool, method, before):
    run = ["-m", "chainer_ooc", "run", "--limit", "1GiB", "pool.py"]
    found, told = pool(*run, "train", method, before)
    assert [one[:2] for one in found] == [(True, 256 * MIB)] * 3
    assert told == ""


@METHODS
@pytest.mark.parametrize(
    "before",
    [
        "import chainer_ooc; chainer_ooc.enable('1GiB')",
        "mode = chainer_ooc.out_of_core_mode(); mode.__enter__()",
    ],
)
def test_elsewhere_each_child_that_trains_says_that_it_is_in_core(pool, method, before):
    if before.startswith("mode") and method != "fork":
        pytest.skip("a mode of one thread is nothing that new interpreters could know of")
    found, told = pool("pool.py", "train", method, f"import chainer_ooc; {before}")
    assert [one[0] for one in found] == [False] * 3
    lines = told.splitlines()
    assert len(lines) == 3, told
    numbers = {
        re.fullmatch(r"chainer_ooc: process (\d+) trains in core: .*", one)[1] for one in lines
    }
    assert len(numbers) == 3


@METHODS
@pytest.mark.parametrize(
    "work, before",
    [
        ("load", "import chainer_ooc; chainer_ooc.enable('1GiB')"),
        ("train", "import chainer_ooc; chainer_ooc.enable('1GiB'); chainer_ooc.disable()"),
        ("train", "import chainer"),
    ],
    ids=["children that load data", "the mode was turned off", "the mode was never on"],
)
def test_nothing_is_said_where_nothing_is_to_be_said(pool, method, work, before):
    _, told = pool("pool.py", work, method, before)
    assert told == ""


def test_a_limit_of_the_childs_own_is_not_divided(run_python, tmp_path):
    (tmp_path / "child.py").write_text(
        "import chainer, chainer_ooc, chainer_ooc.state as s\n"
        "limit = lambda: s.managers()[0].limit >> 20\n"
        "print(limit())\n"
        "with chainer_ooc.out_of_core_mode(plan=False): print(limit())\n"
        "with chainer_ooc.out_of_core_mode(limit='100MiB'): print(limit())\n"
        "chainer_ooc.enable(); print(limit())\n"
        "chainer_ooc.enable(limit='100MiB'); print(limit())\n"
    )
    code = "import subprocess, sys; subprocess.run([sys.executable, 'child.py'], check=True)"
    done = run_python("-m", "chainer_ooc", "run", "--limit", "1GiB", "-c", code)
    assert done.stdout.split() == ["512", "512", "100", "512", "100"], done.stderr
