"""Snapshots survive ranks that die at any moment, and a run continues from them bit for bit."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import tracemalloc
import zlib
from pathlib import Path

import chainer
import chainer.links as L
import numpy
import psutil
import pytest
import snapshot_files
import snapshots
import training as training_module
from chainer import iterators, training
from errors import InputError
from imagenet_cli import TINY, assert_same_parameters, command, environment, parameters
from snapshot_files import find_snapshots
from snapshots import RankState, Snapshots
from world import World

META = {"arch": "test", "ranks": 1}


class Trained:
    """A trainer of one rank whose state changes with every update."""

    def __init__(self, out, keep=2, meta=META):
        self.model = L.Classifier(L.Linear(3, 2))
        optimizer = chainer.optimizers.MomentumSGD().setup(self.model)
        x = numpy.arange(30, dtype=numpy.float32).reshape(10, 3) / 30
        data = chainer.datasets.TupleDataset(x, numpy.arange(10, dtype=numpy.int32) % 2)
        iterator = iterators.SerialIterator(data, 2)
        updater = training.updaters.StandardUpdater(iterator, optimizer)
        self.trainer = training.Trainer(updater, (100, "iteration"), out)
        self.trainer._start_at = time.time()  # as run() sets it
        state = RankState(iterator, self.model)
        self.snapshots = Snapshots(World(), out, state, meta, 0, False, keep)

    def update(self, n):
        for _ in range(n):
            self.trainer.updater.update()

    def parameters(self):
        return {name: p.array.copy() for name, p in self.model.namedparams()}


class Death(BaseException):
    """Stands for SIGKILL: nothing of the process runs after it."""


def test_a_snapshot_s_checksum_takes_little_memory(tmp_path):
    """Out of core it has a limit, and is announced to nobody."""
    path = tmp_path / "trainer.npz"
    path.write_bytes(bytes(range(256)) * (1 << 15))  # 8 MiB
    tracemalloc.start()
    try:
        found = snapshot_files.fingerprint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [1 << 23, zlib.crc32(path.read_bytes())]
    assert peak < 1 << 20


def test_a_full_disk_keeps_the_snapshot_before_and_gets_its_room_back(tmp_path, monkeypatch):
    run = Trained(tmp_path)
    run.update(1)
    run.snapshots(run.trainer)
    run.update(1)

    def write(path, target):
        path.write_bytes(b"as much as there is room for")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshots, "write_npz", write)
    with pytest.raises(
        InputError, match=r"\(No space left on device\); free space .*--resume auto"
    ):
        run.snapshots(run.trainer)
    assert os.listdir(tmp_path) == ["snapshot_iter_1"]


def test_a_full_disk_elsewhere_is_one_line(tmp_path, monkeypatch, capsys):
    import train

    class Run:
        def __init__(self, *args):
            pass

        def main(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.argv", ["train.py", "-g", "-1", "-o", str(tmp_path)])
    monkeypatch.setattr(train, "Run", Run)
    ended = []
    monkeypatch.setattr(
        train.world_module, "abort", ended.append
    )  # MPI may have been imported here
    assert train.main() == 2
    assert ended == [2]
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: error: --out {tmp_path}: No space left on device; free")
    assert error.count("\n") == 1


def test_death_at_any_step_of_writing_leaves_a_complete_snapshot(tmp_path, monkeypatch):
    survived = 0
    for moment in range(40):
        out = tmp_path / str(moment)
        out.mkdir()
        run = Trained(out, keep=1)
        states = {}
        for iteration in (1, 2):
            run.update(1)
            run.snapshots(run.trainer)
            states[iteration] = run.parameters()
        run.update(1)
        states[3] = run.parameters()

        calls = {"left": moment}

        def deadly(function, calls=calls):
            def call(*args, **kwargs):
                if calls["left"] == 0:
                    raise Death
                calls["left"] -= 1
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            # Every way in which the files' state changes, and the writing of each file.
            for module, name in ((os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"),
                                 (os, "fsync"), (snapshot_files, "fingerprint"),
                                 (snapshots.json, "dumps"),
                                 (chainer.serializers, "save_npz")):  # fmt: skip
                patch.setattr(module, name, deadly(getattr(module, name)))
            try:
                run.snapshots(run.trainer)
                survived += 1
            except Death:
                pass
        again = Trained(out, keep=1)
        path, damaged = again.snapshots.load_latest(again.trainer)
        assert path is not None
        assert damaged == []
        iteration = again.trainer.updater.iteration
        assert iteration in (2, 3)
        for name, value in states[iteration].items():
            numpy.testing.assert_array_equal(again.parameters()[name], value)
        assert not list(out.glob(".snapshot*")), "what the dead one left was not removed"
        if survived == 2:
            return
    pytest.fail("writing has more steps than were tried")


def test_damaged_snapshots_are_passed_over(tmp_path):
    run = Trained(tmp_path, keep=0)
    for _ in range(4):
        run.update(1)
        run.snapshots(run.trainer)
    assert [p.name[-1] for p in find_snapshots(tmp_path)] == ["4", "3", "2", "1"]
    (tmp_path / "snapshot_iter_4" / "rank_0.npz").unlink()
    with open(tmp_path / "snapshot_iter_3" / "trainer.npz", "r+b") as f:
        f.seek(300)
        byte = f.read(1)
        f.seek(300)
        f.write(bytes([byte[0] ^ 1]))
    again = Trained(tmp_path)
    path, damaged = again.snapshots.load_latest(again.trainer)
    assert path == tmp_path / "snapshot_iter_2"
    assert len(damaged) == 2
    assert "rank_0.npz: damaged" in damaged[0]
    assert "trainer.npz: damaged" in damaged[1]
    with pytest.raises(InputError, match=r"trainer\.npz: damaged"):
        again.snapshots.load(again.trainer, tmp_path / "snapshot_iter_3")


def test_keeps_the_latest_also_of_the_run_that_it_continues(tmp_path):
    run = Trained(tmp_path, keep=2)
    for _ in range(3):
        run.update(1)
        run.snapshots(run.trainer)
    again = Trained(tmp_path, keep=2)
    again.snapshots.load_latest(again.trainer)
    again.update(1)
    again.snapshots(again.trainer)
    assert [p.name[-1] for p in find_snapshots(tmp_path)] == ["4", "3"]


def test_another_run_is_an_error_even_with_auto(tmp_path):
    run = Trained(tmp_path)
    run.update(1)
    run.snapshots(run.trainer)
    other = Trained(tmp_path, meta={**META, "arch": "other"})
    with pytest.raises(InputError, match="was made with arch test, this run has other"):
        other.snapshots.load_latest(other.trainer)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert Trained(empty).snapshots.load_latest(run.trainer) == (None, [])


def ranks_of(process):
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "train.py" in " ".join(child.cmdline()) and "PMI_RANK" in child.environ():
                found[int(child.environ()["PMI_RANK"])] = child
    return found


def kill_one(args, out, rng, log, after):
    """Starts two ranks and kills one of them some time after a new snapshot is there."""
    before = set(find_snapshots(out))
    with open(log, "ab") as f:
        process = subprocess.Popen(
            command(args, 2), env=environment(), stdout=f, stderr=f, start_new_session=True
        )
    deadline = time.monotonic() + 90
    while not set(find_snapshots(out)) - before:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    time.sleep(rng.uniform(0, after))
    ranks = ranks_of(process)
    if ranks:  # else it was done already
        rng.choice(list(ranks.values())).send_signal(signal.SIGKILL)
    try:
        return process.wait(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def check_killed(train, lists, tmp_path, times, iterations, after, rng):
    fixed = [*lists.args, *TINY, "-i", str(iterations), "--snapshot-iterations", "2"]
    out = tmp_path / "killed"
    args = [*fixed, "-o", str(out), "--resume", "auto"]
    statuses = [kill_one(args, out, rng, tmp_path / "log.txt", after) for _ in range(times)]
    assert any(statuses), "no run was killed"
    done = train(*args, ranks=2)
    assert "resumed from" in done.stdout
    summary = (out / "summary.json").read_text()
    assert f"the training is done: {iterations} iterations" in train(*args, ranks=2).stdout
    assert (out / "summary.json").read_text() == summary
    train(*fixed, "-o", tmp_path / "whole", ranks=2)
    assert_same_parameters(parameters(tmp_path / "whole", iterations), parameters(out, iterations))
    histories = [json.loads((tmp_path / x / "log").read_text()) for x in ("whole", "killed")]
    for a, b in zip(*histories, strict=True):
        for key in ("iteration", "main/loss", "validation/main/loss"):
            assert a.get(key) == b.get(key)


@pytest.mark.slow
def test_killed_rank_and_resume_auto_end_like_a_run_that_was_never_killed(train, lists, tmp_path):
    check_killed(train, lists, tmp_path, 1, 30, 0.5, random.Random(0))


KILLED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import reports, train
def finish(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
reports.Reports.finish = finish
if __name__ == "__main__":
    sys.exit(train.main())
"""


def test_a_run_killed_before_its_reports_gets_them_with_resume(train, lists, tmp_path):
    out, script = tmp_path / "out", tmp_path / "killed.py"
    script.write_text(KILLED.format(folder=str(Path(training_module.__file__).parent)))
    args = [*lists.args, *TINY, "-i", "2", "-o", out]
    train(*args, script=script, status=-signal.SIGKILL)
    assert (out / "model_iter_2").exists()
    results = ["summary.json", "report.md", "loss.png", "accuracy.png", "lr.png", "memory.png",
               "time.png", "confusion/iter_2.png"]  # fmt: skip
    assert not any((out / name).exists() for name in results)

    def times():
        return {name: (out / name).stat().st_mtime_ns for name in [*results, "model_iter_2"]}

    done = train(*args, "--resume", "auto").stdout
    assert "the training is done: 2 iterations" in done
    assert "summary: 1 rank" in done
    summary = json.loads((out / "summary.json").read_text())
    assert summary["iterations_per_second"] > 0
    assert summary["loss_first"] > 0
    report = (out / "report.md").read_text()
    assert "| iterations | 2 (2 in this process) |" in report
    assert "| images per second |" in report
    assert "![iter_2](confusion/iter_2.png)" in report
    before = times()
    assert "summary" not in train(*args, "--resume", "auto").stdout
    assert times() == before
    # What an earlier, shorter training left is replaced; what is missing is written.
    os.utime(out / "summary.json", ns=(0, 0))
    (out / "model_iter_2").unlink()
    assert "summary: 1 rank" in train(*args, "--resume", "auto").stdout
    again = json.loads((out / "summary.json").read_text())
    assert {**again, "peak_bytes": 0} == {**summary, "peak_bytes": 0}  # drawing takes memory, too
    assert (out / "model_iter_2").exists()


def test_the_second_run_in_a_folder_is_refused_until_the_first_is_dead(train, lists, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    args = [*lists.args, *TINY, "-o", str(out), "--snapshot-iterations", "1"]
    with open(log, "wb") as f:
        process = subprocess.Popen(
            command([*args, "-i", "100000"]), env=environment(), stdout=f, stderr=f
        )
    try:
        deadline = time.monotonic() + 90
        while not find_snapshots(out):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        refused = train(*args, "-i", 1, "--resume", "auto", status=2)
        assert refused.stderr.count("\n") == 1
        assert f"host {socket.gethostname()} with pid {process.pid} is writing" in refused.stderr
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    number = int(find_snapshots(out)[0].name.split("_")[-1])
    assert f"at iteration {number}" in train(*args, "-i", number + 1, "--resume", "auto").stdout
    assert not (out / "run.lock").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_many_times(train, lists, tmp_path, seed):
    check_killed(train, lists, tmp_path, 5, 60, 1.0, random.Random(seed))
    shutil.rmtree(tmp_path / "killed")


@pytest.mark.parametrize("policy", [(["--snapshot", "0"], [10]), (["--snapshot", "-1"], [10]),
                                    (["--snapshot-iterations", "4", "--keep-snapshots", "0"],
                                     [4, 8, 10])])  # fmt: skip
@pytest.mark.exhaustive
def test_snapshot_policies(train, lists, tmp_path, policy):
    options, expected = policy
    train(*lists.args, *TINY, "-i", 10, "-o", tmp_path / "out", *options)
    names = {f"snapshot_iter_{n}" for n in expected}
    assert {p.name for p in find_snapshots(tmp_path / "out")} == names


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer", "adam", "--iterator", "thread", "-j", "2", "--weight-decay", "0.001"],
        ["--optimizer", "rmsprop_warmup", "--dtype", "mixed16", "--label-smoothing", "0.1"],
        ["--optimizer", "srsgd", "--restarts", "3", "--dtype", "mixed16", "--ooc", "--ooc-limit",
         "1MiB"],
        ["--optimizer", "radam", "--dtype", "mixed16"],
        ["--optimizer", "adamw", "--dtype", "mixed16", "--ooc", "--ooc-limit", "1MiB"],
        ["--optimizer", "rmsprop", "--iterator", "process", "-j", "2", "--loadtype", "custom"],
        ["--lars", "--lr", "5", "--lr-schedule", "polynomial", "--lr-warmup", "1", "--ooc",
         "--ooc-limit", "1MiB"],
    ],
)  # fmt: skip
def test_every_optimizer_continues_bit_for_bit_on_two_ranks(train, lists, tmp_path, options):
    a, b = tmp_path / "a", tmp_path / "b"
    fixed = [*lists.args, *TINY, *options, "--snapshot", "0"]
    train(*fixed, "-i", 6, "-o", a, ranks=2)
    # The same length, as schedules depend on it; Ctrl-C would come at an unknown iteration.
    stop = tmp_path / "stop.py"
    stop.write_text(STOP.format(folder=str(Path(training_module.__file__).parent)))
    done = train(*fixed, "-i", 6, "-o", b, ranks=2, script=stop, status=143)
    assert "at iteration 3" in done.stdout
    train(*fixed, "-i", 6, "-o", b, "--resume", "auto", ranks=2)
    assert_same_parameters(parameters(a, 6), parameters(b, 6))


STOP = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import train, training
update = training.Updater.update_core
def stopping(self):
    update(self)
    if self.iteration == 2:
        os.kill(os.getpid(), signal.SIGTERM)
training.Updater.update_core = stopping
if __name__ == "__main__":  # loader processes import this, too
    sys.exit(train.main())
"""
