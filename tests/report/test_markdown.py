"""Whatever names contain, a Markdown reader shows them and makes nothing of them."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from chainer_ooc.report.markdown import block, plain
from chainer_ooc.report.page import write_report
from chainer_ooc.report.page_data import RunError

NASTY = [
    "<script>alert(1)</script>", "![x](http://example.org/x.png)", "[a](javascript:b)", "a|b", "a\\|b", "a\\",
    "`code`", "``", "**bold** _it_ __init__ snake_case_ ~~x~~", "&lt;&#60;&amp", "# title #", "<!-- x", "$x$ $`y`$",
    "two\nlines", "a\r\nb\u2028c", "\x1b[2J\x07", "\u202etxt.exe", "\udcff\udc80", "1. a", "- b", "> c", "===",
    "[x]: http://example.org", "<http://example.org>", "| --- |", "   spaces   ", "```\n# out", "~~~", "\\`\\<",
]  # fmt: skip
texts = st.text(max_size=40) | st.lists(st.sampled_from(NASTY), max_size=4).map("".join)


def visible(text):
    shown = "".join(
        c if c.isprintable() or c.isspace() else c.encode("unicode_escape").decode() for c in text
    )
    return " ".join(shown.split())


def inlines(markdown):
    """Returns kind and text of all that is within headings, cells and paragraphs."""
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = reader.parse(markdown)
    found = []
    for token in tokens:
        if token.type == "inline":
            kinds = {child.type for child in token.children}
            assert kinds <= {"text", "text_special"}, (kinds, markdown)
            found.append("".join(child.content for child in token.children))
    return [token.type for token in tokens], found


def with_examples(test):
    for text in NASTY:
        test = example(text)(test)
    return given(texts)(settings(max_examples=300, deadline=None)(test))


@with_examples
def test_a_text_is_shown_as_it_is(text):
    kinds, found = inlines(
        f"# Report: {plain(text)}\n\n| {plain(text)} | b |\n|---|---|\n| c | {plain(text)} |\n"
    )
    shown = visible(text)
    assert found == [f"Report: {shown}".strip(), shown, "b", "c", shown]
    assert (
        kinds.count("heading_open") == kinds.count("table_open") == kinds.count("tr_open") / 2 == 1
    )
    assert "html_block" not in kinds


@with_examples
def test_a_block_ends_where_it_ends(text):
    tokens = MarkdownIt("commonmark").parse(f"{block(text, 'sh')}\n\nbehind\n")
    assert [token.type for token in tokens] == [
        "fence", "paragraph_open", "inline", "paragraph_close",
    ]  # fmt: skip
    codes = str.maketrans(
        {c: c.encode("unicode_escape").decode() for c in text if not c.isprintable()}
    )
    expected = [line.replace("\t", "  ").translate(codes).split() for line in text.splitlines()]
    assert tokens[0].content.split() == [word for line in expected for word in line]
    assert all(c.isprintable() or c in "\n\t" for c in tokens[0].content)


@pytest.mark.parametrize("name", [n for n in NASTY if "/" not in n and "\0" not in n])
def test_the_page_of_a_run(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    log = [{"iteration": 1, "epoch": 1, "main/loss": 1, name: 2.0}]
    events = [
        {"ph": "X", "name": name, "cat": cat, "ts": n * 1e6, "dur": 1e6, "args": {"bytes": 1 << 20}}
        for n, cat in enumerate(["forward", "forward", "backward"])
    ]
    facts = {"settings": {"swap_dir": name, name: name}, "events_left_out": name}
    (folder / "log").write_text(json.dumps(log))
    (folder / "ooc.json").write_text(json.dumps({"traceEvents": events, "otherData": facts}))
    (folder / "config.yaml").write_bytes(f"out: {name}\n".encode("utf-8", "surrogateescape"))
    write_report(folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    kinds = [t.type for t in MarkdownIt("commonmark").enable("table").parse(text)]
    assert kinds.count("fence") == 1 and "html_block" not in kinds
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    links = [
        child
        for token in reader.parse(text)
        for child in token.children or ()
        if child.type in ("link_open", "html_inline", "code_inline", "s_open", "em_open")
        or (child.type == "image" and not child.attrs["src"].startswith("report-"))
    ]
    assert links == []
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html


@pytest.mark.parametrize("facts", [[], "text", 7, {"settings": []}, {"settings": "a"}], ids=str)
def test_traces_of_wrong_types(tmp_path, facts):
    (tmp_path / "ooc.json").write_text(json.dumps({"traceEvents": [], "otherData": facts}))
    with pytest.raises(RunError, match=r"no mapping; run again"):
        write_report(tmp_path)
