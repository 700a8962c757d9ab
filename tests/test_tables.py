"""Figures as aligned text and as HTML."""

from __future__ import annotations

import html.parser

import chainer
import chainer.functions as F
import numpy as np
import pytest

import chainer_ooc
from chainer_ooc.report.explain import Explanation, HeldStorage
from chainer_ooc.report.plans import PlanReport, PlanReports
from chainer_ooc.tables import Shown, Table, format_bytes, format_seconds


class Texts(html.parser.HTMLParser):
    """The texts of the cells, by row, and of the paragraphs. Every tag has to be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.paragraphs, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] == "p":
            self.paragraphs.append(data)
        else:
            assert self.open[-1] in ("td", "th")
            self.rows[-1].append(data)


def test_numbers_end_and_words_begin_in_one_column():
    table = Table([("a", "1.5"), ("longer", "22.25")], "<>", ("name", "ms"))
    assert str(table).splitlines() == [
        "name       ms",
        "a         1.5",
        "longer  22.25",
    ]
    assert Texts(table.to_html()).rows == [["name", "ms"], ["a", "1.5"], ["longer", "22.25"]]


def test_a_row_of_another_length_is_an_error():
    with pytest.raises(ValueError):
        str(Table([("a", "b"), ("c",)], "<<"))


def test_foreign_text_is_shown_literally():
    held = HeldStorage("<script>alert(1)</script>", 3 << 20, ("a dict's '<b>'", "x & y"))
    explanation = Explanation(2, 5 << 20, 3 << 20, (held,))
    shown = Texts(explanation._repr_html_())
    assert shown.rows[1] == ["3 MiB", held.function, "a dict's '<b>', x & y"]
    assert str(explanation).splitlines()[-1].split() == " ".join(shown.rows[1]).split()
    assert shown.paragraphs[0] in " ".join(str(explanation).split())


def test_paragraphs_are_wrapped():
    class One(Shown):
        def _blocks(self):
            yield "word " * 60

    assert max(map(len, str(One()).splitlines())) <= 100
    assert str(One()).split() == ["word"] * 60


@pytest.mark.parametrize("what", ["stats", "plans", "explain"])
def test_what_is_printed_is_also_shown_in_notebooks(what):
    with chainer_ooc.out_of_core_mode(swap_all=True, min_bytes=1):
        x = chainer.Variable(np.ones((64, 64), "f"))
        F.sum(F.exp(F.tanh(x))).backward()
        held = [F.exp(x)]
        shown = getattr(chainer_ooc, what)()
    text, page = str(shown), Texts(shown._repr_html_())
    words = [*(word for row in page.rows for cell in row for word in cell.split())]
    assert all(word in text.split() for word in words)
    assert all(word in text.split() for line in page.paragraphs for word in line.split())
    assert page.rows or page.paragraphs
    del held


def report(**given):
    figures = {field: 1 for field in PlanReport.__dataclass_fields__}
    several = dict.fromkeys(
        ("measured_seconds", "measured_peak_bytes", "measured_bytes_out_used"), (1, 3, 2)
    )
    return PlanReport(**{**figures, **several, "signature": "abcdef0123", "device": "RAM", **given})


def test_each_plan_is_a_column():
    assert "no plans" in str(PlanReports())
    reports = PlanReports([report(bytes_swapped=3 << 20, followed=True), report(followed=False)])
    rows = {row[0].strip(): row[1:] for row in Texts(reports._repr_html_()).rows}
    assert rows["swapped"] == ["1 arrays, 3 MiB", "1 arrays, 1 B"]
    assert rows["time of an iteration"] == ["2 s", "2 s"]
    assert rows["followed"] == ["yes", "no: on demand was faster"]
    assert {len(line) for line in str(reports).splitlines()} == {
        max(map(len, str(reports).splitlines()))
    }
    assert "and 3 more graphs" in str(PlanReports([report()] * 7))
    none = PlanReports([report(measured_seconds=(), measured_peak_bytes=())])
    assert "none yet" in str(none)


@pytest.mark.parametrize(
    "nbytes, text", [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5 GiB")]
)
def test_bytes(nbytes, text):
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    "seconds, text", [(0, "0 s"), (4e-6, "4 us"), (0.0123, "12.3 ms"), (1, "1 s"), (75.04, "75 s")]
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text
