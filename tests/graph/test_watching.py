"""What watches a run: timers, checksums, traces."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import chainer
import chainer.functions as F
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc import state
from chainer_ooc.errors import CorruptCopyError, SettingError
from chainer_ooc.report import trace
from chainer_ooc.swap.transfers import Transfers
from tests.conftest import environment_of_children


def chain(x, depth=4):
    h = x
    for _ in range(depth):
        h = F.sigmoid(F.tanh(h))
    return F.sum(h)


@pytest.fixture
def x():
    return chainer.Variable(np.random.rand(100, 1000).astype("f"))


def test_timers_do_not_count_what_backward_waits_for(x, monkeypatch):
    join = Transfers._join_arrival

    def slow(transfers, storage):
        time.sleep(0.05)
        join(transfers, storage)

    hook = chainer.function_hooks.TimerHook()
    before = chainer_ooc.stats()
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1):
        loss = chain(x)
        monkeypatch.setattr(Transfers, "_join_arrival", slow)
        start = time.perf_counter()
        with hook:
            loss.backward()
        elapsed = time.perf_counter() - start
    waited = chainer_ooc.stats().stall_in_seconds - before.stall_in_seconds
    assert waited > 0.3
    # Functions inside the gradients of others are timed by themselves, too.
    timed = sum(
        seconds for name, seconds in hook.call_history if name in ("Sum", "Sigmoid", "Tanh")
    )
    assert timed <= elapsed - 0.9 * waited


class Counting(chainer.FunctionNode):
    """Counts its calls in an array that its maker has, and keeps it in some way."""

    def __init__(self, state, keep):
        self.kept = keep(state)

    def forward(self, inputs):
        state = self.kept[0] if type(self.kept) in (tuple, list) else self.kept
        state += 1
        return (inputs[0] * 2,)

    def backward(self, indexes, grads):
        return (grads[0] * 2,)


class Counter:
    def __init__(self, keep):
        self.state, self.keep = np.zeros(8, "f"), keep

    def __call__(self, x):
        return Counting(self.state, self.keep).apply((x,))[0]


class Normalization:
    def __init__(self):
        self.running_mean, self.running_var = np.zeros(8, "f"), np.ones(8, "f")

    def __call__(self, x):
        state = {"running_mean": self.running_mean, "running_var": self.running_var}
        return F.batch_normalization(x, np.ones(8, "f"), np.zeros(8, "f"), **state)


#: What writes forward to arrays that outlive its functions.
STATEFUL = {
    "batch normalization": lambda: chainer.links.BatchNormalization(8),
    "batch renormalization": lambda: chainer.links.BatchRenormalization(8),
    "decorrelated batch normalization": lambda: chainer.links.DecorrelatedBatchNormalization(8, 2),
    "statistics of the caller's own": Normalization,
    "an attribute": lambda: Counter(lambda state: state),
    "in a tuple": lambda: Counter(lambda state: (state, 1)),
    "a view in a list": lambda: Counter(lambda state: [state[:]]),
}


@pytest.fixture
def is_told(caplog):
    @contextlib.contextmanager
    def check(pattern):
        caplog.clear()
        yield
        assert re.search(pattern, caplog.text)

    return check


class TestVerify:
    @pytest.fixture(autouse=True)
    def verifying(self):
        with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1, verify=True):
            yield

    def test_what_stays_as_it_is_is_not_reported(self, x, caplog):
        for _ in range(2):
            x.cleargrad()
            chain(x).backward()
        assert not caplog.messages

    @pytest.mark.parametrize("kind", list(STATEFUL))
    @pytest.mark.parametrize("settings", [{}, {"swap_all": False, "limit": "1MiB"}])
    def test_what_functions_write_to_what_they_were_made_with_is_not_reported(
        self, kind, settings, caplog
    ):
        x = chainer.Variable(np.random.RandomState(0).rand(16, 8, 1, 1).astype("f"))
        function = STATEFUL[kind]()
        with chainer_ooc.out_of_core_mode(**settings):
            once, twice = function(F.sin(x)), function(F.sin(x))
            F.sum(once + twice).backward()
            for _ in range(2):
                F.sum(function(F.sin(x))).backward()
        assert "modified in place" not in caplog.text

    @pytest.mark.parametrize("kind", list(STATEFUL))
    def test_what_others_write_to_the_state_of_functions_is_reported(self, kind, is_told):
        function = STATEFUL[kind]()
        y = function(chainer.Variable(np.ones((16, 8, 1, 1), "f")))
        names = [n for n in ("avg_mean", "running_mean", "state") if n in vars(function)]
        getattr(function, names[0])[...] += 1
        with is_told("32 bytes that .* saved .* modified in place"):
            function(F.sin(np.ones((16, 8, 1, 1), "f")))
        del y

    def test_what_is_modified_is_reported_with_who_saved_it(self, x, is_told):
        h = F.tanh(x)
        y = F.sigmoid(h)
        z = F.sum(F.exp(y))
        h.array[:] += 2  # held by ``h``: it could not move
        with is_told("400000 bytes that Tanh saved .* modified in place"):
            z.backward()

    def test_a_modified_array_that_moves_is_reported_before_it_goes(self, x, is_told):
        h = F.tanh(x)
        graph = F.sum(F.exp(F.sigmoid(h)))
        h.array[:] += 2
        del h
        with is_told("that Tanh saved"):
            F.exp(x)
        del graph

    def test_with_enough_memory_too(self, x, is_told):
        with chainer_ooc.out_of_core_mode(swap_all=False, limit=1 << 40):
            h = F.tanh(x)
            z = F.sum(F.exp(h))
            h.array[:] += 2
            with is_told("that Tanh saved"):
                z.backward()

    @pytest.mark.parametrize("times", [1, 2])
    def test_a_copy_that_is_broken_twice_is_an_error(self, x, times, monkeypatch):
        loss = chain(x)
        device = state.managers()[0].device
        read, broken = device.file.read, []

        def damaged(offset, buffer):
            read(offset, buffer)
            if len(broken) < times:
                broken.append(offset)
                buffer[7] ^= 1

        monkeypatch.setattr(device.file, "read", damaged)
        if times == 1:
            loss.backward()
            expected = x.grad.copy()
            x.cleargrad()
            with chainer_ooc.out_of_core_mode(False):
                chain(x).backward()
            assert x.grad.tobytes() == expected.tobytes()
        else:
            with pytest.raises(CorruptCopyError, match="came back with the checksum 0x"):
                loss.backward()
        assert len(broken) == times


class TestTrace:
    def test_it_has_functions_copies_stalls_and_memory(self, x, tmp_path):
        path = tmp_path / "ooc.json"
        start = time.perf_counter()
        with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1, trace=path):
            chain(x).backward()
        microseconds = (time.perf_counter() - start) * 1e6
        assert state.observers == []
        document = json.loads(path.read_text())
        complete = [event for event in document["traceEvents"] if event["ph"] == "X"]
        complete.sort(key=lambda event: event["ts"])
        kinds = {}
        for event in complete:
            kinds.setdefault(event["cat"], []).append(event)
            assert 0 <= event["ts"] <= event["ts"] + event["dur"] <= microseconds + 1
        assert [event["name"] for event in kinds["forward"]] == ["Tanh", "Sigmoid"] * 4 + ["Sum"]
        assert [event["name"] for event in kinds["backward"]][:3] == ["Sum", "Sigmoid", "Tanh"]
        moved = sum(event["args"]["bytes"] for event in kinds["copy in"])
        assert moved == document["otherData"]["stats"]["bytes_in"] - self.before.bytes_in > 0
        assert {event["name"] for event in kinds["stall"]} <= {"fetch", "late", "room", "trim"}
        assert document["otherData"]["settings"]["swap_all"] is True
        memory = [e["args"]["bytes"] for e in document["traceEvents"] if e["ph"] == "C"]
        assert min(memory) > 10 << 20
        self.check_tracks(document["traceEvents"])

    @pytest.fixture(autouse=True)
    def note(self):
        self.before = chainer_ooc.stats()

    @staticmethod
    def check_tracks(events):
        """Events of one track do not overlap, but for those inside others; each track has a name."""
        named = {e["tid"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
        tracks = {}
        for event in events:
            if event["ph"] == "X":
                tracks.setdefault(event["tid"], []).append(event)
        assert tracks.keys() == named
        for track in tracks.values():
            ends = []
            for event in sorted(track, key=lambda event: (event["ts"], -event["dur"])):
                while ends and ends[-1] <= event["ts"] + 0.2:
                    ends.pop()
                assert not ends or event["ts"] + event["dur"] <= ends[-1] + 0.2
                ends.append(event["ts"] + event["dur"])

    def test_it_is_written_when_another_mode_begins_or_ends(self, x, tmp_path):
        chainer_ooc.enable(trace=tmp_path / "a.json")
        try:
            chain(x)
            chainer_ooc.enable(trace=tmp_path / "b.json")
            assert (tmp_path / "a.json").exists()
            chain(x)
        finally:
            chainer_ooc.disable()
        events = json.loads((tmp_path / "b.json").read_text())["traceEvents"]
        assert sum(event["ph"] == "X" for event in events) == 9

    def test_it_is_written_at_the_end_of_the_process_one_for_each_rank(self, run_python, tmp_path):
        code = (
            "import chainer_ooc, chainer, numpy as np; chainer_ooc.enable(trace='ooc.json');"
            "chainer.functions.exp(np.ones(9, 'f'))"
        )
        for rank in ("0", "1"):
            done = run_python("-c", code, env={"PMI_RANK": rank, "PMI_SIZE": "2"})
            assert done.returncode == 0, done.stderr
        for rank in (0, 1):
            document = json.loads((tmp_path / f"ooc.rank{rank}.json").read_text())
            assert {event["pid"] for event in document["traceEvents"]} == {rank}

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_of_a_process_that_is_killed_the_last_half_second_is_missing(self, tmp_path, number):
        code = """
import time, numpy as np, chainer, chainer.functions as F, chainer_ooc
chainer_ooc.enable(trace="ooc.json")
x = chainer.Variable(np.ones((4, 4), "f"))
for n in range(1000): F.tanh(x)
time.sleep(trace.DELAY)
F.exp(x)
print("go", flush=True)
time.sleep(60)
""".replace("trace.DELAY", str(trace._DELAY + 0.1))
        with subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment_of_children(),
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout.readline() == b"go\n"
            process.send_signal(number)
        assert process.returncode == -number
        document = json.loads((tmp_path / "ooc.json").read_text())
        names = [event["name"] for event in document["traceEvents"] if event["ph"] == "X"]
        assert names[:1000] == ["Tanh"] * 1000
        assert names[1000:] in (
            ["exp"],
            [],
        )  # what is written half a second later may come before it
        facts = document["otherData"]
        assert facts["ended"] is False
        assert facts["stats"]["limit_bytes"] > 0
        assert facts["settings"]["trace"] == str(tmp_path / "ooc.json")

    def test_it_is_whole_at_any_time_and_takes_little_memory(self, tmp_path):
        x = chainer.Variable(np.ones((4, 4), "f"))
        path = tmp_path / "ooc.json"
        with chainer_ooc.out_of_core_mode(trace=path), chainer.no_backprop_mode():
            found = []
            tracemalloc.start()
            try:
                F.tanh(x)
                before = tracemalloc.get_traced_memory()[0]
                for _ in range(20):
                    for _ in range(200):
                        F.tanh(x)
                    found.append(len(json.loads(path.read_text())["traceEvents"]))
                assert tracemalloc.get_traced_memory()[0] - before < 1 << 20
            finally:
                tracemalloc.stop()
        assert found == sorted(set(found))
        assert found[-1] > 20 * 200
        assert json.loads(path.read_text())["otherData"]["ended"] is True

    def test_a_full_disk_ends_it_and_not_the_program(self, x, tmp_path, monkeypatch, caplog):
        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        path = tmp_path / "ooc.json"
        with chainer_ooc.out_of_core_mode(trace=path):
            monkeypatch.setattr(os, "pwrite", full)
            for _ in range(60):
                chain(x).backward()
        (message,) = caplog.messages
        assert message.startswith(f"the trace '{path}' ends here: [Errno 28] No space")
        assert json.loads(path.read_text())["otherData"]["ended"] is False

    def test_beyond_the_largest_size_events_are_counted_only(self, x, tmp_path, monkeypatch):
        monkeypatch.setattr(trace, "MOST", 20_000)
        path = tmp_path / "ooc.json"
        with chainer_ooc.out_of_core_mode(trace=path):
            for _ in range(60):
                chain(x)
        document = json.loads(path.read_text())
        assert path.stat().st_size < 30_000
        count = sum(event["ph"] in "XC" for event in document["traceEvents"])
        assert count + document["otherData"]["events_left_out"] >= 60 * 9 * 2

    def test_threads_write_whole_events(self, tmp_path):
        path = tmp_path / "ooc.json"

        def work():
            x = chainer.Variable(np.ones((4, 4), "f"))
            for _ in range(500):
                F.tanh(x)

        chainer_ooc.enable(trace=path)
        try:
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            chainer_ooc.disable()
        events = json.loads(path.read_text())["traceEvents"]
        assert sum(event["ph"] == "X" for event in events) == 2000
        self.check_tracks(events)

    def test_a_child_writes_one_of_its_own(self, run_python, tmp_path):
        (tmp_path / "train.py").write_text(
            "import multiprocessing, os, sys, numpy as np, chainer.functions as F\n"
            "def work(n): F.exp(np.ones(9, 'f')); return os.getpid()\n"
            "if __name__ == '__main__':\n"
            "    F.tanh(np.ones(9, 'f'))\n"
            "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
            "        print(pool.apply(work, (1,)))\n"
            "        pool.close(); pool.join()\n"
        )
        done = run_python("-m", "chainer_ooc", "run", "--trace", "ooc.json", "train.py")
        names = {}
        for name in ("ooc.json", f"ooc.child{done.stdout.strip()}.json"):
            events = json.loads((tmp_path / name).read_text())["traceEvents"]
            names[name] = [event["name"] for event in events if event["ph"] == "X"]
        assert [*names.values()] == [["Tanh"], ["exp"]]

    @pytest.mark.parametrize("path", ["nowhere/ooc.json", "."])
    def test_what_cannot_be_written_is_an_error_at_once(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SettingError, match=f"trace='{path}' is not a file that can be written"):
            chainer_ooc.enable(trace=path)


def test_the_manager_tells_where_it_stands(x):
    gc.collect()
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1, limit=1 << 40):
        loss = chain(x)
        text = repr(state.managers()[0])
        del loss
    assert "<SwapManager of RAM: " in text
    assert " of 1,048,576 MiB used; saved: " in text
    assert " 3 MiB out, 0 MiB discarded, 0 MiB going out, 0 MiB coming in; so far " in text
