"""Processes that train on real CuPy: what they find, how they fork, and that they end without a word."""

from __future__ import annotations

import pytest

#: CuPy warns where it finds no NCCL.
QUIET = ("-W", "ignore::UserWarning:cupy._environment")

TRAINS = """
import gc, os, sys, threading
import chainer_ooc
import chainer
import cupy
import numpy as np
from tests.doubles import cuda_runtime
from tests.real_cupy.known_net import KIB, bits_of, step

cuda_runtime.setup(total=1 << 30)
RIGHT = dict.fromkeys(range(13), True)
SETTINGS = dict(limit=5 * 256 * KIB, min_bytes=1)

def graph():
    'Return a graph whose arrays have left.'
    x = chainer.Variable(cupy.asarray(bits_of(0, 256 * KIB).view('f4')))
    for _ in range(12):
        x = chainer.functions.relu(x)
    return x
"""


@pytest.fixture
def run(run_python):
    """Return a function that runs code in a process that trains; it says nothing but what the code prints."""

    def run(code, status=0, **given):
        done = run_python(*QUIET, "-X", "faulthandler", "-c", TRAINS + code, **given)
        assert (done.returncode, done.stderr) == (status, ""), done.stdout + done.stderr
        return done.stdout

    return run


def test_the_doctor_finds_the_gpu(run_python):
    done = run_python(*QUIET, "-m", "chainer_ooc", "doctor")
    for line in ("ok CuPy", "ok CUDA", "ok cuDNN", "ok GPU        NVIDIA H200 (double) 140 GiB"):
        assert line in done.stdout


def test_the_limit_of_a_gpu_is_of_its_free_memory(run):
    code = """
cuda_runtime.setup(total=10 << 30)
held = cupy.cuda.Memory(2 << 30)  # as another process would have it
chainer_ooc.enable()
chainer.functions.relu(chainer.Variable(cupy.zeros(4, 'f')))
from chainer_ooc import state
print(state.process.gpus.managers[0].limit / 2**30)
"""
    assert 7 < float(run(code)) < 8


@pytest.mark.parametrize(
    "given",
    [{}, {"host_limit": 0}, {"single_backward": True}, {"recompute": "auto"}],
    ids=str,
)
def test_training(run, given):
    code = f"""
chainer_ooc.enable(**SETTINGS, **{given})
for _ in range(5):
    assert step() == RIGHT
assert chainer_ooc.stats().bytes_in
assert cuda_runtime.complaints() == [], cuda_runtime.complaints()
assert not cuda_runtime.memory()['copied_pageable'] % (256 * KIB)
print(cupy.get_default_memory_pool().total_bytes() <= SETTINGS['limit'])
"""
    assert run(code) == "True\n"


ENDS = {
    "with nothing": "",
    "with the mode on": "chainer_ooc.enable(**SETTINGS); step()",
    "with a graph": "chainer_ooc.enable(**SETTINGS); kept = graph()",
    "with a graph in a cycle": "chainer_ooc.enable(**SETTINGS); kept = [graph()]; kept.append(kept)",
    "after the mode": "chainer_ooc.enable(**SETTINGS); kept = graph(); chainer_ooc.disable()",
    "with a graph in the swap file": "chainer_ooc.enable(host_limit=0, **SETTINGS); kept = graph()",
    "in a with": "mode = chainer_ooc.out_of_core_mode(**SETTINGS); mode.__enter__(); kept = graph()",
    "in a thread": (
        "chainer_ooc.enable(**SETTINGS); t = threading.Thread(target=step); t.start(); t.join(); kept = graph()"
    ),
    "while copies are under way": (
        "cuda_runtime.setup(total=1 << 30, lag=1000); chainer_ooc.enable(**SETTINGS); kept = graph()"
    ),
}


@pytest.mark.parametrize("state", ENDS)
def test_ends_without_a_word(run, state):
    assert run(ENDS[state] + "\nprint(cuda_runtime.complaints())") == "[]\n"


def test_an_exit_in_the_middle_has_its_status(run):
    run("chainer_ooc.enable(**SETTINGS); kept = graph(); sys.exit(3)", status=3)


FORKS = """
def in_child(function):
    child = os.fork()
    if not child:
        status = 1
        try:
            function()
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0

chainer_ooc.enable(**SETTINGS | {"limit": 7 * 256 * KIB})
"""


def test_a_child_may_do_without_cuda(run):
    """As the workers of an iterator, which are forked while a graph is there."""
    code = """
kept = graph()

def work():
    assert not chainer_ooc.is_enabled()
    np.ones(1 << 20).sum()
    gc.collect()

for _ in range(3):
    in_child(work)
    assert step() == RIGHT
kept.grad = cupy.empty_like(kept.array)
kept.backward()
print(cuda_runtime.complaints())
"""
    assert run(FORKS + code) == "[]\n"


def test_a_child_that_ends_as_python_does_says_nothing(run):
    """It frees what it has of its parent's, which CUDA refuses in a child."""
    code = """
kept = graph()
sys.stdout.flush()
if not os.fork():
    sys.exit(0)
assert os.wait()[1] == 0
assert step() == RIGHT
print(cuda_runtime.complaints())
"""
    assert run(FORKS + code) == "[]\n"


def test_a_child_of_a_process_that_has_not_used_cuda_trains(run):
    code = """
def work():
    cuda_runtime.allow_in_child()  # as if nothing had been called: CuPy has asked for the number of GPUs
    chainer_ooc.enable(**SETTINGS)
    assert step() == RIGHT
    print(chainer_ooc.stats().bytes_in > 0)

in_child(work)
"""
    assert run(FORKS.replace("chainer_ooc.enable", "dict") + code) == "True\n"
