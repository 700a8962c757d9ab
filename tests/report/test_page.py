"""The report of a run: what it says is what the trace says, and a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import chainer
import chainer.functions as F
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc.__main__ import main
from chainer_ooc.report.page import write_report
from chainer_ooc.report.page_data import RunError, read_run
from chainer_ooc.report.page_figures import compared, headline, stalls, storages

MIB = 1 << 20


def span(category, name, start, end, **args):
    """An event of the trace; times in milliseconds."""
    return {
        "ph": "X", "pid": 0, "tid": 1, "cat": category, "name": name,
        "ts": start * 1e3, "dur": (end - start) * 1e3, "args": args,
    }  # fmt: skip


def iteration(t, copies=True):
    """A convolution and a ReLU <b>, forward and backward, in 100 ms from ``t`` on."""
    events = [
        span("forward", "Conv", t, t + 20),
        span("forward", "ReLU <b>", t + 20, t + 30),
        span("backward", "ReLU <b>", t + 40, t + 60),
        # Inside the one above: not a function of the iteration.
        span("forward", "ReLUGrad", t + 45, t + 50),
        span("backward", "Conv", t + 65, t + 95),
    ]
    if copies:
        events += [
            span("copy out", "Conv", t + 21, t + 35, bytes=6 * MIB, storage=1),
            span("copy out", "ReLU <b>", t + 35, t + 39, bytes=2 * MIB, storage=2),
            span("copy in", "Conv", t + 55, t + 64, bytes=6 * MIB, storage=1),
            span("stall", "fetch", t + 60, t + 64),
            span("stall", "room", t + 30, t + 31),
        ]
    return events


@pytest.fixture
def run(tmp_path):
    """A folder of a run of four iterations, 100 ms each, the first without copies."""
    events = [event for n in range(4) for event in iteration(100 * n, copies=n > 0)]
    events += [
        {
            "ph": "C",
            "pid": 0,
            "name": "memory, RAM",
            "ts": 5e3 * n,
            "args": {"bytes": (90 + n % 10) * MIB},
        }
        for n in range(80)
    ]
    events.append(
        {"ph": "M", "pid": 0, "tid": 1, "name": "thread_name", "args": {"name": "compute"}}
    )
    facts = {
        "settings": {"limit": 100 * MIB, "swap_all": False},
        "stats": {"limit_bytes": 100 * MIB, "peak_bytes": 99 * MIB, "bytes_out": 24 * MIB},
        "advice": "With <9> MiB nothing moves.",
    }
    (tmp_path / "ooc.json").write_text(json.dumps({"traceEvents": events, "otherData": facts}))
    log = [
        {"iteration": n, "epoch": 1, "main/loss": 1 / n, "ooc/bytes_out": 8.0 * MIB}
        for n in range(1, 41)
    ]
    (tmp_path / "log").write_text(json.dumps(log))
    (tmp_path / "config.yaml").write_text("arch: nin & more\n")
    foreseen = {"peak_bytes": 90 * MIB, "bytes_out": 16 * MIB, "step_seconds": 0.05, "name": "nin"}
    (tmp_path / "estimate.json").write_text(json.dumps(foreseen))
    return tmp_path


def test_iterations_and_what_ran_inside_another(run):
    trace = read_run(run).traces[0]
    assert [start for start, _ in trace.iterations] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [end for _, end in trace.iterations] == pytest.approx([0.1, 0.2, 0.3, 0.395])
    assert "ReLUGrad" not in {s.name for s in trace.spans}
    assert trace.drawn_iteration() in (1, 2)


@pytest.mark.parametrize("cut", [1, 40, 400, 4000])
def test_a_trace_whose_end_is_missing_is_read_up_to_there(tmp_path, cut):
    path = tmp_path / "ooc.json"
    x = chainer.Variable(np.ones((64, 64), "f"))
    with chainer_ooc.out_of_core_mode(limit="8GiB", trace=path):
        for _ in range(8):
            loss = F.sum(F.tanh(F.exp(x)))
            loss.backward()
    whole = read_run(tmp_path).traces[0]
    text = path.read_text()
    path.write_text(text[: -cut - 1])
    found = read_run(tmp_path).traces[0]
    assert found.facts == {"broken": True}
    assert found.spans == whole.spans[: len(found.spans)]
    assert len(found.spans) >= len(whole.spans) - cut / 60
    (page, *_) = write_report(tmp_path)
    assert "The end of the trace is missing" in page.read_text()


def test_a_trace_of_a_process_that_was_killed_says_so(run):
    document = json.loads((run / "ooc.json").read_text())
    assert "has no end" not in write_report(run)[0].read_text()
    document["otherData"]["ended"] = False
    (run / "ooc.json").write_text(json.dumps(document))
    assert "The trace has no end: the process was killed" in write_report(run)[0].read_text()


def test_fates_of_what_was_saved(run):
    rows = {row.name: row for row in storages(read_run(run).traces[0])}
    conv, relu = rows["Conv"], rows["ReLU <b>"]
    assert (conv.fate, conv.calls, conv.bytes_out, conv.bytes_in) == (
        "swapped",
        1,
        6 * MIB,
        6 * MIB,
    )
    assert (relu.fate, relu.bytes_out, relu.bytes_in) == ("written", 2 * MIB, 0)
    again = [
        span("recompute", "Conv", 38, 39, bytes=6 * MIB),
    ]
    document = {"traceEvents": iteration(0, copies=False) + again}
    (run / "ooc.json").write_text(json.dumps(document))
    fates = {row.name: row.fate for row in storages(read_run(run).traces[0])}
    assert fates == {"ReLU <b>": "kept", "Conv": "recomputed"}
    (run / "ooc.json").write_text(json.dumps({"traceEvents": iteration(0, copies=False)}))
    assert {row.fate for row in storages(read_run(run).traces[0])} == {"kept"}


def test_figures(run):
    data = read_run(run)
    tiles = {name: (value, remark) for name, value, remark in headline(data)}
    assert tiles["peak memory"] == ("99.0 MiB", "99.0% of the limit")
    assert tiles["iteration"][0] == "100.0 ms"
    assert tiles["waiting"] == ("5.0%", "5.0 ms")
    assert tiles["moved out"][0] == "8.0 MiB"
    causes = [(cause, round(time * 1e3, 3)) for cause, time, _, _ in stalls(data)]
    assert causes == [("fetch", 3.0), ("room", 0.75)]
    rows = {name: ratio for name, _, _, ratio in compared(data)}
    assert rows == {"peak memory": "1.10", "moved out per iteration": "0.50", "iteration": "2.00"}


class _Parser(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attributes):
        if tag != "meta":
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_whole_and_needs_nothing_else(run, capsys):
    assert main(["report", str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    html = (run / "report.html").read_text()
    parser = _Parser()
    parser.feed(html)
    assert parser.open == []
    assert parser.links == []
    assert "ReLU &lt;b&gt;" in html and "nin &amp; more" in html
    assert "<b>, " not in html
    assert "<h2>What bound it, and what to change" in html
    assert "<p>With &lt;9&gt; MiB nothing moves.</p>" in html
    titles = ("Memory", "One iteration", "What became of what was saved", "Waiting, by cause")
    for title in (*titles, "Foreseen and measured", "Log"):
        assert f"<h2>{title}" in html
    # Of forty entries of the log, the first, the last and ten between.
    assert html.count('<td class="n">0.025</td>') == 1
    assert len(re.findall(r"<tr>", html.split("<h2>Log")[1])) == 13


def test_pictures_stand_alone_and_draw_the_limit(run):
    write_report(run)
    root = ET.fromstring((run / "report-memory.svg").read_text())
    height = float(root.get("viewBox").split()[3])
    (limit,) = (e for e in root.iter() if e.get("class") == "limit")
    (curve,) = (e for e in root.iter() if e.get("class") == "curve")
    heights = [float(n) for n in re.findall(r"V([\d.]+)", curve.get("d"))]
    # The curve stays below the limit: its top is at 99 of 100 MiB.
    assert 0 < float(limit.get("y1")) < min(heights) < height
    bars = [
        e for e in ET.fromstring((run / "report-timeline.svg").read_text()).iter() if e.get("fill")
    ]
    assert len(bars) >= 4 + 2 + 3  # functions, waits, copies


def test_markdown_names_its_pictures(run):
    written = write_report(run, run / "elsewhere")
    text = (run / "elsewhere" / "report.md").read_text()
    for name in re.findall(r"\]\((.*?)\)", text):
        assert run / "elsewhere" / name in written
    assert "| Conv | 1 | swapped | 1 | 6.0 | 1 | 6.0 |" in text


def test_without_a_trace_the_log_is_told(run):
    (run / "ooc.json").unlink()
    write_report(run)
    text = (run / "report.md").read_text()
    assert 'enable(trace="ooc.json")' in text
    assert "moved out: **8.0 MiB**" in text


def test_ranks_are_told_apart(run):
    shutil.copy(run / "ooc.json", run / "ooc.rank1.json")
    write_report(run)
    assert "| ooc.rank1.json | 99.0 MiB |" in (run / "report.md").read_text()


def empty(run):
    for name in ("log", "ooc.json"):
        (run / name).unlink()
    return run


def holding(name, text):
    def write(run):
        (run / name).write_text(text)
        return run

    return write


WRONG = {
    "no folder": (lambda run: run / "nowhere", "is no folder"),
    "nothing": (empty, "neither a trace"),
    "damaged": (holding("ooc.json", "{"), "is no JSON"),
    "no trace": (holding("ooc.json", "{}"), "traceEvents"),
    "no event": (holding("ooc.json", '{"traceEvents": [{"ph": "X"}]}'), "not complete"),
    "log": (holding("log", "{}"), "not a list"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_say_what_to_do(run, case, capsys):
    prepare, message = WRONG[case]
    folder = prepare(run)
    with pytest.raises(RunError, match=message):
        read_run(folder)
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("chainer_ooc report: ") and len(error.splitlines()) == 1


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser")
@pytest.mark.parametrize("width", [1100, 500])
def test_a_browser_shows_it(run, tmp_path, width):
    image = pytest.importorskip("PIL.Image")
    write_report(run)
    picture = tmp_path / "page.png"
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--hide-scrollbars", f"--window-size={width},1500", f"--screenshot={picture}",
        (run / "report.html").as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=180, capture_output=True)
    with image.open(picture) as opened:
        pixels = opened.convert("RGB")
    colors = {color for _, color in pixels.getcolors(pixels.width * pixels.height)}
    # Forward, backward, copies out and in, and the limit are there to be seen.
    for color in ("4c78a8", "9467bd", "e08214", "2a9d5c", "d62f3b"):
        assert tuple(bytes.fromhex(color)) in colors, color
