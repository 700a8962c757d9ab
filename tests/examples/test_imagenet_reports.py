"""What a run shows and leaves behind."""

import dataclasses
import fcntl
import itertools
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import chainer
import numpy
import pytest
import reports
from chainer import training
from evaluation import RecomputeStatistics
from imagenet_cli import IMAGENET, TINY, command, environment
from markdown_it import MarkdownIt
from PIL import Image
from reports import final, plots, terminal
from reports.attach import DumpGraph
from reports.confusion import draw_confusion, draw_confusions
from reports.divergence import WarnOfDivergence
from reports.history import History
from reports.progress import Progress, fit
from reports.table import COLUMNS, Table
from reports.units import duration, gibibytes
from training import Stop

import chainer_ooc  # noqa: F401
from chainer_ooc import PlanReport


def trainer_at(iteration: int, out: Path | None = None, **observation: float) -> SimpleNamespace:
    values = {"main/loss": 1.0, "main/accuracy": 0.5, "lr": 0.1}
    values.update({key.replace("_", "/"): value for key, value in observation.items()})
    return SimpleNamespace(
        updater=SimpleNamespace(iteration=iteration), observation=values, out=out
    )


def test_history_keeps_a_bounded_number_of_means():
    history = History(max_points=8)
    losses = numpy.random.default_rng(0).random(101)
    for i, loss in enumerate(losses, 1):
        history(trainer_at(i, main_loss=loss, main_accuracy=loss / 2))
    step = history.iterations_per_point
    assert step == 16
    assert len(history.train) == 7
    for k, (iteration, loss, accuracy, *_) in enumerate(history.train):
        part = losses[k * step : (k + 1) * step]
        assert iteration == min((k + 1) * step, 101)
        assert loss == pytest.approx(part.mean())
        assert accuracy == pytest.approx(part.mean() / 2)
    assert (history.loss_first, history.loss_last) == (losses[0], losses[-1])


def test_history_comes_back_from_a_snapshot_and_goes_on_alike():
    whole, parts = History(max_points=4), History(max_points=4)
    saved: dict[str, str] = {}
    for i in range(1, 30):
        if i == 14:
            parts.serialize(lambda key, value: saved.setdefault(key, value))
            parts = History(max_points=4)
            parts.serialize(lambda key, value: saved[key])
        for history in (whole, parts):
            history(
                trainer_at(i, main_loss=i**0.5, validation_main_loss=1, validation_main_accuracy=i)
            )
    assert parts.train == whole.train
    assert parts.validation == whole.validation
    assert vars(parts) == vars(whole)


ENTRY = {
    "epoch": 12,
    "iteration": 123456,
    "main/loss": 1.23456,
    "validation/main/loss": 1.5,
    "main/accuracy": 0.512345,
    "validation/main/accuracy": 0.498765,
    "lr": 0.00123456,
    "images/s": 1234.5,
    "swapped GiB": 1023.9,
    "peak GiB": 13.75,
}


@pytest.mark.parametrize("width", [200, 140, 100, 80, 79, 60, 40, 25])
def test_table_fits_the_terminal_and_loses_no_figure(capsys, monkeypatch, width):
    monkeypatch.setattr(terminal, "columns", lambda: width)
    log = SimpleNamespace(log=[ENTRY])
    trainer = SimpleNamespace(get_extension=lambda name: log)
    table = Table()
    table(trainer)
    log.log.append({**ENTRY, "iteration": 234567})
    table(trainer)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < width
    text = "\n".join(lines)
    for value in ("12", "123456", "234567", "1.23", "0.512", "0.00123", "1024", "13."):
        assert value in text
    names = tuple(COLUMNS) if width >= 140 else tuple(COLUMNS.values())
    for name in names:
        assert re.sub(r"\s+", " ", text).count(name) >= 1, name
    if width >= 79:
        assert len(lines) == 3  # the heading once


def test_table_without_a_terminal_has_the_names_of_the_log(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "columns", lambda: None)
    log = SimpleNamespace(log=[{key: ENTRY[key] for key in ("epoch", "iteration", "main/loss")}])
    Table()(SimpleNamespace(get_extension=lambda name: log))
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0] == "epoch"
    for name in COLUMNS:
        assert name in heading
    assert row.split() == ["12", "123456", "1.235"]


def figures(**changed: float) -> SimpleNamespace:
    step = {"seconds": 2.0, "data_seconds": 0.5, "images": 64, "swapped_bytes": 3 << 30}
    step = SimpleNamespace(**{**step, **changed})
    return SimpleNamespace(step=step, peak_bytes=5 << 30)


def test_progress_in_a_file_is_ever_rarer_lines(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(terminal, "columns", lambda: None)
    progress = Progress(Stop(1, 1000), 1, figures(), 6 << 30)
    progress.initialize(trainer_at(100))
    for i in range(101, 901):
        now[0] += 1
        progress(trainer_at(i, main_loss=i / 1000))
    progress.finalize()
    lines = capsys.readouterr().out.splitlines()
    done = [int(line.split("/")[0]) for line in lines]
    assert done[0] == 101
    assert done[-1] == 900  # the end is always shown
    assert max(numpy.diff(done)) == 60
    assert len(done) < 25
    assert lines[-1] == (
        "900/1000  13:20<01:40  loss 0.900  32 images/s  peak 5.00 of 6.00 GiB"
        "  swap 3.00 GiB/it  data 25%"
    )
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("width", [160, 80, 50, 30])
def test_progress_bar_fits_the_terminal(capsys, monkeypatch, width):
    monkeypatch.setattr(terminal, "columns", lambda: width)
    progress = Progress(Stop(1, 1000), 1, figures(), 6 << 30)
    progress.initialize(trainer_at(0))
    for i in range(1, 4):
        progress(trainer_at(i, main_loss=2.5))
    progress.finalize()
    states = capsys.readouterr().out.replace("\r", "\n").split("\n")
    assert max(map(len, states)) < width
    assert "loss 2.5" in states[-2] or width == 30
    assert ("data 25%" in states[-2]) == (width == 160)


def test_what_fits():
    assert fit(["loss 1", "a long figure", "x"], 9) == "loss 1  x"
    assert fit(["loss 1"], 5) == ""


def test_units():
    assert [gibibytes(n) for n in (0, 5 << 20, 1 << 30, 12.3 * 2**30, 1234 * 2**30)] == [
        "0 MiB", "5 MiB", "1.00 GiB", "12.3 GiB", "1,234 GiB",
    ]  # fmt: skip
    assert [duration(s) for s in (4.24, 185, 7441)] == ["4.2 s", "3 min 05 s", "2 h 04 min"]


def test_plots_of_a_long_run(tmp_path):
    history = History(SimpleNamespace(**vars(figures(resident_bytes=1 << 30))), max_points=64)
    for i in range(1, 301):
        history(trainer_at(i, main_loss=3 / i**0.3, main_accuracy=1 - 1 / i**0.3))
        if i % 100 == 0:
            history(trainer_at(i, validation_main_loss=1, validation_main_accuracy=0.7))
    written = plots.write_plots(history, tmp_path, 6 << 30, 9 << 30)
    assert [path.name for path in written] == [
        "loss.png", "accuracy.png", "lr.png", "memory.png", "time.png",
    ]  # fmt: skip
    for path in written:
        with Image.open(path) as image:
            assert image.size == (768, 480)
            # axes, grid, and at least one line in colour
            assert (numpy.ptp(numpy.asarray(image.convert("RGB")), axis=2) > 90).sum() > 100
    assert plots.write_plots(History(), tmp_path) == []


def events(folder: Path) -> list[tuple[int, str, float]]:
    """Reads event files: records of length, its checksum, an event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return found


def test_torch_is_not_imported_for_event_files(run_python, tmp_path):
    """Where it is installed, tensorboardX would: memory that a limit has no room for."""
    pytest.importorskip("tensorboardX")
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, pathlib, types\n"
        f"sys.path[:0] = [{str(tmp_path)!r}, {str(IMAGENET)!r}]\n"
        "import chainer_ooc\n"
        "from reports.tensorboard import TensorBoard\n"
        "report = TensorBoard(pathlib.Path(sys.argv[1]), 3, None)\n"
        "report.initialize(types.SimpleNamespace(updater=types.SimpleNamespace(iteration=0)))\n"
        "report.finalize()\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = run_python(script, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out" / "tensorboard").glob("events.out.tfevents.*"))


def shape_of_graph(path: Path) -> tuple[Counter, Counter]:
    """Returns nodes and edges of a graph in DOT language by their labels: ids are addresses."""
    text = path.read_text()
    labels = dict(re.findall(r'(\d+) \[label="([^"]*)"', text))
    edges = re.findall(r"(\d+) -> (\d+);", text)
    return Counter(labels.values()), Counter((labels[a], labels[b]) for a, b in edges)


class Model(chainer.Sequential):
    """Reports its loss and does not keep it, as the trainer's networks."""

    def __call__(self, x, t):
        loss = chainer.functions.softmax_cross_entropy(super().__call__(x), t)
        chainer.report({"loss": loss}, self)
        return loss


def test_the_graph_is_drawn_and_let_go_before_anything_else_takes_memory(tmp_path):
    data = chainer.datasets.TupleDataset(numpy.ones((2, 3), "f"), numpy.zeros(2, "i"))
    model = Model(chainer.links.Linear(3, 2))
    optimizer = chainer.optimizers.SGD().setup(model)
    updater = training.updaters.StandardUpdater(
        chainer.iterators.SerialIterator(data, 2), optimizer
    )
    trainer = training.Trainer(updater, (1, "iteration"), tmp_path)
    loss = []

    def before(trainer):
        loss.append(weakref.ref(trainer.observation["main/loss"].creator_node))
        assert loss[0]() is not None

    def after(trainer):
        assert loss[0]() is None

    trainer.extend(before, trigger=(1, "iteration"), priority=DumpGraph.priority + 1)
    trainer.extend(DumpGraph("main/loss", filename="cg.dot"))
    trainer.extend(after, trigger=(1, "iteration"), priority=RecomputeStatistics.priority)
    trainer.run()
    assert len(loss) == 1
    assert shape_of_graph(tmp_path / "cg.dot")[0]["SoftmaxCrossEntropy"] == 1


@pytest.mark.slow
@pytest.mark.mpi
def test_ranks_out_of_core_leave_every_report_once(train, lists, tmp_path):
    pytest.importorskip("tensorboardX")
    small = [*lists.args, *TINY, "-i", 3, "--test"]
    train(*small, "-o", tmp_path / "in")
    out = tmp_path / "out"
    done = train(*small, "-o", out, "--ooc", "--ooc-limit", "1MiB", ranks=2)
    assert done.stdout.count("summary:") == 1
    assert done.stdout.count("main/accuracy") == 2  # the heading's two columns
    assert done.stdout.count("3/3  ") == 1
    assert re.search(r"3/3  \S+<00:00  loss \S+  \S+ images/s  peak \d+ of 1 MiB", done.stdout)
    # The graph is the one of stock Chainer, though what hangs on it was out of memory.
    nodes, edges = shape_of_graph(out / "cg.dot")
    assert (nodes, edges) == shape_of_graph(tmp_path / "in" / "cg.dot")
    assert nodes["Convolution2DFunction"] == 12
    assert sum(edges.values()) > 60

    log = json.loads((out / "log").read_text())
    assert log[-1]["images/s"] > 0
    assert log[-1]["step s"] > log[-1]["data s"] > 0
    written = events(out / "tensorboard")
    assert [step for step, tag, _ in written if tag == "train/loss"] == [1, 2, 3]
    last = {tag: value for step, tag, value in written if step == 3}
    assert last["validation/accuracy"] == pytest.approx(log[-1]["validation/main/accuracy"])
    assert last["train/lr"] == pytest.approx(0.01)
    assert last["memory/swapped_GiB"] > 0
    assert last["memory/peak_GiB"] == pytest.approx(log[-1]["peak GiB"])

    report = (out / "report.md").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert f"| loss | {summary['loss_first']:.4f} -> {summary['loss_last']:.4f} |" in report
    assert "| ranks | 2 |" in report
    assert "| arch | nin |" in report
    assert "| chainer | 7.8.1 |" in report
    assert "| limit of a rank | 1 MiB |" in report
    assert re.search(r"\| moved out, all ranks \| [1-9]\d* MiB \|", report)
    assert re.search(r"\| storages_in, rank 0 \| [1-9]", report)
    for picture in re.findall(r"!\[\w+\]\((\S+)\)", report):
        assert (out / picture).is_file()
    assert report.count("![") == 6  # the last is the confusion matrix

    # The same plots from the snapshot alone, as for a run that was killed.
    (out / "loss.png").unlink()
    drawn = subprocess.run(
        [sys.executable, str(IMAGENET / "reports"), str(out)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert drawn.stdout.split() == [
        str(out / f"{name}.png") for name in ("loss", "accuracy", "lr", "memory", "time")
    ], drawn.stderr
    assert (out / "loss.png").is_file()


def test_one_warning_when_the_loss_is_no_number_any_more(capsys):
    warn = WarnOfDivergence()
    for iteration, loss in enumerate((2.5, numpy.float32("nan"), float("inf")), start=1):
        updater = SimpleNamespace(iteration=iteration)
        warn(SimpleNamespace(observation={"main/loss": loss}, updater=updater))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: the training loss is nan in iteration 2; stop it with Ctrl-C")


@pytest.mark.parametrize("n", [3, 20, 21])
def test_confusion_pictures_of_a_run_are_those_of_single_matrices(tmp_path, monkeypatch, n):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rng = numpy.random.default_rng(0)
    matrices = [rng.integers(0, 30, (n, n)) * rng.integers(0, 2, (n, n)) for _ in range(3)]
    (tmp_path / "confusion").mkdir()
    for i, matrix in enumerate(matrices):
        numpy.savez(tmp_path / "confusion" / f"iter_{i}.npz", confusion=matrix)
    layouts = []
    draw = FigureCanvasAgg.draw
    monkeypatch.setattr(FigureCanvasAgg, "draw", lambda self: layouts.append(0) or draw(self))
    assert draw_confusions(tmp_path) == [tmp_path / "confusion" / "iter_2.png"]
    assert len(layouts) == 1  # it takes most of the time of a picture
    pixels = []
    for i, matrix in enumerate(matrices):
        draw_confusion(matrix, tmp_path / "alone.png")
        both = [
            numpy.asarray(Image.open(path))
            for path in (tmp_path / "confusion" / f"iter_{i}.png", tmp_path / "alone.png")
        ]
        numpy.testing.assert_array_equal(*both)
        pixels.append(both[0])
    assert (pixels[0] != pixels[1]).any()


def test_the_confusion_matrix_of_each_validation_is_kept_and_drawn_once(tmp_path):
    assert draw_confusions(tmp_path) == []
    validation = SimpleNamespace(confusion=None)
    keep = reports.KeepConfusion(tmp_path, validation)
    trainer = SimpleNamespace(updater=SimpleNamespace(iteration=5))
    keep(trainer)  # of a model that does not show its scores
    assert draw_confusions(tmp_path) == []
    for iteration in (5, 10):
        trainer.updater.iteration = iteration
        validation.confusion = iteration * numpy.eye(3, dtype=numpy.int64)
        keep(trainer)
    folder = tmp_path / "confusion"
    assert draw_confusions(tmp_path) == [folder / "iter_10.png"]
    with numpy.load(folder / "iter_5.npz") as f:
        numpy.testing.assert_array_equal(f["confusion"], 5 * numpy.eye(3))
    times = [(folder / f"iter_{n}.png").stat().st_mtime_ns for n in (5, 10)]
    later = max(times) + 1
    os.utime(folder / "iter_10.npz", ns=(later, later))  # as of a new run in the same folder
    draw_confusions(tmp_path)
    again = [(folder / f"iter_{n}.png").stat().st_mtime_ns for n in (5, 10)]
    assert again[0] == times[0] and again[1] > times[1]


def test_plots_of_no_result_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no snapshot_iter_N in this folder"):
        plots.load_history(tmp_path)


@pytest.mark.slow
@pytest.mark.mpi
def test_on_a_terminal_no_line_is_wider_than_it(lists, tmp_path):
    """Runs under mpiexec on a terminal of 64 columns; the launcher's terminal is the one."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 64, 0, 0))
    args = [*lists.args, *TINY, "-i", "4", "-o", "out"]
    process = subprocess.Popen(
        command(args, ranks=2),
        cwd=tmp_path,
        env=environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the last one closed it
            break
        if not data:
            break
        output += data
    os.close(ours)
    assert process.wait(60) == 0, output.decode()
    text = output.decode()
    states = re.split(r"[\r\n]+", text[text.index("images per rank and iteration") :])[1:]
    states = states[: next(i for i, state in enumerate(states) if state.startswith("summary:"))]
    assert any("4/4" in state and "loss" in state for state in states)
    assert any(state.startswith("epoch") for state in states)
    assert max(map(len, states)) < 64


@pytest.mark.parametrize(("rank", "expected"), [(0, 9), (1, 1)])
def test_one_call_attaches_all_on_rank_0_and_the_exchange_on_others(tmp_path, rank, expected):
    pytest.importorskip("tensorboardX")
    added = []
    made = reports.extensions(
        out=tmp_path,
        world=SimpleNamespace(rank=rank, size=2),
        stop=Stop(1, 0),
        gpu=False,
        batchsize=4,
        iterations_per_epoch=2.5,
        every=lambda: (1, "epoch"),
    )
    made.attach(SimpleNamespace(extend=lambda extension, **k: added.append(extension)))
    assert len(added) == expected
    assert made.synchronize in added


def test_the_report_tells_what_was_planned_and_what_came_of_it():
    plan = PlanReport(
        *("RAM", "abc", 12, 3, 2, 1, 3 << 20, 2 << 20, 1 << 20, 2 << 20, 2 << 20),
        *(1.5, 2.0, 1.75, 900 << 20, 3.0, (2.5, 2.25), (800 << 20, 850 << 20), True),
    )
    rows = dict(final._plan([plan]))
    assert rows["swapped"] == "2 arrays, 2 MiB"
    assert rows["iteration, foreseen"] == "2 s; no schedule below 1.75 s"
    assert rows["iteration, measured"] == "2.25 s, the best of 2"
    assert (rows["peak, foreseen"], rows["peak, measured"]) == ("900 MiB", "850 MiB")
    assert rows["followed"] == "yes"
    # Below the floor no schedule exists, and so no bound of its time.
    for bound in (None, 27.0):
        rows = dict(final._plan([dataclasses.replace(plan, bound_seconds=bound, followed=False)]))
        assert "does not fit below the limit" in rows["iteration, foreseen"]
    assert rows["followed"] == "no: on demand was faster"
    assert final._plan([]) == []


def test_names_in_a_report_are_only_shown(tmp_path, train):
    out = tmp_path / "a|b](c) <b>`*x*`\n```\n# no title"
    args = (
        "--dataset",
        "digits",
        "-a",
        "preresnet11",
        "-is",
        "8",
        "-B",
        "4",
        "-b",
        "360",
        "-i",
        "1",
    )
    train(*args, "-g", "-1", "-o", out)
    tokens = MarkdownIt("commonmark").enable("table").parse((out / "report.md").read_text())
    titles = [b.content for a, b in itertools.pairwise(tokens) if a.type == "heading_open"]
    assert titles[0].startswith("Training report: a\\|b\\](c) \\<b>") and "no title" in titles[0]
    assert titles[1:] == ["Outcome", "Time", "Memory", "Configuration", "Versions"]
    assert [t.type for t in tokens].count("fence") == 1
    kinds = {child.type for token in tokens for child in token.children or ()}
    assert kinds <= {"text", "text_special", "image", "softbreak"}
