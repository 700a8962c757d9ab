"""The trainer as its users run it: outputs, resuming, signals, failures, several ranks."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import training as training_module
from imagenet_cli import (
    IMAGENET,
    TINY,
    assert_same_parameters,
    command,
    environment,
    find_mpiexec,
    parameters,
)
from PIL import Image
from training import SAME_SIGNAL, Stop

SUMMARY_KEYS = {
    "ranks",
    "iterations_per_second",
    "loss_first",
    "loss_last",
    "val_accuracy",
    "bytes_out",
    "bytes_in",
    "peak_bytes",
    "in_core_peak_bytes",
    "limit_bytes",
}


def test_run_without_data_trains_on_digits_and_leaves_its_results(train, tmp_path):
    out = tmp_path / "out"
    done = train(*TINY, "-i", 12, "-B", 16, "-b", 180, "-o", out, "--test")
    assert "no GPU found: NumPy" in done.stdout
    assert "1437 training and 360 validation images" in done.stdout
    for column in ("epoch", "iteration", "main/loss", "validation/main/accuracy", "lr"):
        assert column in done.stdout
    assert "12/12" in done.stdout  # the progress bar
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() == SUMMARY_KEYS
    assert summary["ranks"] == 1
    assert summary["bytes_out"] == summary["bytes_in"] == 0
    assert summary["iterations_per_second"] > 0
    assert 50 << 20 < summary["peak_bytes"] < 2 << 30
    log = json.loads((out / "log").read_text())
    assert [entry["iteration"] for entry in log] == [10, 12]  # --test, and the end
    assert summary["val_accuracy"] == pytest.approx(log[-1]["validation/main/accuracy"])
    for name in ("loss.png", "accuracy.png"):
        with Image.open(out / name) as image:
            assert image.size == (768, 480)
    assert (out / "snapshot_iter_12" / "trainer.npz").is_file()


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_run_ends_with_the_same_parameters(train, lists, tmp_path, ranks):
    a, b = tmp_path / "a", tmp_path / "b"
    # 20 images, batches of 4: with one rank epochs end at 5 and 10, with two at 2.5, 5, …
    train(*lists.args, *TINY, "-i", 8, "-o", a, ranks=ranks)
    train(*lists.args, *TINY, "-i", 3, "-o", b, ranks=ranks)
    done = train(*lists.args, *TINY, "-i", 8, "-o", b, "-r", b / "snapshot_iter_3", ranks=ranks)
    assert "at iteration 3" in done.stdout
    assert_same_parameters(parameters(a, 8), parameters(b, 8))
    losses = [json.loads((x / "summary.json").read_text())["loss_first"] for x in (a, b)]
    assert losses[0] == losses[1]  # the history came back, too
    assert len(list(b.glob("snapshot_iter_*"))) <= 3


def test_loader_processes_give_the_same_parameters(train, lists, tmp_path):
    train(*lists.args, *TINY, "-i", 7, "-o", tmp_path / "a")
    train(*lists.args, *TINY, "-i", 7, "-o", tmp_path / "b", "-j", 2)
    assert_same_parameters(parameters(tmp_path / "a", 7), parameters(tmp_path / "b", 7))


def test_initmodel_starts_from_the_file(train, lists, tmp_path):
    train(*lists.args, *TINY, "-i", 1, "-o", tmp_path / "a")
    model = tmp_path / "a" / "model_iter_1"
    other = ["--seed", 5, "--initmodel", model, "-o", tmp_path / "b"]
    done = train(*lists.args, *TINY, "-i", 1, *other)
    assert f"parameters from {model}" in done.stdout
    # One step of a learning rate of 0.01 away, while another seed's initialization is not.
    first, second = parameters(tmp_path / "a", 1), parameters(tmp_path / "b", 1)
    name = "mlpconv2/1/W"
    assert abs(first[name] - second[name]).max() < 0.05 < abs(first[name]).max()
    done = train(
        *lists.args, "-a", "resnet50", "-is", 32, "--initmodel", model, "-o", tmp_path, status=2
    )
    assert re.fullmatch(r"train.py: error: --initmodel \S+: is of another model.*\n", done.stderr)


def test_validation_says_the_same_on_any_number_of_ranks(train, lists, tmp_path):
    # Half of the labels are not those of the colours, so that no figure is 0 or 1.
    lines = [f"val {i}.jpg {label}\n" for i in range(6) for label in (i % 3, i)]
    lists.val.write_text("".join(lines))
    train(*lists.args, *TINY, "--nclasses", 7, "-i", 5, "-o", tmp_path / "model")
    # A step that is zero in float32: all validate the same parameters.
    same = ["--initmodel", tmp_path / "model" / "model_iter_5", "--lr", 1e-300, "-i", 1]
    results = []
    for ranks in (1, 2, 4):
        out = tmp_path / f"{ranks}"
        train(*lists.args, *TINY, "--nclasses", 7, *same, "-o", out, ranks=ranks)
        assert_same_parameters(parameters(tmp_path / "model", 5), parameters(out, 1))
        log = json.loads((out / "log").read_text())
        results.append({k: v for k, v in log[-1].items() if k.startswith("validation/")})
    names = {"loss", "accuracy", "top5", "mAP"}
    assert results[0].keys() == {f"validation/main/{name}" for name in names}
    assert 0.1 < results[0]["validation/main/mAP"] < 0.9
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-6)


@pytest.fixture
def start(tmp_path):
    """Starts endless runs; at the end of the test none of their processes is left."""
    groups = set()

    def run(args, ranks, script=IMAGENET / "train.py", ready=rb"\b[1-9]\d*/100000", times=1):
        """Waits until the log says ``times`` that it is ready; returns the process, its ranks and the log."""
        log = tmp_path / "log.txt"
        with open(log, "wb") as f:
            process = subprocess.Popen(
                command([*args, "-i", "100000"], ranks, script),
                env=environment(),
                stdout=f,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Under nohup the tests ignore it, and so would the run.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            )
        groups.add(process.pid)
        deadline = time.monotonic() + 60
        while len(re.findall(ready, log.read_bytes())) < times:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        members = {}
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                groups.add(os.getpgid(child.pid))  # mpiexec gives each rank one of its own
                # From Python 3.14 on the server of its loaders has the rank's arguments, too.
                if str(script) in child.cmdline()[:2] and "PMI_RANK" in child.environ():
                    members[int(child.environ()["PMI_RANK"])] = child
        return process, members, log

    yield run
    for process in running(groups):
        with contextlib.suppress(psutil.Error):
            for one in [*process.children(recursive=True), process]:
                one.kill()


def finish(process, log):
    try:
        return process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        pytest.fail("the run did not stop\n" + log.read_text())


@pytest.mark.parametrize(
    ("number", "iterator"),
    [
        (signal.SIGINT, "serial"),
        (signal.SIGTERM, "process"),
        (signal.SIGHUP, "thread"),
        (signal.SIGUSR1, "process"),
        (signal.SIGUSR2, "serial"),
    ],
)
def test_signal_to_the_group_leaves_a_snapshot_that_continues(
    train, start, lists, tmp_path, number, iterator
):
    args = [*lists.args, *TINY, "-o", str(tmp_path / "out"), "--iterator", iterator, "-j", "1"]
    process, _, log = start(args, 1)
    os.killpg(process.pid, number)
    assert finish(process, log) == 128 + number
    assert_nothing_runs([process.pid])
    match = re.search(r"stopped by signal \d+ at iteration (\d+); continue with --resume (\S+)",
                      log.read_text())  # fmt: skip
    assert match, log.read_text()
    assert "Traceback" not in log.read_text()
    if number in (signal.SIGINT, signal.SIGTERM):
        done = train(*args, "-i", int(match[1]) + 1, "-r", match[2])
        assert f"at iteration {match[1]}" in done.stdout


def running(groups):
    """Returns the processes of these groups, without those that only nobody has waited for."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def assert_nothing_runs(groups):
    """Fails if processes of these groups are left a while after the run's end."""
    deadline = time.monotonic() + 10
    while left := running(groups):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.mpi
def test_sigterm_to_every_process_of_two_ranks_with_loaders(start, lists, tmp_path):
    args = [*lists.args, *TINY, "-o", str(tmp_path / "out"), "--iterator", "process", "-j", "2"]
    process, ranks, log = start(args, 2)
    family = [child for rank in ranks.values() for child in [rank, *rank.children(recursive=True)]]
    # The rank, the resource tracker, the server of its loaders, and two of them.
    assert len(family) >= 2 * (1 + 1 + 1 + 2)
    for child in family:
        child.send_signal(signal.SIGTERM)
    assert finish(process, log) == 128 + signal.SIGTERM
    assert_nothing_runs({process.pid, *(rank.pid for rank in ranks.values())})
    assert re.search(r"stopped by signal 15 at iteration \d+; continue with", log.read_text())
    assert "Traceback" not in log.read_text()


WAITING = """
import os, sys, time
sys.path.insert(0, {folder!r})
import train, training
update = training.Updater.update_core
def waiting(self):
    update(self)
    if self._world.rank == self._world.size - 1:  # the others wait in MPI
        time.sleep(600)
training.Updater.update_core = waiting
if __name__ == "__main__":
    listen = training.Stop.listen
    def listening(self):
        listen(self)
        print("listening", flush=True)
    training.Stop.listen = listening
    sys.exit(train.main())
"""


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_signal_ends_at_once_whatever_the_ranks_wait_for(start, lists, tmp_path, ranks):
    script = tmp_path / "script.py"
    script.write_text(WAITING.format(folder=str(IMAGENET)))
    args = [*lists.args, *TINY, "-o", str(tmp_path / "out")]
    process, _, log = start(args, ranks, script, rb"listening", ranks)
    process.send_signal(signal.SIGTERM)
    time.sleep(SAME_SIGNAL + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    assert finish(process, log) == 128 + signal.SIGTERM
    assert time.monotonic() - sent < 20
    assert_nothing_runs([process.pid])
    assert "train.py: interrupted" in log.read_text()


def test_two_deliveries_of_one_signal_are_one(monkeypatch):
    ended, now = [], [0.0]
    monkeypatch.setattr(training_module, "end_at_once", ended.append)
    monkeypatch.setattr(training_module.time, "monotonic", lambda: now[0])
    stop = Stop(1, 0)
    for now[0], number in ((5.0, 15), (5.1, 15), (5.9, 2)):
        stop.receive(number)
    assert (stop.received, ended) == (15, [])
    now[0] = 6.5
    stop.receive(signal.SIGUSR1)
    assert (stop.received, ended) == (15, [signal.SIGUSR1])


def test_sigterm_to_one_rank_stops_all_with_one_snapshot(train, start, lists, tmp_path):
    args = [*lists.args, *TINY, "-o", str(tmp_path / "out")]
    process, ranks, log = start(args, 2)
    assert sorted(ranks) == [0, 1]
    ranks[1].send_signal(signal.SIGTERM)
    assert finish(process, log) != 0
    match = re.search(r"iteration (\d+); continue with --resume (\S+)", log.read_text())
    assert match, log.read_text()
    train(*args, "-i", int(match[1]) + 1, "-r", match[2], ranks=2)


def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path):
    for loaded in ("_multiarray_umath", "PIL"):  # early and late in the imports
        with open(tmp_path / "err", "w+b") as f:
            process = subprocess.Popen(command(["-o", str(tmp_path)]), env=environment(),
                                       stdout=subprocess.DEVNULL, stderr=f)  # fmt: skip
            while loaded not in (maps := Path(f"/proc/{process.pid}/maps").read_text()):
                assert process.poll() is None, maps
                time.sleep(0.005)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 128 + signal.SIGINT
            f.seek(0)
            assert f.read() == b"train.py: interrupted\n"


@pytest.mark.skipif(find_mpiexec() is None, reason="no mpiexec")
def test_several_ids_start_the_ranks(train, lists, tmp_path):
    pytest.importorskip("mpi4py")
    done = train(*lists.args, *TINY, "-i", 1, "-o", tmp_path / "out", "--gpu", -1, -1)
    assert (
        "2 ranks, 1 thread(s) each; NumPy and the naive communicator (--gpu -1 -1)" in done.stdout
    )
    environment = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert environment["ranks"] == 2
    assert environment["versions"]["numpy"]
    assert re.fullmatch(r"MPICH.*|Open MPI.*|Intel.*|MVAPICH.*", environment["versions"]["mpi"])


def test_exception_in_one_rank_ends_all_with_its_traceback(lists, tmp_path):
    script = Path(__file__).with_name("failing_rank.py")
    done = subprocess.run(
        command([*lists.args, *TINY, "-i", "1000", "-o", str(tmp_path)], 2, script),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "RuntimeError: a defect in one rank" in done.stderr
    assert "in failing_update" in done.stderr
    assert "rank 1 failed" in done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_image_ends_with_one_line_and_keeps_what_was_trained(train, lists, tmp_path, ranks):
    # The last image that the first epoch reads cannot be: iterations come before it.
    good = (lists.root / "train 7.jpg").read_bytes()
    (lists.root / "train 7.jpg").write_bytes(good[: len(good) // 2])
    out = tmp_path / "out"
    done = train(*lists.args, *TINY, "-B", 1, "-E", 1, "-o", out, ranks=ranks, status=2)
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert re.match(r"train.py: error: image \S+train 7.jpg: cannot be decoded", lines[0])
    assert "Traceback" not in done.stderr
    snapshots = list(out.glob("snapshot_iter_*"))
    assert len(snapshots) == 1
    # Repaired, the run continues and ends like one that never met the bad image.
    (lists.root / "train 7.jpg").write_bytes(good)
    train(*lists.args, *TINY, "-B", 1, "-E", 1, "-o", out, "-r", snapshots[0], ranks=ranks)
    train(*lists.args, *TINY, "-B", 1, "-E", 1, "-o", tmp_path / "whole", ranks=ranks)
    iteration = 20 // ranks
    assert_same_parameters(parameters(out, iteration), parameters(tmp_path / "whole", iteration))


def test_bad_image_in_a_loader_process_or_in_validation(train, lists, tmp_path):
    (lists.root / "val 4.jpg").write_bytes(b"")
    done = train(*lists.args, *TINY, "-i", 2, "-j", 1, "-o", tmp_path / "out", status=2)
    assert "train.py: error: image" in done.stderr
    assert "val 4.jpg" in done.stderr
    assert (tmp_path / "out" / "snapshot_iter_2").is_dir()
    (lists.root / "train 7.jpg").unlink()
    done = train(*lists.args, *TINY, "-E", 1, "-j", 1, "-o", tmp_path / "out", status=2)
    assert "train 7.jpg: no such file" in done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_input_is_one_line_and_status_2(train, lists, tmp_path, ranks):
    out = ["-o", tmp_path / "out"]

    def error(*args):
        lines = train(*out, *args, ranks=ranks, status=2).stderr.splitlines()
        assert len([line for line in lines if line.startswith("train.py: error:")]) == 1
        return "\n".join(lines)

    missing = [str(lists.train), str(tmp_path / "none.txt"), *lists.args[2:]]
    assert "none.txt: No such file" in error(*missing, *TINY)
    assert "--out /proc: cannot write into this folder" in error(*lists.args, *TINY, "-o", "/proc")
    taken = tmp_path / "out" / "config.resolved.yaml"  # which rank 0 alone writes
    taken.mkdir(parents=True)
    assert "config.resolved.yaml: cannot be written" in error(*lists.args, *TINY)
    if ranks == 2:
        return
    assert "--batchsize 1000000000000: so many" in error(*lists.args, *TINY, "-B", 10**12)
    model = error(*lists.args, *TINY, "--initmodel", lists.train)
    assert "train.txt: damaged, or not a file of this model (not an archive of arrays" in model
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "empty.txt: no images in it; give" in error(lists.train, empty, *lists.args[2:], *TINY)
    lines = error(*lists.args[:4], "-m", lists.train, *TINY)
    assert "train.txt: not a .npy file of numbers; make one with compute_mean.py" in lines
    assert "nin takes 39 or more" in error(*lists.args, *TINY, "-is", 38)
    assert "45x45 pixels are less than --insize 46" in error(*lists.args, *TINY, "-is", 46)
    assert "not a snapshot" in error(*lists.args, *TINY, "-r", tmp_path)
    assert "--gpu 0" in error(*lists.args, *TINY, "-g", 0)
    assert "--ooc-limit: " in error(*lists.args, *TINY, "--ooc", "--ooc-limit", "8 gigs")
    assert "--communicator flat" in error(*lists.args, *TINY, "--communicator", "flat")


def test_resuming_another_run_is_an_error(train, lists, tmp_path):
    train(*lists.args, *TINY, "-i", 1, "-o", tmp_path)
    snapshot = tmp_path / "snapshot_iter_1"
    done = train(*lists.args, *TINY, "-r", snapshot, "-o", tmp_path, ranks=2, status=2)
    assert "was made with ranks 1, this run has 2" in done.stderr
    with open(snapshot / "trainer.npz", "r+b") as f:
        f.truncate(1000)
    done = train(*lists.args, *TINY, "-r", snapshot, "-o", tmp_path, status=2)
    assert "trainer.npz: damaged; continue from another snapshot" in done.stderr


def test_out_of_core_ranks_end_with_the_same_parameters(train, lists, tmp_path):
    for name, options in (("a", []), ("b", ["--ooc", "--ooc-limit", "1MiB"])):
        train(*lists.args, *TINY, "-i", 4, "-o", tmp_path / name, *options, ranks=2)
    assert_same_parameters(parameters(tmp_path / "a", 4), parameters(tmp_path / "b", 4))
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert summary["bytes_in"] > 0
    assert summary["bytes_out"] > 0
    assert summary["limit_bytes"] == 1 << 20
    shutil.rmtree(tmp_path / "a")


@pytest.mark.slow
def test_out_of_core_on_digits_stays_below_the_measured_in_core_peak(train, tmp_path):
    # Large enough that activations are most of the peak: 60 % of it holds the rest.
    args = ["-a", "googlenetbn", "-is", 64, "-B", 48, "-b", 15, "-i", 2, "-o", tmp_path]
    done = train(*args, "--ooc")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["in_core_peak_bytes"] * 0.64 == pytest.approx(summary["limit_bytes"], abs=1)
    assert "(measured); limit" in done.stdout
    assert summary["bytes_out"] > 0
    assert summary["bytes_in"] > 0
    assert summary["peak_bytes"] < 0.75 * summary["in_core_peak_bytes"]
