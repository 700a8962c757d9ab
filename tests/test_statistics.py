"""What stats() and the warning advise is true: training again as they say needs no second round."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.planning.system import LOW_WATER
from tests.conftest import environment_of_children

CHILD = Path(__file__).with_name("advice_child.py")
MIB = 1 << 20
#: The size of the arrays of "chain" (bytes).
ARRAY = 4 * MIB

pytestmark = pytest.mark.extension  # without it memory is not measured within functions


def child(folder, *arguments):
    done = subprocess.run(
        [sys.executable, CHILD, *map(str, arguments)],
        cwd=folder,
        env=environment_of_children(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def train(tmp_path):
    """Return a function that trains in a process of its own and returns its statistics and what it warned of."""

    def train(*arguments):
        done = child(tmp_path, *arguments)
        return json.loads(done.stdout), done.stderr

    return train


@pytest.mark.parametrize(
    "arguments",
    [
        "chain Adam 4",
        "chain SGD 1",
        "chain Adam 4 plan=0",
        "chain MomentumSGD 4 single_backward=1",
        "mlp Adam 4",
        "mlp SGD 4",
        "conv MomentumSGD 3",
        "late Adam 3",
    ],
)
def test_the_limit_that_a_warning_names_suffices(train, arguments):
    net, optimizer, iterations, *settings = arguments.split()
    _, told = train(net, optimizer, iterations, "1MiB", *settings)
    assert told.count("chainer_ooc: ") == 1
    (limit,) = re.findall(r"chainer_ooc: .* needs .* more, and .* It needs limit=(\d+) ", told)
    stats, told = train(net, optimizer, iterations, limit, "strict=1", *settings)
    assert told == ""
    assert stats["peak_bytes"] <= int(limit)
    assert int(limit) < 1.25 * stats["peak_bytes"]


@pytest.fixture(scope="module")
def in_core(tmp_path_factory):
    """Return the statistics of two iterations of "chain" with room for everything."""
    return json.loads(child(tmp_path_factory.mktemp("in core"), "chain", "Adam", 2, "1TiB").stdout)


def test_the_limits_that_stats_name_are_free_and_suffice(train, in_core):
    assert (in_core["free_limit_bytes"], in_core["least_limit_bytes"]) == (None, None)
    assert in_core["advice"] == "Nothing moved: out-of-core mode was free."
    stats, told = train("chain", "Adam", 4, int(0.8 * in_core["peak_bytes"]))
    assert told == ""
    assert stats["bytes_out"] > 0
    free, least = stats["free_limit_bytes"], stats["least_limit_bytes"]
    assert least < stats["limit_bytes"] < free
    assert f'limit="{-(-free // MIB)}MiB" nothing moves' in stats["advice"]
    assert f'is limit="{-(-least // MIB)}MiB"' in stats["advice"]
    again, told = train("chain", "Adam", 4, free)
    assert (again["bytes_out"], again["bytes_discarded"], told) == (0, 0, "")
    assert again["advice"] == in_core["advice"]
    strict, told = train("chain", "Adam", 4, least, "strict=1")
    assert told == ""
    assert strict["peak_bytes"] <= least
    # With this limit memory passes the low watermark by three arrays. By one or two it does only within a function,
    # whose temporaries they are: two where NumPy reuses none for the result.
    close = (again["peak_bytes"] - 3 * ARRAY) / LOW_WATER
    assert 0.85 * free < close < free
    moved, _ = train("chain", "Adam", 4, int(close))
    assert moved["bytes_out"] + moved["bytes_discarded"] > 0


@pytest.mark.parametrize("plan", ["plan=0", "plan=1"])
def test_what_is_written_for_a_second_backward_is_told(train, in_core, plan):
    limit = int(0.6 * in_core["peak_bytes"])
    moves = plan, "recompute=never"  # which arrays run again instead depends on the times
    twice, _ = train("chain", "SGD", 5, limit, *moves)
    once, _ = train("chain", "SGD", 5, limit, *moves, "single_backward=1")
    assert twice["bytes_out_used"] > 0
    assert once["bytes_out_used"] == 0
    # At the least so much less is written. Which arrays move varies by a few.
    assert once["bytes_out"] <= twice["bytes_out"] - twice["bytes_out_used"] + 4 * ARRAY
    assert "Written for a second backward: " in twice["advice"]
    assert "single_backward=True" in twice["advice"]
    assert "second backward" not in once["advice"]
    for mine, others in zip(twice["plans"], once["plans"], strict=True):
        assert sum(mine["measured_bytes_out_used"]) <= twice["bytes_out_used"]
        assert mine["bytes_out_spared"] >= ARRAY
        # That is what has to leave. To save time the plan may move more.
        assert mine["bytes_out"] - mine["bytes_out_spared"] <= others["bytes_out"] + ARRAY
        assert others["bytes_out_spared"] == sum(others["measured_bytes_out_used"]) == 0
    assert len(twice["plans"]) == (plan == "plan=1")


def test_a_slow_disk_is_named_with_its_rate(train, in_core):
    slow, _ = train("chain", "SGD", 3, int(0.6 * in_core["peak_bytes"]), "plan=0", "disk=50e6")
    assert slow["stall_fetch_seconds"] + slow["stall_room_seconds"] > 0.5 * slow["seconds"]
    (rate,) = re.findall(r"The disk is the bottleneck \((\S+) GB/s out and", slow["advice"])
    assert 0.04 < float(rate) <= 0.2  # four threads
    (share,) = re.findall(r"waits for copies took (\d+) % of the time", slow["advice"])
    waited = sum(slow[f"stall_{why}_seconds"] for why in ("fetch", "late", "room"))
    assert abs(int(share) - 100 * waited / slow["seconds"]) <= 1
    assert "swap_dir" in slow["advice"]
    assert slow["advice"].split() == slow["text"].split()[-len(slow["advice"].split()) :]


def test_a_limit_that_is_too_low_comes_first(train):
    stats, _ = train("chain", "SGD", 3, "16MiB")
    least = -(-stats["least_limit_bytes"] // MIB)
    assert stats["advice"].startswith(f'The limit is too low: it takes limit="{least}MiB" or')


def test_a_shortage_is_told_when_the_mode_ends(run_python):
    """Even if no second iteration has shown what it takes."""
    script = """
import logging, numpy as np, chainer_ooc, chainer, chainer.functions as F
x = chainer.Variable(np.ones((64, 4096), "f"))
told, handler = [], logging.Handler()
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger("chainer_ooc").addHandler(handler)
with chainer_ooc.out_of_core_mode(limit="1MiB"):
    F.sum(F.exp(F.tanh(x))).backward()
    print(len(told))
print(len(told), told[0].endswith("; what runs later may need more."))
chainer_ooc.enable(limit="1MiB")
F.sum(F.exp(F.tanh(x))).backward()
chainer_ooc.disable()
print(len(told))
"""
    done = run_python("-c", script)
    assert done.stdout.split() == ["0", "1", "True", "1"], done.stderr
    assert done.stderr == ""


def test_a_limit_that_was_held_suffices(train, in_core):
    """What the process may take later is no reason to call a limit too low that was not exceeded."""
    stats, told = train("chain", "Adam", 4, int(0.7 * in_core["peak_bytes"]))
    assert told == ""
    assert stats["least_limit_bytes"] <= stats["limit_bytes"]
    assert "too low" not in stats["advice"]


def test_stats_of_a_process_that_never_used_it(monkeypatch):
    monkeypatch.setattr(state, "process", state.Process())
    stats = chainer_ooc.stats()
    assert (stats.limit_bytes, stats.advice) == (None, "Out-of-core mode has not been on.")
    assert "not known" in str(stats)
