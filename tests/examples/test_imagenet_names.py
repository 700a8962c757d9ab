"""Names of files may hold anything: they are used as they are, and shown in one line."""

import os

import pytest
from datasets.opening import open_dataset
from datasets.statistics import channel_statistics
from errors import InputError, printable
from PIL import Image
from tools import make_list, make_lmdb
from tools.common import print_table
from world import World

NASTY = {
    "a line break": "a\nb",
    "a carriage return": "a\rb",
    "another line break": "a\u2028b",
    "the next line": "a\x85b",
    "a form feed": "a\x0cb",
    "codes of a terminal": "\x1b[2J\x1b]0;title\x07",
    "another direction": "\u202egpj.exe",
    "not UTF-8": os.fsdecode(b"\xff\xfe"),
}


@pytest.mark.parametrize("name", NASTY.values(), ids=NASTY)
def test_errors_are_one_line(name):
    error = InputError(f"image {name}: no such file")
    assert str(error).isprintable() and str(error).isascii()
    with pytest.raises(InputError) as info:
        World().agree(str(error))
    assert str(info.value) == str(error)  # codes are not made codes of again
    assert printable("plain ü 日本 | <b>") == "plain ü 日本 | <b>"


@pytest.mark.parametrize("name", NASTY.values(), ids=NASTY)
def test_folders_of_any_names(tmp_path, name, capsys):
    for part in ("train", "val"):
        (tmp_path / part / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / part / name / f"{name}.png")
    train, val, n = open_dataset(train=tmp_path / "train", val=tmp_path / "val")
    assert (n, train.names, train.image(0).shape) == (1, [name], (9, 9, 3))
    with pytest.raises(InputError, match=r"red is the same|green is the same"):
        channel_statistics(train, cache=tmp_path / "cache")
    (tmp_path / "val" / name / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cannot be decoded") as info:
        val.image(0)
    assert str(info.value).isprintable()
    print_table(("image", "problem"), [(val.name(0), "damaged")])
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("name", NASTY.values(), ids=NASTY)
def test_make_list_refuses_names_that_a_list_cannot_hold(tmp_path, name, capsys):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "a" / f"{name}.png")
    output = tmp_path / "lists"
    status = make_list.main([str(tmp_path / "photos"), "-o", str(output)])
    error = capsys.readouterr().err
    if status == 0:  # then it must be what a reader finds
        lines = [p.read_text(encoding="utf-8").splitlines() for p in output.glob("*.txt")]
        assert [f"a/{name}.png 0"] in lines
    else:
        assert "a list cannot hold this name" in error and error.count("\n") == 1
    assert (status == 0) == (name in (NASTY["codes of a terminal"], NASTY["another direction"]))


def test_make_lmdb_refuses_names_that_a_key_cannot_hold(tmp_path, capsys):
    pytest.importorskip("lmdb")
    folder = tmp_path / "photos" / "a"
    folder.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / f"{NASTY['not UTF-8']}.png")
    assert make_lmdb.main([str(tmp_path / "photos"), "-o", str(tmp_path / "a.lmdb")]) == 2
    error = capsys.readouterr().err
    assert "the name is not UTF-8" in error and error.count("\n") == 1
